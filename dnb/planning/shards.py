"""Logical data shards: how a global batch is cut, and which engine owns which part."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

# Divisible by 1, 2, 3, 4, 6, 8 and 12 engines, and fine enough for unequal shares: with one engine 4 times slower than
# the others, whole shards leave 97 % (3 engines), 98 % (4) and 91 % (6) of the sum of all speeds; with 12 it was 89, 92
# and 76 %. They cost nothing, as an engine computes all of its shards in one forward.
SHARDS_AT_LEAST = 48
EXACT_SHARDS = 4
# Of a shard that is not empty, where the batch has so many.
SAMPLES_AT_LEAST = 2


def choose_num_shards(num_engines: int, *, batch_size: int) -> int:
    """Return the default number of shards: the first multiple of the engines that is at least 48.

    Never more than samples in a batch.
    """
    multiple = -(-SHARDS_AT_LEAST // num_engines) * num_engines
    return min(multiple, batch_size)


def choose_exact_shards(num_engines: int, *, batch_size: int) -> int:
    """Return the default of an exact run: 4 for up to 4 engines, else the next power of two.

    Each shard is a forward and a gradient of its own, so fewer are faster; and their number must not follow the
    engines, or else the answer would.
    """
    return min(max(EXACT_SHARDS, 1 << (num_engines - 1).bit_length()), batch_size)


def shard_bounds(num_samples: int, *, num_shards: int) -> list[tuple[int, int]]:
    """Cut `num_samples` into contiguous shards, none of which has one sample where the batch has more.

    A layer that looks at more than one sample, as BatchNorm does, fails on a single one or gives NaN. So a batch with
    less than two samples per shard is cut into fewer, and the other shards are empty: a rule of the batch's size alone,
    so that the answer of an exact run does not depend on who computes it. Sizes of those that are not empty differ by
    at most one.

    Returns:
        `num_shards` pairs (first, past the last).
    """
    num_filled = _num_filled(num_samples, num_shards)
    cuts = [filled * num_samples // num_filled for filled in range(num_filled + 1)]
    return list(pairwise(cuts[index * num_filled // num_shards] for index in range(num_shards + 1)))


def first_filled_shard(num_samples: int, *, num_shards: int) -> int:
    """Return the first shard of a batch that is not empty."""
    return -(-num_shards // _num_filled(num_samples, num_shards)) - 1


def split_evenly(number: int, *, num_parts: int) -> list[tuple[int, int]]:
    """Cut `number` things into contiguous parts whose sizes differ by at most one; some may be empty.

    Returns:
        `num_parts` pairs (first, past the last).
    """
    return list(pairwise(index * number // num_parts for index in range(num_parts + 1)))


def deal_shards(shards: Sequence[int], engines: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Give every engine a contiguous part of `shards`; an engine that gets none is left out.

    Args:
        shards: shard ids in order.
        engines: engine ids in order, at least one.
    """
    bounds = split_evenly(len(shards), num_parts=len(engines))
    parts = {engine: tuple(shards[first:last]) for engine, (first, last) in zip(engines, bounds, strict=True)}
    return {engine: part for engine, part in parts.items() if part}


def deal_by_speed(
    shards: Sequence[int], seconds: Mapping[int, float], *, delays: Mapping[int, float] | None = None
) -> dict[int, tuple[int, ...]]:
    """Give every engine a contiguous part of `shards`, so that the last engine is done as early as can be.

    Each shard goes to the engine that would be done with it first. These are D'Hondt's highest averages: no other
    rounding has a shorter longest part (largest remainders may give a slow engine the shard that all others then wait
    for). An engine that would only make the step longer gets none, and is left out.

    Args:
        shards: shard ids in order.
        seconds: per shard, by engine, in order.
        delays: seconds until an engine that is still at work can begin.
    """
    delays = delays or {}
    heap = [(delays.get(engine, 0.0) + cost, cost, engine) for engine, cost in seconds.items()]
    heapq.heapify(heap)
    counts = dict.fromkeys(seconds, 0)
    for _ in shards:
        done, cost, engine = heap[0]
        counts[engine] += 1
        heapq.heapreplace(heap, (done + cost, cost, engine))
    ends = accumulate(counts.values())
    return {
        engine: tuple(shards[end - count : end])
        for (engine, count), end in zip(counts.items(), ends, strict=True)
        if count
    }


def _num_filled(num_samples: int, num_shards: int) -> int:
    return min(num_shards, max(num_samples // SAMPLES_AT_LEAST, 1))
