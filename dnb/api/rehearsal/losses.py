"""The reduction from the losses of parts to that of a batch: judged on the samples of a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dnb.api.rehearsal.trial import LOSS_SAMPLES, Trial, outputs_to_judge
from dnb.api.rehearsal.undisturbed import undisturbed
from dnb.errors import USER_ERRORS, ArgumentError
from dnb.job import Data, DataSource, Sum
from dnb.protocol.run import Finding, Reduction
from dnb.transport.pickling.copies import close_files
from dnb.user_code.judged_batches import with_gradient
from dnb.user_code.loader import fetch_batch
from dnb.user_code.loss_judge import Kind, Verdict, judge_loss, judge_step
from dnb.user_code.loss_weights import ignored_by, nodes_of_targets
from dnb.user_code.return_values import EVALUATION_PREFIX, read_step

# As torch's losses have it.
USUAL_IGNORED = -100


def check_loss(trial: Trial) -> list[Finding]:
    """Judge the loss of a run, and let it be put together as it must.

    Raises:
        ArgumentError: a step function's loss, or the model's own, cannot be put together.
    """
    job, wanted = trial.job, trial.options.loss_over
    if wanted is not None:
        trial.reduction = "samples"
        if job.step is not None and trial.computed.loss is not None:
            _verdict_on(trial)  # as metrics are judged, too
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
    if verdict.is_of_terms and trial.reduction == "targets":
        trial.reduction = "terms"
    if trial.reduction == "sum":
        text = "this loss is a sum over the samples of a batch: those of its parts are added up"
        return [Finding(kind="loss", text=text)]
    return []


def check_val_step(trial: Trial) -> list[Finding]:
    """Judge the loss of evaluations alone: of one that is no mean, each batch has a loss of its own."""
    val_step, source = trial.job.val_step, trial.data.val
    if val_step is None or source is None or trial.options.loss_over is not None:
        return []
    with undisturbed():
        verdict, metrics = _verdict_on_val_step(trial, val_step, source)
        assert trial.given_data.val is not None
        close_files(source.samples, trial.given_data.val.samples)
    if verdict.kind in ("batch", "sum"):
        trial.val_reduction = "samples"
    trial.target_metrics = tuple(f"{EVALUATION_PREFIX}{name}" for name, kind in metrics.items() if kind == "targets")
    names = [f"{EVALUATION_PREFIX}{name}" for name, kind in metrics.items() if kind in ("batch", "sum")]
    if trial.val_reduction == "samples":
        names.insert(0, f"{EVALUATION_PREFIX}loss")
    what = "is no mean over samples, and" if len(names) == 1 else "are no means over samples, and each"
    text = f"{', '.join(names)} of val_step {what} is the mean of its values on whole batches, by their samples"
    return [Finding(kind="loss", text=text)] if names else []


def _verdict_on_val_step(
    trial: Trial, val_step: Callable[..., Any], source: DataSource
) -> tuple[Verdict, dict[str, Kind]]:
    def computed(batch: Any) -> tuple[torch.Tensor | Sum, Mapping[str, Any]]:
        with torch.enable_grad(), trial.autocast():
            return read_step(val_step(trial.job.model, batch), needs_gradient=False)

    def fetch(begin: int, end: int) -> Any:
        return fetch_batch(source, torch.arange(begin, end))

    number = len(trial.indices) if trial.is_slow else max(len(trial.indices), LOSS_SAMPLES[1])
    num_samples = min(number, _num_samples(source))
    trial.modes.set_training(mode=False)
    trial.seed()
    try:
        batch = fetch(0, num_samples)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # its own evaluation will tell
        return Verdict(None), {}
    leaves_out = partial(_may_leave_out, trial.given_data)
    return judge_step(computed, batch, num_samples=num_samples, fetch=fetch, leaves_out=leaves_out)


def _num_samples(source: DataSource) -> int:
    return len(source.samples[0] if source.collate is None else source.samples)


def _verdict_on(trial: Trial) -> Verdict:
    job = trial.job
    if job.loss is None:
        trial.widen(LOSS_SAMPLES[0])
        verdict = _verdict_with_model(trial)
        is_in_doubt = verdict.kind in (None, "batch") or "batch" in trial.step_metrics.values()
        return _verdict_with_model(trial) if is_in_doubt and trial.widen(LOSS_SAMPLES[1]) else verdict
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
    """Judge a loss that the model is computed for every time, and the metrics that a step function returns with it."""
    leaves_out = partial(_may_leave_out, trial.given_data)
    with undisturbed():
        trial.modes.set_training(mode=False)
        verdict, trial.step_metrics = judge_step(
            trial.loss_and_metrics_of,
            trial.batch,
            num_samples=len(trial.indices),
            fetch=trial.fetched,
            leaves_out=leaves_out,
            refuses_unlike=True,
        )
    return verdict


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


def ignored_by_loss(loss: Any) -> int:
    """Return the target that a loss says not to count; torch's own where it says none."""
    owner = getattr(loss, "__self__", loss)
    stated = getattr(owner, "ignore_index", None)
    if stated is None:
        stated = getattr(loss, "keywords", {}).get("ignore_index")
    return stated if isinstance(stated, int) else USUAL_IGNORED


def may_hold(source: DataSource, marks: Collection[int]) -> bool:
    """Tell whether targets of a data source may be among some; of what lies in memory it can be seen."""
    if source.collate is not None:
        return True
    classes = [part for part in source.samples if not part.is_floating_point()]
    return any(bool((part == mark).any()) for part in classes for mark in marks)


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
