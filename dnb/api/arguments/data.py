"""Data that a user hands to `fit`: how many samples there are, and in which order batches are drawn from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from dnb.api.arguments.checks import USUAL_BATCH_SIZE, UsualInt, check_positive
from dnb.api.arguments.data_sources import Source, read_source
from dnb.errors import ArgumentError
from dnb.planning.sample_order import BatchOrder, count_batches, iterate_batches


def batches(
    train: Any, *, batch_size: int = USUAL_BATCH_SIZE, shuffle: bool = True, seed: int = 0, epochs: int = 1
) -> Iterator[torch.Tensor]:
    """Yield the sample indices of every global batch that `fit` trains on with the same arguments, in order.

    They are those of a `DataLoader` with a generator seeded by `seed`, whatever the number of engines. Nothing of the
    caller's is advanced: a sampler or generator of a `DataLoader` is copied first.

    Args:
        train: as for `fit`.
        batch_size: samples of the global batch; a `DataLoader` brings its own.
        shuffle: likewise.
        seed: of the order.
        epochs: passes over the data.

    Yields:
        int64 tensors of shape (batch,).

    Raises:
        ArgumentError: `fit` would refuse it too.
    """
    source = read_source(train, name="train", seed=seed)
    order = copy.deepcopy(order_of(source, batch_size=batch_size, shuffle=shuffle, seed=seed))
    num_batches = count_batches(order) * check_positive(epochs, name="epochs")
    return islice(iterate_batches(order), num_batches)


def count_val_samples(source: Source | None) -> int:
    """Return the samples of an evaluation, as the order of a validation loader says; 0 without validation data.

    Raises:
        ArgumentError: an evaluation would have none.
    """
    if source is None:
        return 0
    order = source.order
    if order is None:
        return source.num_samples
    num_batches = count_batches(order)
    if order.sampler is not None:
        sampler: Any = order.sampler
        num_drawn = len(sampler)  # or else batches could not have been counted
    else:
        num_drawn = source.num_samples if order.batch_sampler is None else num_batches * order.batch_size
    return min(num_drawn, num_batches * order.batch_size)


def order_of(source: Source, *, batch_size: Any, shuffle: bool, seed: int) -> BatchOrder:
    """Return the order in which global batches are drawn from a data set; a `DataLoader` brings its own.

    Raises:
        ArgumentError: a batch that is none, or larger than the data set; or other wishes than a loader's own.
    """
    if source.order is not None:
        _check_loader(source.order, batch_size=batch_size, shuffle=shuffle)
        return source.order
    return BatchOrder(
        num_samples=source.num_samples,
        batch_size=check_batch_size(batch_size, num_samples=source.num_samples),
        shuffle=shuffle,
        seed=seed,
    )


def _check_loader(order: BatchOrder, *, batch_size: Any, shuffle: bool) -> None:
    """Refuse what a `DataLoader` would not do."""
    own = order.batch_size
    if not isinstance(batch_size, UsualInt) and batch_size != own:
        raise ArgumentError(
            f"train is a DataLoader, whose batches have {own} samples: leave batch_size={batch_size} out, or make the "
            f"DataLoader with batch_size={batch_size}"
        )
    if shuffle is False and order.shuffle:
        raise ArgumentError("train is a DataLoader that shuffles: make it with shuffle=False, and leave shuffle out")


def check_batch_size(batch_size: Any, *, num_samples: int) -> int:
    """Refuse a global batch that is not a positive integer, or larger than the data set."""
    size = check_positive(batch_size, name="batch_size")
    if size > num_samples:
        raise ArgumentError(
            f"batch_size={size} is larger than the data set of {num_samples} samples: use at most {num_samples}"
        )
    return size
