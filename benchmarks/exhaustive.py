"""Every division there is, by the same cost model: what the dynamic programme is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

from dnb.planning.search.costs import Workload, pipeline_seconds, stage_cost
from dnb.planning.search.cut_search import EnginePlace, edges_of
from dnb.planning.search.profiles import Exchange
from dnb.protocol.run import ScheduleName


def divisions(
    load: Workload,
    *,
    places: Sequence[EnginePlace],
    num_stages: int,
    schedule: ScheduleName,
    num_micro_batches: int,
    exchange: Exchange,
) -> Iterator[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """Seconds, cuts and places of all divisions that fit."""
    for cuts in combinations(range(1, load.num_layers), num_stages - 1):
        edges = edges_of(cuts, load.num_layers)
        for chosen in _orders(places, num_stages):
            costs = [
                stage_cost(
                    load,
                    *edges[rank],
                    speed=places[place].speed,
                    exchange=exchange,
                    schedule=schedule,
                    num_behind=num_stages - rank - 1,
                    num_micro_batches=num_micro_batches,
                )
                for rank, place in enumerate(chosen)
            ]
            limits = [places[place].memory_bytes for place in chosen]
            if all(limit is None or cost.memory_bytes <= limit for cost, limit in zip(costs, limits, strict=True)):
                seconds = pipeline_seconds(costs, schedule=schedule, num_micro_batches=num_micro_batches)
                yield seconds, cuts, chosen


def _orders(places: Sequence[EnginePlace], num_stages: int) -> Iterator[tuple[int, ...]]:
    """Ways to choose places for the stages; equal places are one."""
    seen = set()
    for chosen in permutations(range(len(places)), num_stages):
        kinds = tuple(places[place] for place in chosen)
        if kinds not in seen:
            seen.add(kinds)
            yield chosen
