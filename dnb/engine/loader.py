"""Batches on an engine: from sample indices to what the model is given."""

from __future__ import annotations

from typing import Any

import torch

from dnb.transport.job import DataSource


def fetch_batch(source: DataSource, indices: torch.Tensor) -> Any:
    """The batch of these samples, as a `DataLoader` would make it.

    Args:
        source: tensors are indexed at once; a data set is asked for each sample, or for all if it has
            `__getitems__`.
        indices: int64, shape (batch,).
    """
    if source.collate is None:
        return tuple(tensor[indices] for tensor in source.samples)
    positions = indices.tolist()
    if hasattr(source.samples, "__getitems__"):
        return source.collate(source.samples.__getitems__(positions))
    return source.collate([source.samples[position] for position in positions])


def move_batch(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: move_batch(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(move_batch(value, device) for value in batch)
    return batch


def count_samples(batch: Any, *, default: int) -> int:
    """Samples in a batch: the length of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.dim() else default
    children = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    for child in children:
        return count_samples(child, default=default)
    return default
