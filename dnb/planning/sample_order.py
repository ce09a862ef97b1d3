"""Sample order: the batches of indices that one process would see, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """How the global batches of an epoch are drawn, as the arguments of a `DataLoader`.

    `sampler` and `batch_sampler` are those of a user's own loader; then `shuffle` and, for a batch sampler,
    `batch_size` and `drop_last` do not count.
    """

    num_samples: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = False
    seed: int = 0
    sampler: Iterable[int] | None = None
    batch_sampler: Iterable[list[int]] | None = None
    generator: torch.Generator | None = None


def iterate_batches(order: BatchOrder) -> Iterator[torch.Tensor]:
    """Yield the sample indices of each global batch, epoch after epoch, without end.

    It walks a `DataLoader` over the indices themselves, so that its draws from the generator (the base seed of
    each epoch included) are those of the loader that one process would use.

    Yields:
        int64 tensors of shape (batch,).
    """
    loader = _index_loader(order)
    while True:
        num_batches = 0
        for batch in loader:
            num_batches += 1
            yield batch
        if num_batches == 0:
            return


def count_batches(order: BatchOrder) -> int:
    """Global batches in one epoch."""
    return len(_index_loader(order))


def _index_loader(order: BatchOrder) -> DataLoader[Any]:
    generator = order.generator
    if generator is None:
        generator = torch.Generator().manual_seed(order.seed)
    common: dict[str, Any] = {"collate_fn": _as_indices, "generator": generator}
    indices: Any = range(order.num_samples)
    if order.batch_sampler is not None:
        return DataLoader(indices, batch_sampler=order.batch_sampler, **common)
    common |= {"batch_size": order.batch_size, "drop_last": order.drop_last}
    if order.sampler is not None:
        return DataLoader(indices, sampler=order.sampler, **common)
    return DataLoader(indices, shuffle=order.shuffle, **common)


def _as_indices(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples, dtype=torch.int64)
