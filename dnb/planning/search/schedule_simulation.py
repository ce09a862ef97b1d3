"""A pipeline's schedule played through: when each stage computes what, on hosts that may have too few cores."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dnb.planning.search.costs import StageCost
from dnb.protocol.run import ScheduleName


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The result of a simulated step: its duration, and the busy time of all stages."""

    seconds: float
    busy_seconds: float  # of all stages together

    def bubble(self, num_stages: int) -> float:
        """Return the share of the stages' time in which they did nothing."""
        return 1.0 - self.busy_seconds / (num_stages * self.seconds)


def actions(schedule: ScheduleName, *, stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[str, int]]:
    """Return one stage's actions in order: ("forward" | "backward", micro-batch).

    GPipe: Huang et al. 2019; 1F1B: Narayanan et al. 2019 (PipeDream-Flush).
    """
    ahead = num_micro_batches if schedule == "gpipe" else min(num_stages - stage - 1, num_micro_batches)
    plan = [("forward", number) for number in range(ahead)]
    for number in range(num_micro_batches - ahead):
        plan += [("forward", ahead + number), ("backward", number)]
    return plan + [("backward", number) for number in range(num_micro_batches - ahead, num_micro_batches)]


def simulate(
    costs: Sequence[StageCost],
    *,
    schedule: ScheduleName,
    num_micro_batches: int,
    hosts: Sequence[Sequence[str]],
    slots: Mapping[str, int],
) -> SimulationResult:
    """Simulate one step of equal pipelines beside each other.

    Args:
        costs: of the stages.
        schedule: of every pipeline.
        num_micro_batches: of every pipeline.
        hosts: for each pipeline, the host of each stage.
        slots: how many stages a host computes at once; a host that is not named, all.
    """
    return _Simulation(costs, schedule, num_micro_batches, hosts, slots).run()


class _Simulation:
    """Stages take the host's slots in the order in which they are ready."""

    def __init__(
        self,
        costs: Sequence[StageCost],
        schedule: ScheduleName,
        num_micro_batches: int,
        hosts: Sequence[Sequence[str]],
        slots: Mapping[str, int],
    ) -> None:
        self._costs = costs
        self._hosts = hosts
        self._free = {host: [0.0] * number for host, number in slots.items()}
        num_stages = len(costs)
        self._plans = [
            actions(schedule, stage=stage, num_stages=num_stages, num_micro_batches=num_micro_batches)
            for stage in range(num_stages)
        ]
        self._next = {(team, stage): 0 for team in range(len(hosts)) for stage in range(num_stages)}
        self._idle_since = dict.fromkeys(self._next, 0.0)
        self._arrived: dict[tuple[int, int, str, int], float] = {}
        self._ready: list[tuple[float, int, int]] = []
        self._queued: set[tuple[int, int]] = set()
        self._end = 0.0

    def run(self) -> SimulationResult:
        """Run to the end of the last backward."""
        for assignment in self._next:
            self._queue_next(assignment)
        busy = 0.0
        while self._ready:
            moment, team, stage = heapq.heappop(self._ready)
            free = self._free.get(self._hosts[team][stage])
            if free and free[0] > moment:  # no core yet: come again when one is free
                heapq.heappush(self._ready, (free[0], team, stage))
                continue
            busy += self._compute(moment, team, stage, free)
        return SimulationResult(self._end, busy / len(self._hosts))

    def _compute(self, moment: float, team: int, stage: int, free: list[float] | None) -> float:
        cost = self._costs[stage]
        what, number = self._plans[stage][self._next[team, stage]]
        seconds = cost.forward_seconds if what == "forward" else cost.backward_seconds
        end = moment + seconds
        if free:
            heapq.heapreplace(free, end)
        self._queued.remove((team, stage))
        self._next[team, stage] += 1
        self._idle_since[team, stage] = end
        self._end = max(self._end, end)
        self._pass_on(team, stage, what, number, end)
        self._queue_next((team, stage))
        return seconds

    def _pass_on(self, team: int, stage: int, what: str, number: int, end: float) -> None:
        if what == "forward" and stage + 1 < len(self._costs):
            neighbour, link = stage + 1, self._costs[stage + 1].link_seconds
        elif what == "backward" and stage > 0:
            neighbour, link = stage - 1, self._costs[stage].link_back_seconds
        else:
            return
        self._arrived[team, neighbour, what, number] = end + link
        self._queue_next((team, neighbour))

    def _queue_next(self, assignment: tuple[int, int]) -> None:
        """Queue a stage's next action if what it needs has come, or is on its way."""
        team, stage = assignment
        position = self._next[assignment]
        if position == len(self._plans[stage]) or assignment in self._queued:
            return
        what, number = self._plans[stage][position]
        is_own = (what == "forward" and stage == 0) or (what == "backward" and stage == len(self._costs) - 1)
        if is_own:
            came: float | None = 0.0
        else:
            came = self._arrived.pop((team, stage, what, number), None)
        if came is not None:
            self._queued.add(assignment)
            heapq.heappush(self._ready, (max(came, self._idle_since[assignment]), team, stage))
