"""The rehearsal of a run: what it finds, and what of the run it changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dnb.errors import USER_ERRORS, summary_of
from dnb.progress import long_work
from dnb.records import Finding, Reduction
from dnb.rehearsal.batch_forms import check_batches
from dnb.rehearsal.fitting import fit_data
from dnb.rehearsal.losses import check_loss, declared_reduction
from dnb.rehearsal.metrics import check_metrics
from dnb.rehearsal.side_effects import refuse_own_loop, refuse_written_parameters, tell_changed_attributes
from dnb.rehearsal.trial import Options, Trial
from dnb.transport.job import Data, Job

log = logging.getLogger(__name__)

# Takes a trial, may change what of it says so, and tells what it finds.
#
# Raises:
#     ArgumentError: the run cannot be right.
Check = Callable[[Trial], Sequence[Finding]]

# In the order in which they are made.
CHECKS: tuple[Check, ...] = (
    check_batches,
    refuse_own_loop,
    refuse_written_parameters,
    fit_data,
    tell_changed_attributes,
    check_loss,
    check_metrics,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A run as it is shipped, and what is told of it.

    Args:
        job: with what had to be converted or wrapped.
        data: likewise.
        findings: told as events when the run begins.
        reduction: how losses of parts are put together: "targets" where a loss is a mean over targets that may weigh
            differently, and all others are means over samples.
        whole_metrics: names of metrics that are no means over samples.
        loss_over: "samples" if the loss of a batch is the mean of the losses of its parts, "batch" if it is computed on
            the gathered outputs of the whole batch.
        probe: loss of the first samples in evaluation mode, which engines are held against; None: it could not be had.
    """

    job: Job
    data: Data
    findings: tuple[Finding, ...] = ()
    reduction: Reduction = "targets"
    whole_metrics: tuple[str, ...] = ()
    loss_over: Literal["samples", "batch"] = "samples"
    probe: float | None = None


def rehearse(job: Job, data: Data, options: Options | None = None) -> Rehearsed:
    """Compute a few samples of a run here, and leave everything of the user's as it was.

    Args:
        job: as read from the arguments.
        data: likewise.
        options: of the run.

    Raises:
        ArgumentError: the run cannot be right; nothing was started.
    """
    with long_work("rehearsing a few samples"):
        try:
            trial = Trial.of(job, data, options or Options())
        except KeyboardInterrupt:
            raise
        except USER_ERRORS as error:  # what cannot be copied cannot be shipped, which says more
            log.info("nothing was rehearsed: %s", summary_of(error))
            return Rehearsed(job=job, data=data, reduction=declared_reduction(job.loss))
        try:
            findings = [finding for check in CHECKS for finding in check(trial)]
            return Rehearsed(
                job=trial.given,
                data=trial.given_data,
                findings=tuple(findings),
                reduction=trial.reduction,
                whole_metrics=trial.whole_metrics,
                loss_over=trial.loss_over,
                probe=trial.probed,
            )
        finally:
            trial.release()
