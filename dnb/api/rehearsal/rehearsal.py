"""The rehearsal of a run: what it finds, and what of the run it changes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dnb.api.rehearsal.batch_forms import check_batches
from dnb.api.rehearsal.fitting import fit_data
from dnb.api.rehearsal.losses import check_loss, check_val_step, declared_reduction
from dnb.api.rehearsal.metrics import check_metrics
from dnb.api.rehearsal.padding import check_padding
from dnb.api.rehearsal.side_effects import refuse_own_loop, refuse_written_parameters, tell_changed_attributes
from dnb.api.rehearsal.trial import PROBE_SAMPLES, Options, Trial
from dnb.errors import USER_ERRORS, summary_of
from dnb.job import Data, Job
from dnb.progress import long_work
from dnb.protocol.run import Finding, Reduction

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
    check_padding,
    check_val_step,
    check_metrics,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedRun:
    """A run as it is shipped, and its findings.

    Args:
        job: with what had to be converted or wrapped.
        data: likewise.
        findings: reported as events when the run begins.
        reduction: how losses of parts are put together: "targets" where a loss is a mean over targets that may weigh
            differently, and all others are means over samples.
        val_reduction: likewise, of val_step.
        whole_metrics: names of metrics that are no means over samples.
        target_metrics: names of metrics that a step function returns, and that weigh as its loss does; those of
            val_step with "val_" before them.
        loss_over: "samples" if the loss of a batch is the mean of the losses of its parts, "batch" if it is computed on
            the gathered outputs of the whole batch.
        probe: loss of the first samples in evaluation mode, which engines are held against; None: it could not be had.
        probe_samples: number of these samples.
    """

    job: Job
    data: Data
    findings: tuple[Finding, ...] = ()
    reduction: Reduction = "targets"
    val_reduction: Reduction = "targets"
    whole_metrics: tuple[str, ...] = ()
    target_metrics: tuple[str, ...] = ()
    loss_over: Literal["samples", "batch"] = "samples"
    probe: float | None = None
    probe_samples: int = PROBE_SAMPLES


@dataclass(frozen=True, slots=True)
class _Known:
    """An earlier rehearsal of the same objects."""

    rehearsed: RehearsedRun  # with no job and data: they have what must not be kept alive
    probe_shapes: tuple[Any, ...]


# By fingerprint, the latest last.
_known: dict[tuple[Any, ...], _Known] = {}
MOST_KNOWN = 16


def rehearse(job: Job, data: Data, options: Options | None = None) -> RehearsedRun:
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
            trial, recalled = _tried(job, data, options or Options())
        except KeyboardInterrupt:
            raise
        except USER_ERRORS as error:  # what cannot be copied cannot be shipped, which says more
            log.info("nothing was rehearsed: %s", summary_of(error))
            finding = Finding(
                kind="rehearsal", text=f"nothing was rehearsed, so that no loss was judged: {summary_of(error)}"
            )
            return RehearsedRun(job=job, data=data, findings=(finding,), reduction=declared_reduction(job.loss))
        try:
            if recalled is not None:
                return recalled
            findings = [finding for check in CHECKS for finding in check(trial)]
            rehearsed = RehearsedRun(
                job=trial.given,
                data=trial.given_data,
                findings=tuple(findings),
                reduction=trial.reduction,
                val_reduction=trial.val_reduction,
                whole_metrics=trial.whole_metrics,
                target_metrics=trial.target_metrics,
                loss_over=trial.loss_over,
                probe=trial.probed,
                probe_samples=trial.probe_samples,
            )
            if rehearsed.job is job and rehearsed.data is data:
                _remember(trial, rehearsed)
            return rehearsed
        finally:
            trial.release()


def _tried(job: Job, data: Data, options: Options) -> tuple[Trial, RehearsedRun | None]:
    """Compute the samples of a trial, unless an earlier rehearsal of the same objects is found."""
    trial = Trial.copied(job, data, options)
    known = _known.get(_key(trial))
    if known is not None:
        probe = trial.probe()
        if _is_number(probe) and not trial.written and trial.probe_shapes == known.probe_shapes:
            return trial, replace(known.rehearsed, job=job, data=data, probe=probe)
        trial.release()
        trial = Trial.copied(job, data, options)
    trial.run()
    return trial, None


def _remember(trial: Trial, rehearsed: RehearsedRun) -> None:
    """Keep what was found, unless something of it may be otherwise the next time."""
    if trial.fingerprint is None or trial.computed.error is not None or not _is_number(trial.probed):
        return
    nothing: Any = None
    _known[_key(trial)] = _Known(replace(rehearsed, job=nothing, data=nothing), trial.probe_shapes)
    while len(_known) > MOST_KNOWN:
        del _known[next(iter(_known))]


def _key(trial: Trial) -> tuple[Any, ...]:
    return trial.fingerprint, trial.options, trial.given.order.num_samples, torch.get_default_dtype()


def _is_number(probe: float | None) -> bool:
    return probe is not None and math.isfinite(probe)
