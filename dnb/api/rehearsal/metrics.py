"""Metrics that are computed of all samples at once: found on the samples of a rehearsal, and never averaged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from dnb.api.rehearsal.trial import LOSS_SAMPLES, Trial, outputs_to_judge
from dnb.api.rehearsal.undisturbed import undisturbed
from dnb.engine.replicas.pipeline.whole_loss import detached
from dnb.errors import USER_ERRORS, ArgumentError
from dnb.job import Job, Sum
from dnb.protocol.run import Finding
from dnb.user_code.judged_batches import other_outputs
from dnb.user_code.loss_judge import judge, text_of_step_metrics
from dnb.user_code.model_call import arguments_of
from dnb.user_code.return_values import number_of, weighed
from dnb.user_code.stateful_metrics import StatefulMetric


def check_metrics(trial: Trial) -> list[Finding]:
    """Find the metrics of a run that look at all samples at once, so that they are computed so.

    Raises:
        ReturnError: one that keeps a state gives no number.
    """
    if trial.job.step is not None:
        return _tell_of_step(trial)
    if trial.computed.loss is None:
        return []
    with undisturbed():
        trial.modes.set_training(mode=False)
        for name, metric in trial.job.metrics.items():
            if isinstance(metric, StatefulMetric) and trial.job.loss is not None:
                _check_number(trial, name, metric)
        trial.whole_metrics = tuple(
            name
            for name, metric in trial.job.metrics.items()
            if not isinstance(metric, StatefulMetric) and not _is_mean(trial, name, metric)
        )
    return []


def whole_metrics_of(job: Job, found: Collection[str]) -> tuple[str, ...]:
    """Name the metrics that are computed of all samples at once: those that keep a state are, whatever they compute.

    Args:
        job: of the run.
        found: in the rehearsal to be no means over samples.

    Raises:
        ArgumentError: outputs are not known, as the model returns its own loss.
    """
    if job.step is not None:
        return ()
    names = tuple(name for name, metric in job.metrics.items() if name in found or isinstance(metric, StatefulMetric))
    if names and job.loss is None:
        raise ArgumentError(
            f"{called(names)} computed of all samples at once, and where a model returns its own loss no outputs are "
            "gathered: give loss=callable(output, target), or leave the metric out and compute it behind the run"
        )
    return names


def called(names: Sequence[str]) -> str:
    """Write the beginning of a sentence about metrics."""
    return f"metric{'s' * (len(names) > 1)} {', '.join(map(repr, names))} {'are' if len(names) > 1 else 'is'}"


def _check_number(trial: Trial, name: str, metric: Callable[..., Any]) -> None:
    """Refuse a metric before the run that its first step would refuse."""
    try:
        with torch.no_grad():
            value = metric(torch.utils._pytree.tree_map(detached, trial.computed.output), trial.computed.target)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # of a few samples some cannot be computed
        return
    weighed(value, 1, name=name)


def _tell_of_step(trial: Trial) -> list[Finding]:
    """Say which metrics of a step function are no means; those over targets are weighed as its loss is."""
    kinds = trial.step_metrics
    trial.target_metrics += tuple(name for name, kind in kinds.items() if kind == "targets")
    text = text_of_step_metrics(kinds)
    return [Finding(kind="metrics", text=text)] if text else []


def _is_mean(trial: Trial, name: str, metric: Callable[..., Any]) -> bool:
    job = trial.job

    def measured(output: Any, target: Any) -> Any:
        value = metric(output, target)
        if isinstance(value, Sum):
            return Sum(torch.tensor(number_of(value.total, what="metric", name=name)), value.weight)
        return torch.tensor(number_of(value, what="metric", name=name), dtype=torch.float64)

    def of_batch(batch: Any) -> Any:
        given = arguments_of(job.model, batch, has_target=False)
        return measured(job.model(*given.positional, **given.keywords), batch)

    with torch.no_grad():
        if job.loss is None:
            found = judge(of_batch, trial.batch, num_samples=len(trial.indices), fetch=trial.fetched)
            if found.kind not in ("samples", "targets") and trial.widen(LOSS_SAMPLES[1]):
                trial.modes.set_training(mode=False)
                found = judge(of_batch, trial.batch, num_samples=len(trial.indices), fetch=trial.fetched)
            return found.kind in ("samples", "targets")
        output, target, num_samples = outputs_to_judge(trial)
        pair = torch.utils._pytree.tree_map(detached, output), target
        found = judge(lambda pair: measured(*pair), pair, num_samples=num_samples, vary=other_outputs)
    return found.kind in ("samples", "targets")
