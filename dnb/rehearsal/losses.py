"""How the losses of parts come to that of a batch: judged on the samples of a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dnb.engine.loss_judge import Verdict, judge, judge_loss, with_gradient
from dnb.errors import ArgumentError
from dnb.records import Finding, Reduction
from dnb.transport.job import Data, Job
from dnb.transport.loss_weights import ignored_by, nodes_of_targets
from dnb.transport.returned import read_step


@dataclass(frozen=True, slots=True)
class LossFound:
    """A run's loss as it was judged."""

    reduction: Reduction
    loss_over: Literal["samples", "batch"]
    findings: tuple[Finding, ...] = ()


def find_loss(job: Job, data: Data, batch: Any, *, output: Any, wish: str | None, num_samples: int) -> LossFound:
    """Judge the loss of a run.

    Args:
        job: copied; its model may be changed, and is left in evaluation mode.
        data: as it is trained on.
        batch: first samples.
        output: of the model for the batch, if the loss is a function of it.
        wish: of the user: "samples" or "batch".
        num_samples: of the batch.

    Raises:
        ArgumentError: a step function's loss, or the model's own, cannot be put together.
    """
    if wish == "samples":
        return LossFound("samples", "samples")
    if wish == "batch":
        return LossFound("samples", "batch")
    job.model.eval()
    if job.loss is not None:
        verdict = judge_loss(job.loss, output, batch[-1], num_samples=num_samples)
        if verdict.kind == "targets" and all_count_the_same(job.loss, output, batch[-1], data):
            return LossFound("samples", "samples")
    else:
        verdict = judge(_own_loss(job), batch, num_samples=num_samples)
        if verdict.kind == "batch":
            raise ArgumentError(_refusal(verdict, of_step=job.step is not None))
    if verdict.kind == "sum":
        text = "this loss is a sum over the samples of a batch: those of its parts are added up"
        return LossFound("sum", "samples", (Finding(kind="loss", text=text),))
    if verdict.kind == "batch":
        return LossFound("samples", "batch")
    return LossFound(verdict.kind or "targets", "samples")


def _own_loss(job: Job) -> Callable[[Any], Any]:
    """The loss of a batch where a step function or the model itself computes it."""

    def compute(batch: Any) -> Any:
        with torch.enable_grad():
            if job.step is not None:
                return read_step(job.step(job.model, batch), needs_gradient=False)[0]
            returned = job.model(**batch) if isinstance(batch, Mapping) else job.model(*_arguments(batch))
            return read_step(returned, needs_gradient=False, by="model")[0]

    return compute


def _arguments(batch: Any) -> Any:
    return batch if isinstance(batch, tuple | list) else (batch,)


def _refusal(verdict: Verdict, *, of_step: bool) -> str:
    whose = "step's loss" if of_step else "the loss that the model returns"
    where = "" if of_step else " from step=callable(model, batch)"
    return (
        f"{whose} is no mean over samples: of {verdict.num_samples} of them it is {verdict.whole:.6g}, and the mean of "
        f"their parts {verdict.parts:.6g}: return dnb.Sum(total, weight){where} if it is a mean over something else, "
        "such as tokens that count, or give loss=callable(output, target), for which the outputs of the whole batch "
        "are gathered; loss_over='samples' trains on the mean of the parts"
    )


def all_count_the_same(loss: Callable[..., Any], output: Any, target: Any, data: Data) -> bool:
    """Tell whether all targets of a run surely count, and count the same, so that nothing has to be weighed.

    Args:
        loss: a mean over targets.
        output: of some samples.
        target: of these.
        data: of the run; sure is only what lies in memory.
    """
    sources = [source for source in (data.train, data.val) if source is not None]
    if not isinstance(target, torch.Tensor) or any(source.collate is not None for source in sources):
        return False
    with torch.enable_grad():
        value = loss(with_gradient(output), target)
    nodes = nodes_of_targets(value) if isinstance(value, torch.Tensor) else []
    if not nodes or any(node._saved_weight is not None or not _is(node._saved_target, target) for node in nodes):
        return False
    marks = {ignored_by(node) for node in nodes}
    return not any(bool((source.samples[-1] == mark).any()) for source in sources for mark in marks)


def _is(used: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether a loss took the targets as they are."""
    return used.numel() == target.numel() and torch.equal(used.reshape(-1), target.reshape(-1))
