"""Metrics that keep a state, such as those of torchmetrics, as functions of outputs and targets."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StatefulMetric:
    """A metric with `update` and `compute`, which begins anew every time.

    Args:
        metric: as the user gave it; its state counts for nothing, and is not changed.
    """

    metric: Any

    def __call__(self, output: Any, target: Any) -> Any:
        """The metric of these samples alone."""
        metric = copy.deepcopy(self.metric)
        if hasattr(metric, "reset"):
            metric.reset()
        metric.update(output, target)
        return metric.compute()
