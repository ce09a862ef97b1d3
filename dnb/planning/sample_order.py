"""Sample order: the batches of indices that one process would see, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    epochs = _walk_permutations(order) if order.sampler is None and order.batch_sampler is None else _walk_loader(order)
    while True:
        num_batches = 0
        for batch in next(epochs):
            num_batches += 1
            yield batch
        if num_batches == 0:
            return


def _walk_loader(order: BatchOrder) -> Iterator[Iterable[torch.Tensor]]:
    loader = _index_loader(order)
    while True:
        yield loader


def _walk_permutations(order: BatchOrder) -> Iterator[Iterable[torch.Tensor]]:
    """What a loader without a sampler of its own does, for all samples of an epoch at once.

    It draws a base seed for its workers, then, if it shuffles, a permutation.
    """
    generator = _generator(order)
    whole = torch.arange(order.num_samples)
    last = order.num_samples - order.num_samples % order.batch_size if order.drop_last else order.num_samples
    while True:
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        indices = torch.randperm(order.num_samples, generator=generator) if order.shuffle else whole
        yield indices[:last].split(order.batch_size) if last else ()
        if order.shuffle:
            torch.randperm(order.num_samples, generator=generator)  # RandomSampler draws once more at its end


def count_batches(order: BatchOrder) -> int:
    """Global batches in one epoch."""
    return len(_index_loader(order))


def samples_after(
    steps: NDArray[np.int64], *, num_samples: int, batch_size: int, steps_per_epoch: int
) -> NDArray[np.int64]:
    """How many samples were seen after each of these steps, if batches are all of one size but an epoch's last."""
    epochs, rest = np.divmod(steps, max(steps_per_epoch, 1))
    of_epoch = min(num_samples, steps_per_epoch * batch_size)  # less than all if the last batch is dropped
    seen: NDArray[np.int64] = epochs * of_epoch + rest * batch_size
    return seen


def _index_loader(order: BatchOrder) -> DataLoader[Any]:
    common: dict[str, Any] = {"collate_fn": _as_indices, "generator": _generator(order)}
    indices: Any = range(order.num_samples)
    if order.batch_sampler is not None:
        return DataLoader(indices, batch_sampler=order.batch_sampler, **common)
    common |= {"batch_size": order.batch_size, "drop_last": order.drop_last}
    if order.sampler is not None:
        return DataLoader(indices, sampler=order.sampler, **common)
    return DataLoader(indices, shuffle=order.shuffle, **common)


def _generator(order: BatchOrder) -> torch.Generator:
    return order.generator if order.generator is not None else torch.Generator().manual_seed(order.seed)


def _as_indices(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples, dtype=torch.int64)
