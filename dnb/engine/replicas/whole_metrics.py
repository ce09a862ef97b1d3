"""Metrics that look at all samples at once, of outputs that come in parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dnb.engine.replicas.outcome import mean_sums
from dnb.engine.replicas.pipeline.whole_loss import detached
from dnb.engine.replicas.whole_batch.output_form import form_of, tensors_in, tree_of
from dnb.protocol.measurements import Sums
from dnb.user_code.return_values import weighed

Metric = Callable[..., Any]


class WholeMetrics:
    """Outputs and targets of the parts of a batch, or of all validation data, and the metrics of them together.

    Args:
        metrics: of the run, by name.
        names: of those that are computed of all samples at once.
    """

    def __init__(self, metrics: Mapping[str, Metric], names: Collection[str]) -> None:
        self._metrics = {name: metric for name, metric in metrics.items() if name in names}
        self.of_parts = {name: metric for name, metric in metrics.items() if name not in names}
        self._pairs: list[tuple[Any, Any]] = []
        self._sizes: list[int] = []

    def __len__(self) -> int:
        """Count the metrics that are computed so."""
        return len(self._metrics)

    def begin(self) -> None:
        """Let go of what was added for a task that was not finished."""
        self._pairs, self._sizes = [], []

    def add(self, output: Any, target: Any, num_samples: int) -> None:
        """Add outputs and targets of one part; nothing is copied."""
        if self._metrics:
            self._pairs.append(pytree.tree_map(detached, (output, target)))
            self._sizes.append(num_samples)

    def take(self) -> list[Sums]:
        """Compute the metrics of all that was added, and let go of it.

        Raises:
            ReturnError: a metric is no number, or the parts cannot be joined.
        """
        pairs, sizes = self._pairs, self._sizes
        self.begin()
        if not pairs:
            return []
        with torch.no_grad():
            output, target = joined(pairs, sizes)
            found = {
                name: weighed(metric(output, target), sum(sizes), name=name) for name, metric in self._metrics.items()
            }
        return [mean_sums(0.0, found, num_samples=0)]


def joined(pairs: Sequence[tuple[Any, Any]], sizes: Sequence[int]) -> tuple[Any, Any]:
    """Outputs and targets of several parts as those of one; what has no row for each sample is that of the first.

    Raises:
        ReturnError: there is something else than tensors in them.
    """
    if len(pairs) == 1:
        return pairs[0]
    forms = [form_of(*pair) for pair in pairs]
    parts = [tensors_in(pair) for pair in pairs]
    return tree_of(forms[0], [_joined_column(column, sizes) for column in zip(*parts, strict=True)])


def _joined_column(column: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    has_rows = all(part.dim() > 0 and len(part) == size for part, size in zip(column, sizes, strict=True))
    return torch.cat(list(column)) if has_rows else column[0]
