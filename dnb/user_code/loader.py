"""Batches on an engine: from sample indices to what the model is given."""

from __future__ import annotations

from typing import Any

import torch

from dnb.job import DataSource


def fetch_batch(source: DataSource, indices: torch.Tensor) -> Any:
    """Fetch the batch of these samples, as a `DataLoader` would make it.

    Args:
        source: tensors are indexed at once; a data set is asked for each sample, or for all if it has
            `__getitems__`.
        indices: int64, shape (batch,).
    """
    if source.collate is None:
        return tuple([_rows_of(tensor, indices) for tensor in source.samples])
    positions = indices.tolist()
    if hasattr(source.samples, "__getitems__"):
        return source.collate(source.samples.__getitems__(positions))
    return source.collate([source.samples[position] for position in positions])


def _rows_of(tensor: Any, indices: torch.Tensor) -> Any:
    # The same rows, which it copies several times as fast.
    if type(tensor) is torch.Tensor and tensor.is_contiguous():
        return tensor.index_select(0, indices)
    return tensor[indices]
