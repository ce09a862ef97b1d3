"""Cuts: the exact division of a chain of layers into stages, by a dynamic programme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf, nextafter, prod

import numpy as np
from numpy.typing import NDArray

from dnb.planning.search.costs import Workload, num_in_flight
from dnb.planning.search.profiles import Exchange
from dnb.protocol.run import ScheduleName

# So many ways to take engines of different kinds are tried; beyond, the two most alike count as one kind.
MOST_WAYS = 512

Matrix = NDArray[np.float64]
Used = tuple[int, ...]  # engines taken, by kind


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """An engine, or the slowest and smallest of several that have the same stage in different teams."""

    speed: float
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class StageCuts:
    """A chain of layers cut into stages, each with a place."""

    cuts: tuple[int, ...]  # first layers of stages 1, 2, ...
    places: tuple[int, ...]  # of each stage: an index of the places
    seconds: float


@dataclass(frozen=True, slots=True)
class _BestPath:
    path: float
    paces: tuple[float, float]
    firsts: tuple[int, ...]  # first layers of all stages
    kinds: tuple[int, ...]


class CutSearch:
    """Divides one workload, for one schedule and number of micro-batches.

    Exact for `costs.pipeline_seconds`, which is the way of one micro-batch plus a pace for each further one. The
    shortest way with no stage slower than some pace is a dynamic programme over the layers, from the last one on, so
    that a stage knows how many are behind it, and with that how many micro-batches it holds. Walking down the paces
    finds the best of both.

    Args:
        load: at the size of one micro-batch.
        places: that may be taken, each once, in any order.
        schedule: of the pipeline.
        num_micro_batches: of a step.
        exchange: of the site.
    """

    def __init__(
        self,
        load: Workload,
        *,
        places: Sequence[EnginePlace],
        schedule: ScheduleName,
        num_micro_batches: int,
        exchange: Exchange,
    ) -> None:
        self._load = load
        self._schedule: ScheduleName = schedule
        self._num_micro_batches = num_micro_batches
        self._further = num_micro_batches - 1
        kinds = _kinds(places)
        self._members = [members for _, members in kinds]
        self._limits = tuple(len(members) for members in self._members)
        self._memory = [kind.memory_bytes for kind, _ in kinds]
        self._state, self._activations, self._coming_back = _memory_matrices(load)
        self._rooms: dict[tuple[int | None, int], Matrix] = {}
        timed = [_times(load, kind.speed, exchange, schedule) for kind, _ in kinds]
        self._paths = [path for path, _, _ in timed]
        self._paces = [(first, second) for _, first, second in timed]

    def bounds(self, most_stages: int) -> list[float]:
        """Return the seconds that no division into 1, 2, ... stages can beat; infinite where nothing fits."""
        paths = self._tables(self._paths, most_stages)
        least = np.array([_least(table) for table in paths[1:]])
        if self._further:
            for phase in (0, 1) if self._schedule == "gpipe" else (0,):
                slowest = self._tables([pace[phase] for pace in self._paces], most_stages, np.maximum)
                least += self._further * np.array([_least(table) for table in slowest[1:]])
        return [float(seconds) for seconds in least]

    def divide(self, num_stages: int) -> StageCuts | None:
        """Find the fastest division into exactly so many stages, or None if none fits."""
        best = self._walk(num_stages, (inf, inf))
        if best is None:
            return None
        if self._schedule == "gpipe" and self._further:
            # The second phase was walked down for any first; now those with a faster first one.
            least = self._shortest(num_stages, (inf, inf))
            assert least is not None
            found: _BestPath | None = best
            while found is not None:
                room = (self._seconds(best) - least.path) / self._further
                found = self._walk(num_stages, (min(_below(found.paces[0]), room), inf))
                if found is not None and self._seconds(found) < self._seconds(best):
                    best = found
        return StageCuts(best.firsts[1:], self._places(best), self._seconds(best))

    def _seconds(self, found: _BestPath) -> float:
        return found.path + self._further * sum(found.paces)

    def _walk(self, num_stages: int, limits: tuple[float, float]) -> _BestPath | None:
        """Find the best division by path and one pace, the other no more than its limit."""
        phase = 1 if self._schedule == "gpipe" else 0
        best = self._shortest(num_stages, limits)
        if best is None or not self._further:
            return best
        smoothest = self._smoothest(num_stages, limits, phase=phase)
        found: _BestPath | None = best

        def rank(one: _BestPath) -> float:
            return one.path + self._further * one.paces[phase]

        best = min(best, smoothest, key=rank)
        while found is not None:
            # Ways grow as paces fall: a pace beyond this cannot be better any more.
            room = (rank(best) - found.path) / self._further
            limit = min(_below(found.paces[phase]), room)
            if limit < smoothest.paces[phase]:
                break
            found = self._shortest(num_stages, (limit, limits[1]) if phase == 0 else (limits[0], limit))
            if found is not None and rank(found) < rank(best):
                best = found
        return best

    def _smoothest(self, num_stages: int, limits: tuple[float, float], *, phase: int) -> _BestPath:
        """Find the shortest path among the divisions with the least pace."""
        matrices = [np.where(self._allowed(kind, limits), pace[phase], inf) for kind, pace in enumerate(self._paces)]
        pace = _least(self._tables(matrices, num_stages, np.maximum)[num_stages])
        found = self._shortest(num_stages, (pace, limits[1]) if phase == 0 else (limits[0], pace))
        assert found is not None
        return found

    def _shortest(self, num_stages: int, limits: tuple[float, float]) -> _BestPath | None:
        """Find the division with the shortest path whose paces are within limits."""
        matrices = [np.where(self._allowed(kind, limits), path, inf) for kind, path in enumerate(self._paths)]
        tables = self._tables(matrices, num_stages)
        used = min(tables[num_stages], key=lambda used: float(tables[num_stages][used][0]), default=None)
        if used is None or tables[num_stages][used][0] == inf:
            return None
        firsts, kinds, paces, first = [], [], (0.0, 0.0), 0
        for behind in range(num_stages - 1, -1, -1):
            kind, last = self._step(matrices, tables[behind], used, first, behind)
            firsts.append(first)
            kinds.append(kind)
            one, two = self._paces[kind]
            paces = max(paces[0], float(one[first, last])), max(paces[1], float(two[first, last]))
            used, first = _with(used, kind, -1), last
        path = min(float(table[0]) for table in tables[num_stages].values())
        return _BestPath(path, paces, tuple(firsts), tuple(kinds))

    def _step(
        self, matrices: Sequence[Matrix], tails: dict[Used, Matrix], used: Used, first: int, behind: int
    ) -> tuple[int, int]:
        """Return the kind and the last layer of the next stage on the shortest path."""
        options = []
        for kind, matrix in enumerate(matrices):
            before = _with(used, kind, -1)
            if before in tails:
                row = matrix[first] + self._room(kind, behind)[first] + tails[before]
                options.append((float(row.min()), kind, int(row.argmin())))
        _, kind, last = min(options)
        return kind, last

    def _tables(
        self, matrices: Sequence[Matrix], most_stages: int, combine: np.ufunc = np.add
    ) -> list[dict[Used, Matrix]]:
        """Return, for 0, 1, ... stages and the kinds they take, the least cost from each layer to the end."""
        end = np.full(self._load.num_layers + 1, inf)
        end[-1] = 0.0
        tables: list[dict[Used, Matrix]] = [{(0,) * len(self._limits): end}]
        for behind in range(most_stages):
            open_matrices = [matrix + self._room(kind, behind) for kind, matrix in enumerate(matrices)]
            grown: dict[Used, Matrix] = {}
            for used, tail in tables[-1].items():
                for kind, matrix in enumerate(open_matrices):
                    now = _with(used, kind, 1)
                    if now[kind] <= self._limits[kind]:
                        least = combine(matrix, tail).min(axis=1)
                        grown[now] = np.minimum(grown[now], least) if now in grown else least
            tables.append(grown)
        return tables

    def _allowed(self, kind: int, limits: tuple[float, float]) -> NDArray[np.bool_]:
        one, two = self._paces[kind]
        return (one <= limits[0]) & (two <= limits[1])

    def _room(self, kind: int, behind: int) -> Matrix:
        """Return a matrix that is 0 where a stage fits in memory, and infinite where it does not."""
        limit = self._memory[kind]
        held = num_in_flight(self._schedule, num_behind=behind, num_micro_batches=self._num_micro_batches)
        if (limit, held) not in self._rooms:
            needed = self._state + held * self._activations + self._coming_back
            self._rooms[limit, held] = np.where(needed <= (inf if limit is None else limit), 0.0, inf)
        return self._rooms[limit, held]

    def _places(self, found: _BestPath) -> tuple[int, ...]:
        free = [iter(members) for members in self._members]
        return tuple(next(free[kind]) for kind in found.kinds)


def _kinds(places: Sequence[EnginePlace]) -> list[tuple[EnginePlace, list[int]]]:
    """Group equal places; where there are too many kinds, the most alike become one, as slow and as small."""
    members: dict[EnginePlace, list[int]] = {}
    for index, place in enumerate(places):
        members.setdefault(place, []).append(index)
    kinds = sorted(members.items(), key=lambda kind: (kind[0].speed, kind[0].memory_bytes or inf))
    while prod(len(indices) + 1 for _, indices in kinds) > MOST_WAYS and len(kinds) > 1:
        number = min(range(len(kinds) - 1), key=lambda n: kinds[n + 1][0].speed / kinds[n][0].speed)
        (slow, first), (fast, second) = kinds[number : number + 2]
        limits = [limit for limit in (slow.memory_bytes, fast.memory_bytes) if limit is not None]
        kinds[number : number + 2] = [(EnginePlace(slow.speed, min(limits, default=None)), first + second)]
    return kinds


def _times(load: Workload, speed: float, exchange: Exchange, schedule: ScheduleName) -> tuple[Matrix, Matrix, Matrix]:
    """Return path and paces of every stage, by its first layer and the one behind its last; as `costs.stage_cost`."""
    num_layers = load.num_layers
    edges = range(num_layers + 1)
    forward = _spans([load.forward_seconds(0, edge) for edge in edges]) / speed + exchange.action_seconds
    backward = _spans([load.backward_seconds(0, edge) for edge in edges]) / speed + exchange.action_seconds
    there, back = (
        np.array([0.0, *(exchange.latency_seconds + size / exchange.bytes_per_second for size in sizes[1:]), 0.0])[
            :, None
        ]
        for sizes in (load.cut_bytes, load.cut_gradient_bytes)
    )
    path = forward + backward + there + back
    if schedule == "gpipe":
        return path, np.maximum(forward, there), np.maximum(backward, back)
    return path, np.maximum(forward + backward, there + back), np.where(np.isinf(path), inf, 0.0)


def _memory_matrices(load: Workload) -> tuple[Matrix, Matrix, Matrix]:
    """Return the bytes of state, of one micro-batch's activations, and of gradients sent back, of every stage."""
    num_layers = load.num_layers
    state = np.full((num_layers + 1, num_layers + 1), inf)
    activations = np.full_like(state, inf)
    for first, last in _stages(num_layers):
        state[first, last] = load.state_bytes(first, last)
        activations[first, last] = load.activation_bytes(first, last)
    return state, activations, np.array([*load.cut_gradient_bytes, 0.0])[None, :]


def _stages(num_layers: int) -> Iterator[tuple[int, int]]:
    return ((first, last) for first, last in product(range(num_layers), range(1, num_layers + 1)) if first < last)


def _spans(sums: Sequence[float]) -> Matrix:
    """Return the differences of the sums between every two edges; infinite where the span is empty."""
    edges = np.array(sums)
    spans: Matrix = edges[None, :] - edges[:, None]
    spans[np.tril_indices(len(edges))] = inf
    return spans


def _least(tables: dict[Used, Matrix]) -> float:
    return min((float(table[0]) for table in tables.values()), default=inf)


def _with(used: Used, kind: int, change: int) -> Used:
    return (*used[:kind], used[kind] + change, *used[kind + 1 :])


def _below(value: float) -> float:
    return nextafter(value, -inf)


def edges_of(cuts: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Return the first layer, and the one behind the last, of each stage."""
    return list(pairwise([0, *cuts, num_layers]))
