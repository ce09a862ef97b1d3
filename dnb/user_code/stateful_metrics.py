"""Metrics that keep a state, such as those of torchmetrics, as functions of outputs and targets."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Of torchmetrics: a metric joins its state with those of other processes wherever a process group is open, and in the
# group of a team of engines nobody answers.
_JOINING = ("sync_on_compute", "dist_sync_on_step", "_to_sync")


@dataclass(frozen=True, slots=True)
class StatefulMetric:
    """A metric with `update` and `compute`, which begins anew every time.

    Args:
        metric: as the user gave it; its state counts for nothing, and is not changed.
    """

    metric: Any

    def __call__(self, output: Any, target: Any) -> Any:
        """Compute the metric of these samples alone."""
        metric = copy.deepcopy(self.metric)
        if isinstance(metric, torch.nn.Module):
            _disable_sync(metric)
            metric.to(_device_of(output))
        if hasattr(metric, "reset"):
            metric.reset()
        metric.update(output, target)
        return metric.compute()


def has_state(metric: Any) -> bool:
    """Tell whether a metric is one of torchmetrics' kind."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute"))


def is_collection(metric: Any) -> bool:
    """Tell whether it is several such metrics under their names, as torchmetrics' `MetricCollection`."""
    return has_state(metric) and isinstance(metric, torch.nn.ModuleDict)


def spread(metrics: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Return each metric with its name; those of a collection have that of the collection before theirs."""
    for name, metric in metrics.items():
        if is_collection(metric):
            yield from ((f"{name}_{own}", each) for own, each in metric.items())
        else:
            yield name, metric


def _disable_sync(metric: torch.nn.Module) -> None:
    for module in metric.modules():
        for name in _JOINING:
            if name in vars(module):
                setattr(module, name, False)


def _device_of(output: Any) -> torch.device:
    leaves = torch.utils._pytree.tree_leaves(output)
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
