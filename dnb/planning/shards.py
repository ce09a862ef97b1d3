"""Logical data shards: how a global batch is cut, and which engine owns which part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

# Divisible by 1, 2, 3, 4, 6 and 12 engines, and fine enough that the shards of a dead engine spread evenly.
SHARDS_AT_LEAST = 12
EXACT_SHARDS = 4


def choose_num_shards(num_engines: int, *, batch_size: int) -> int:
    """The default number of shards: the first multiple of the engines that is at least 12.

    Never more than samples in a batch.
    """
    multiple = -(-SHARDS_AT_LEAST // num_engines) * num_engines
    return min(multiple, batch_size)


def choose_exact_shards(num_engines: int, *, batch_size: int) -> int:
    """The default of an exact run: 4 for up to 4 engines, else the next power of two.

    Each shard is a forward and a gradient of its own, so fewer are faster; and their number must not follow the
    engines, or else the answer would.
    """
    return min(max(EXACT_SHARDS, 1 << (num_engines - 1).bit_length()), batch_size)


def shard_bounds(num_samples: int, *, num_shards: int) -> list[tuple[int, int]]:
    """Cut `num_samples` into contiguous shards whose sizes differ by at most one; some may be empty.

    Returns:
        `num_shards` pairs (first, past the last).
    """
    edges = [index * num_samples // num_shards for index in range(num_shards + 1)]
    return list(pairwise(edges))


def deal_shards(shards: Sequence[int], engines: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Give every engine a contiguous part of `shards`; an engine that gets none is left out.

    Args:
        shards: shard ids in order.
        engines: engine ids in order, at least one.
    """
    bounds = shard_bounds(len(shards), num_shards=len(engines))
    parts = {engine: tuple(shards[first:last]) for engine, (first, last) in zip(engines, bounds, strict=True)}
    return {engine: part for engine, part in parts.items() if part}
