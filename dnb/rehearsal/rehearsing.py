"""The rehearsal of a run: what it finds, and what of the run it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dnb.records import Finding, Reduction
from dnb.transport.job import Data, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A run as it is shipped, and what is told of it.

    Args:
        job: with what had to be converted or wrapped.
        data: likewise.
        findings: told as events when the run begins.
        reduction: how losses of parts are put together: "targets" where a loss is a mean over targets that may weigh
            differently, and all others are means over samples.
        loss_over: "samples" if the loss of a batch is the mean of the losses of its parts, "batch" if it is computed on
            the gathered outputs of the whole batch.
        probe: loss of the first samples in evaluation mode, which engines are held against; None: it could not be had.
    """

    job: Job
    data: Data
    findings: tuple[Finding, ...] = ()
    reduction: Reduction = "targets"
    loss_over: Literal["samples", "batch"] = "samples"
    probe: float | None = None


def rehearse(job: Job, data: Data) -> Rehearsed:
    """Compute a few samples of a run here, and leave everything of the user's as it was.

    Args:
        job: as read from the arguments.
        data: likewise.

    Raises:
        ArgumentError: the run cannot be right; nothing was started.
    """
    return Rehearsed(job=job, data=data)
