"""Timelines of single steps of a divided run: the choice of steps, and the newest that all engines have reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from dnb.planning.step_timeline import measured_bubble, span_of
from dnb.protocol.measurements import EngineTimeline, StageTrace, StepTimeline
from dnb.protocol.run import Partition

# Often enough for a view that is painted three times a second.
PERIOD_SECONDS = 0.5
# The first steps are looked at whatever the clock says: a short run shall have more than its first step.
NUM_FIRST = 3
# So many of the last steps that were looked at make the median.
NUM_KEPT = 64


class EngineTrace(NamedTuple):
    """One engine's trace of a step, and its place in the run."""

    trace: StageTrace
    team: int
    rank: int
    partition: Partition
    grown_bytes: int | None  # see `EngineTimeline`


class Timelines:
    """Chooses steps, the same for all engines, and keeps the newest that all have reported.

    Args:
        newest: what the hub before had, if there was one.
    """

    def __init__(self, newest: StepTimeline | None = None) -> None:
        self.newest = newest
        self._wanted = 0
        self._asked_at = float("-inf")
        self._num_asked = 0
        self._past: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)

    def wants(self, step: int, now: float) -> bool:
        """Return whether engines shall report their actions in this step."""
        if step == self._wanted:
            return True
        if self._num_asked >= NUM_FIRST and now - self._asked_at < PERIOD_SECONDS:
            return False
        self._wanted, self._asked_at = step, now
        self._num_asked += 1
        return True

    def newer_than(self, step: int) -> StepTimeline | None:
        """Return the newest timeline to a viewer that has seen this step's; None if there is nothing else."""
        return None if self.newest is None or self.newest.step == step else self.newest

    def build(self, step: int, parts: Mapping[int, EngineTrace]) -> StepTimeline:
        """Build the timeline of a step that all engines have reported."""
        engines = _aligned(parts)
        first = next(iter(parts.values()))
        if self._num_asked == 2 and len(self._past) == 1:
            self._past.clear()  # the very first step has built what the others use
        seconds = max(span_of([each for each in engines if each.team == team]) for team in {e.team for e in engines})
        self._past.append((measured_bubble(engines), seconds))
        self.newest = StepTimeline(
            step=step,
            schedule=first.partition.schedule,
            num_stages=first.partition.num_stages,
            num_micro_batches=first.trace.num_micro_batches,
            engines=engines,
            median_bubble=median(bubble for bubble, _ in self._past),
            median_seconds=median(seconds for _, seconds in self._past),
            num_sampled=len(self._past),
        )
        return self.newest


def _aligned(parts: Mapping[int, EngineTrace]) -> tuple[EngineTimeline, ...]:
    """Sort traces by pipeline and rank, all times from the begin of whoever was first."""
    numbers = {team: number for number, team in enumerate(sorted({part.team for part in parts.values()}))}
    begin = min(part.trace.begin for part in parts.values())
    order = sorted(parts, key=lambda engine: (parts[engine].team, parts[engine].rank))
    return tuple(_timeline_of(engine, parts[engine], team=numbers[parts[engine].team], begin=begin) for engine in order)


def _timeline_of(engine: int, part: EngineTrace, *, team: int, begin: float) -> EngineTimeline:
    return EngineTimeline(
        engine=engine,
        team=team,
        rank=part.rank,
        cpu_seconds=part.trace.cpu_seconds,
        actions=tuple(each._replace(begin=each.begin - begin, end=each.end - begin) for each in part.trace.actions),
        traffic=part.trace.traffic,
        grown_bytes=part.grown_bytes,
    )
