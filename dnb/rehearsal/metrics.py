"""Metrics that are no means over samples: found on the samples of a rehearsal, and never averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dnb.engine.loss_judge import judge, other_outputs
from dnb.errors import ArgumentError
from dnb.planning.calling import arguments_of
from dnb.records import Finding
from dnb.rehearsal.trial import Trial
from dnb.rehearsal.undisturbed import undisturbed
from dnb.transport.job import Sum
from dnb.transport.returned import number_of


def check_metrics(trial: Trial) -> list[Finding]:
    """Find the metrics of a run that look at all samples at once, and let them be computed so.

    Raises:
        ArgumentError: outputs are not gathered, as the model returns its own loss or the user wants no gathering.
    """
    if trial.computed.loss is None or trial.job.step is not None:
        return []
    with undisturbed():
        trial.modes.be_training(mode=False)
        names = tuple(name for name, metric in trial.job.metrics.items() if not _is_mean(trial, name, metric))
    if not names:
        return []
    shown = ", ".join(map(repr, names))
    are = f"metric {shown} is no mean" if len(names) == 1 else f"metrics {shown} are no means"
    if trial.job.loss is None:
        raise ArgumentError(
            f"{are} over samples, and where a model returns its own loss no outputs are gathered: give "
            "loss=callable(output, target), or leave the metric out and compute it behind the run"
        )
    if trial.options.loss_over == "samples":
        raise ArgumentError(
            f"{are} over samples, and loss_over='samples' gathers no outputs: leave loss_over or the metric out"
        )
    trial.whole_metrics = names
    text = f"{are} over samples: outputs are gathered, and one engine evaluates all validation data at once"
    return [Finding(kind="metrics", text=text)]


def _is_mean(trial: Trial, name: str, metric: Callable[..., Any]) -> bool:
    job, num_samples = trial.job, len(trial.indices)

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
            return judge(of_batch, trial.batch, num_samples=num_samples, fetch=trial.fetched).kind in (
                "samples",
                "targets",
            )
        pair = torch.utils._pytree.tree_map(_detached, trial.computed.output), trial.computed.target
        found = judge(lambda pair: measured(*pair), pair, num_samples=num_samples, vary=other_outputs)
    return found.kind in ("samples", "targets")


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
