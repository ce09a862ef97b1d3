"""The leases that are not answered yet, the shards dealt to each engine, and the leases that are late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from dnb.hub.scheduling.events import Assign, WorkDone
from dnb.hub.scheduling.speeds import Speeds
from dnb.planning.shards import deal_by_speed, deal_shards
from dnb.protocol.measurements import WorkKind

# A lease is late after so many times what its engine should take, and not before so many seconds.
LATE_RATIO, LATE_SECONDS = 3.0, 0.25


@dataclass(slots=True)
class Lease:
    """Shards that an engine was given and has not answered yet."""

    number: int
    engine: int
    kind: WorkKind
    step: int
    shards: tuple[int, ...]
    since: float
    in_extra_slab: bool  # in a slab besides the engine's own
    root: int  # the number of the lease that this one is to overtake; its own if it is none
    is_open: bool = True  # else the shards were given to others, and the answer will be refused
    was_silent: bool = False  # so that its time says nothing about its engine's speed


class Leases:
    """The unanswered leases of a run, one per engine at most, and the speeds that answers have shown.

    Args:
        num_shards: of every task.
        first: the leases' numbers are above that.
    """

    def __init__(self, num_shards: int, *, first: int = 0) -> None:
        self.now = 0.0
        self.by_engine: dict[int, Lease] = {}
        self._count = first
        self._all_shards = tuple(range(num_shards))
        self._speeds: dict[WorkKind, Speeds] = {kind: Speeds(num_shards) for kind in get_args(WorkKind)}
        self._equal: tuple[tuple[int, ...], dict[int, tuple[int, ...]]] = (), {}  # engines and their parts

    @property
    def open(self) -> list[Lease]:
        """Those whose answer will count."""
        return [lease for lease in self.by_engine.values() if lease.is_open]

    def issue(
        self,
        engine: int,
        kind: WorkKind,
        step: int,
        shards: tuple[int, ...],
        *,
        fresh: bool,
        in_extra_slab: bool = False,
        root: int | None = None,
    ) -> Assign:
        """Give an engine that has answered everything a new lease."""
        self._count = number = self._count + 1
        root = number if root is None else root
        self.by_engine[engine] = Lease(number, engine, kind, step, shards, self.now, in_extra_slab, root)
        return Assign(engine, kind, step, shards, fresh, number, in_extra_slab)

    def behind(self, report: WorkDone) -> Lease | None:
        """Return the lease that is answered, if the answer fits one that this engine holds."""
        lease = self.by_engine.get(report.engine)
        if lease is None or lease.number != report.lease:
            return None
        fits = (lease.kind, lease.step, lease.shards) == (report.kind, report.step, report.shards)
        return lease if fits else None

    def close(self, lease: Lease, *, num_samples: int | None) -> None:
        """Close a lease that is answered; its time counts."""
        del self.by_engine[lease.engine]
        if not lease.was_silent:
            self._speeds[lease.kind].add(
                lease.engine, seconds=self.now - lease.since, num_shards=len(lease.shards), num_samples=num_samples
            )

    def drop(self, engine: int) -> Lease | None:
        """Forget an engine that is gone; return the lease that it held."""
        for speeds in self._speeds.values():
            speeds.forget(engine)
        return self.by_engine.pop(engine, None)

    def deal(self, kind: WorkKind, engines: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Deal all shards of a task that begins to engines that are free."""
        costs = self._speeds[kind].plan(engines)
        if costs is not None:
            return deal_by_speed(self._all_shards, costs)
        key = tuple(engines)
        if self._equal[0] != key:
            self._equal = key, deal_shards(self._all_shards, engines)
        return self._equal[1]

    def deal_left(
        self, kind: WorkKind, covered: set[int], engines: Sequence[int]
    ) -> tuple[bool, dict[int, tuple[int, ...]]]:
        """Deal the shards that nobody has in the midst of a task; return True first if there are any.

        Args:
            kind: of the task.
            covered: shards that are reported.
            engines: those who are free, or will be when they have answered.
        """
        covered.update(shard for lease in self.open for shard in lease.shards)
        left = [shard for shard in self._all_shards if shard not in covered]
        if not left or not engines:
            return bool(left), {}
        speeds = self._speeds[kind]
        costs = speeds.costs(engines)
        if costs is None:
            mean = sum(speeds.expect(engine, 1) or 0.0 for engine in engines) / len(engines)
            if not mean:
                return True, deal_shards(left, engines)
            costs = dict.fromkeys(engines, mean)
        delays = {engine: self._seconds_left(self.by_engine[engine]) for engine in engines if engine in self.by_engine}
        return True, deal_by_speed(left, costs, delays=delays)

    def is_late(self, lease: Lease) -> bool:
        """Return True if a lease takes far longer than it should."""
        expected = self._expected(lease)
        return expected is not None and self.now - lease.since > max(LATE_RATIO * expected, LATE_SECONDS)

    def may_be_late(self, lease: Lease) -> bool:
        """Return True if it is known at all how long a lease should take."""
        return self._expected(lease) is not None

    def _seconds_left(self, lease: Lease) -> float:
        return max(lease.since + (self._expected(lease) or 0.0) - self.now, 0.0)

    def _expected(self, lease: Lease) -> float | None:
        return self._speeds[lease.kind].expect(lease.engine, len(lease.shards))
