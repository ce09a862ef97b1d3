"""Sample order: the batches of indices that one process would see, whoever computes them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dnb.errors import ArgumentError

# Of a value in a message.
SHOWN_LETTERS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """The order in which an epoch's global batches are drawn, as the arguments of a `DataLoader`.

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

    Raises:
        ArgumentError: the user's sampler yields what is no index or no batch, or an epoch without any.
    """
    for number, epoch in enumerate(iterate_epochs(order), 1):
        num_batches = 0
        for batch in epoch:
            num_batches += 1
            yield batch
        if num_batches == 0:
            if has_sampler(order):
                raise ArgumentError(f"{name_sampler(order)} yielded no batch in epoch {number}")
            return


def iterate_epochs(order: BatchOrder) -> Iterator[Iterable[torch.Tensor]]:
    """Yield the batches of each epoch, without end; an epoch is to be walked before the next one is asked for."""
    return _walk_loader(order) if has_sampler(order) else _walk_permutations(order)


def has_sampler(order: BatchOrder) -> bool:
    """Return whether the user's own sampler draws the samples."""
    return order.sampler is not None or order.batch_sampler is not None


def name_sampler(order: BatchOrder) -> str:
    """Name the user's sampler for messages."""
    if order.batch_sampler is not None:
        return f"the batch sampler {type(order.batch_sampler).__name__}"
    return f"the sampler {type(order.sampler).__name__}"


def _walk_loader(order: BatchOrder) -> Iterator[Iterable[torch.Tensor]]:
    loader = _index_loader(order)
    while True:
        yield loader


def _walk_permutations(order: BatchOrder) -> Iterator[Iterable[torch.Tensor]]:
    """Yield each epoch's batches in the order of a loader without a sampler of its own.

    It draws a base seed for its workers, then, if it shuffles, a permutation.
    """
    generator = _generator(order)
    whole = torch.arange(order.num_samples)
    last = order.num_samples - order.num_samples % order.batch_size if order.drop_last else order.num_samples
    while True:
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        indices = torch.randperm(order.num_samples, generator=generator) if order.shuffle else whole
        yield _walk_epoch(indices[:last].split(order.batch_size) if last else (), order, generator)


def _walk_epoch(
    batches: Iterable[torch.Tensor], order: BatchOrder, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    yield from batches
    if order.shuffle:
        torch.randperm(order.num_samples, generator=generator)  # RandomSampler draws once more at its end


def count_batches(order: BatchOrder) -> int:
    """Count the global batches of one epoch, as the user's sampler says if there is one.

    Raises:
        ArgumentError: it does not say, or there is none.
    """
    try:
        num_batches = len(_index_loader(order))
    except (TypeError, NotImplementedError) as error:
        if not has_sampler(order):
            raise
        raise ArgumentError(
            f"{name_sampler(order)} does not say how long an epoch is ({error}): give it a __len__ that returns how "
            f"many {'batches' if order.batch_sampler is not None else 'samples'} it yields"
        ) from error
    if num_batches == 0:
        who = f"{name_sampler(order)} has" if has_sampler(order) else "there is"
        why = ""
        if order.drop_last and order.num_samples < order.batch_size:
            why = f", as drop_last=True drops what is less than batch_size={order.batch_size}"
        raise ArgumentError(f"{who} no batch in an epoch of {order.num_samples} samples{why}: nothing would be trained")
    return num_batches


def samples_after(
    steps: NDArray[np.int64], *, num_samples: int, batch_size: int, steps_per_epoch: int
) -> NDArray[np.int64]:
    """Return the number of samples seen after each step, if batches are of one size but an epoch's last."""
    epochs, rest = np.divmod(steps, max(steps_per_epoch, 1))
    of_epoch = min(num_samples, steps_per_epoch * batch_size)  # less than all if the last batch is dropped
    seen: NDArray[np.int64] = epochs * of_epoch + rest * batch_size
    return seen


class _Indices(Dataset[Any]):
    """A data set whose samples are their own indices; a `DataLoader` gives it what the user's sampler yields.

    Args:
        order: of the samples.
    """

    def __init__(self, order: BatchOrder) -> None:
        self._num_samples = order.num_samples
        self._name = name_sampler(order)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: Any) -> Any:
        return index

    def __getitems__(self, batch: Any) -> NDArray[np.int64]:
        """Check a whole batch and return it; an index below 0 counts from the end, if the user's data set says so."""
        if isinstance(batch, str | bytes) or not isinstance(batch, Iterable):
            raise ArgumentError(f"{self._name} yielded {_shown(batch)} for a batch: it must be a list of indices")
        items = batch if isinstance(batch, list) else list(batch)
        if not items:
            raise ArgumentError(f"{self._name} yielded a batch without any index: it must have at least one")
        if not all(type(item) is int for item in items):
            items = [self._as_int(item) for item in items]
        if min(items) < -self._num_samples or max(items) >= self._num_samples:
            wrong = next(item for item in items if not -self._num_samples <= item < self._num_samples)
            raise ArgumentError(f"{self._name} yielded {_shown(wrong)}: {self._what_it_must_be()}")
        return np.array(items, dtype=np.int64)

    def _as_int(self, item: Any) -> int:
        is_truth = isinstance(item, bool | np.bool_) or (isinstance(item, torch.Tensor) and item.dtype == torch.bool)
        is_single = getattr(item, "ndim", 0) == 0  # one process would get a batch of one sample for [3]
        if not is_truth and is_single:
            try:
                return operator.index(item)
            except (TypeError, RuntimeError):  # torch says the latter
                pass
        raise ArgumentError(f"{self._name} yielded {_shown(item)} for an index: {self._what_it_must_be()}")

    def _what_it_must_be(self) -> str:
        return f"it must be an integer from 0 to {self._num_samples - 1}, the index of a sample"


def _shown(value: Any) -> str:
    """Describe a value and its kind for a message."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the value is the user's, and so is its __repr__
        text = "a value"
    text = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
    return f"{text} (of type {type(value).__name__})"


def _index_loader(order: BatchOrder) -> DataLoader[Any]:
    common: dict[str, Any] = {"collate_fn": torch.from_numpy, "generator": _generator(order)}
    indices = _Indices(order)
    if order.batch_sampler is not None:
        return DataLoader(indices, batch_sampler=order.batch_sampler, **common)
    common |= {"batch_size": order.batch_size, "drop_last": order.drop_last}
    if order.sampler is not None:
        return DataLoader(indices, sampler=order.sampler, **common)
    return DataLoader(indices, shuffle=order.shuffle, **common)


def _generator(order: BatchOrder) -> torch.Generator:
    return order.generator if order.generator is not None else torch.Generator().manual_seed(order.seed)
