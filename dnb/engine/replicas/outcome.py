"""The results of an engine's work: sums over samples, so that those of any parts add up."""

from __future__ import annotations

from dnb.protocol.measurements import Sums
from dnb.user_code.return_values import Metrics


def mean_sums(loss: float, metrics: Metrics, *, num_samples: int) -> Sums:
    """Build the sums of a part whose loss is a mean over its samples."""
    return Sums(
        loss_total=loss * num_samples,
        loss_weight=float(num_samples),
        metric_totals={name: total for name, (total, _) in metrics.items()},
        metric_weights={name: weight for name, (_, weight) in metrics.items()},
        num_samples=num_samples,
    )
