"""The names of a run's metrics among its columns, and which end of their values is good."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

VALIDATION = "val_"
# Columns that are no metrics.
_OTHERS = frozenset({"loss", "lr", "grad_norm", "samples_per_second", "seconds", "digest"})
# Words in the names of metrics of which more is better, and of those of which less is.
_MORE = ("acc", "f1", "auc", "auroc", "precision", "recall", "score", "r2", "iou", "dice", "bleu")
_LESS = ("err", "mse", "mae", "loss", "perplexity", "wer")


def metric_names(keys: Iterable[str]) -> list[str]:
    """Return the names of metrics among the columns of a history, in their order, each once."""
    names = (key.removeprefix(VALIDATION) for key in keys)
    return list(dict.fromkeys(name for name in names if name not in _OTHERS))


def best_of(name: str, values: Any) -> int | None:
    """Return the place of the best value of a metric; None if it is not known which end is good.

    Args:
        name: of the metric, with or without "val_".
        values: of it; not all of them need be numbers.
    """
    finite = np.isfinite(values)
    lower = name.lower()
    is_less = any(word in lower for word in _LESS)
    if not finite.any() or not (is_less or any(word in lower for word in _MORE)):
        return None
    if is_less:
        return int(np.where(finite, values, np.inf).argmin())
    return int(np.where(finite, values, -np.inf).argmax())
