"""The reduction from the losses of parts to that of a batch: judged on the samples of a rehearsal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dnb.api.rehearsal.trial import LOSS_SAMPLES, Trial, outputs_to_judge
from dnb.api.rehearsal.undisturbed import undisturbed
from dnb.errors import USER_ERRORS, ArgumentError
from dnb.job import Data
from dnb.protocol.run import Finding, Reduction
from dnb.user_code.loss_judge import Verdict, judge, judge_loss, with_gradient
from dnb.user_code.loss_weights import ignored_by, nodes_of_targets


def check_loss(trial: Trial) -> list[Finding]:
    """Judge the loss of a run, and let it be put together as it must.

    Raises:
        ArgumentError: a step function's loss, or the model's own, cannot be put together.
    """
    job, wanted = trial.job, trial.options.loss_over
    if wanted is not None:
        trial.reduction = "samples"
        return []
    trial.reduction = declared_reduction(job.loss)
    if trial.computed.loss is None:  # it will be reported with engine, step and samples
        return []
    verdict = _verdict_on(trial)
    if verdict.kind == "batch" and job.loss is None:
        raise ArgumentError(_refusal(verdict, of_step=job.step is not None))
    if verdict.kind == "batch":
        trial.reduction, trial.loss_over = "samples", "batch"
    elif verdict.kind is not None:
        trial.reduction = verdict.kind
    if trial.reduction == "sum":
        text = "this loss is a sum over the samples of a batch: those of its parts are added up"
        return [Finding(kind="loss", text=text)]
    return []


def _verdict_on(trial: Trial) -> Verdict:
    job = trial.job
    if job.loss is None:
        trial.widen(LOSS_SAMPLES[0])
        verdict = _verdict_with_model(trial)
        if verdict.kind in (None, "batch") and trial.widen(LOSS_SAMPLES[1]):
            return _verdict_with_model(trial)
        return verdict
    with undisturbed():
        trial.modes.set_training(mode=False)
        output, target, num_samples = outputs_to_judge(trial)
        with trial.autocast():
            verdict = judge_loss(job.loss, output, target, num_samples=num_samples)
            computed = trial.computed
            if verdict.kind == "targets" and all_count_the_same(
                job.loss, computed.output, computed.target, trial.given_data
            ):
                return replace(verdict, kind="samples")
    return verdict


def _verdict_with_model(trial: Trial) -> Verdict:
    """Judge a loss that the model is computed for every time."""
    # A sum of two losses is a mean over samples as long as every target counts.
    leaves_out = partial(_may_leave_out, trial.given_data)
    with undisturbed():
        trial.modes.set_training(mode=False)
        return judge(
            trial.loss_of, trial.batch, num_samples=len(trial.indices), fetch=trial.fetched, leaves_out=leaves_out
        )


def _may_leave_out(data: Data, loss: Any) -> bool:
    """Tell whether targets may come that do not count; of what lies in memory it can be seen."""
    sources = [source for source in (data.train, data.val) if source is not None]
    if any(source.collate is not None for source in sources):
        return True
    nodes = nodes_of_targets(loss) if isinstance(loss, torch.Tensor) else []
    if not nodes or any(node._saved_weight is not None for node in nodes):
        return True
    classes = [part for source in sources for part in source.samples if not part.is_floating_point()]
    return any(bool((part == ignored_by(node)).any()) for part in classes for node in nodes)


def declared_reduction(loss: Any) -> Reduction:
    """Return the reduction over parts that a loss itself declares."""
    owner = getattr(loss, "__self__", loss)  # of a bound method
    stated = getattr(owner, "reduction", None) or getattr(loss, "keywords", {}).get("reduction")
    return "sum" if stated == "sum" else "targets"


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
    try:
        with torch.enable_grad():
            value = loss(with_gradient(output), target)
    except USER_ERRORS:  # one more call than it stands: its own step will report it
        return False
    nodes = nodes_of_targets(value) if isinstance(value, torch.Tensor) else []
    if not nodes or any(node._saved_weight is not None or not _is(node._saved_target, target) for node in nodes):
        return False
    marks = {ignored_by(node) for node in nodes}
    return not any(bool((source.samples[-1] == mark).any()) for source in sources for mark in marks)


def _is(used: torch.Tensor, target: torch.Tensor) -> bool:
    """Return True if a loss took the targets as they are."""
    return used.numel() == target.numel() and torch.equal(used.reshape(-1), target.reshape(-1))
