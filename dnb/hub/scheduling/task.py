"""A step or an evaluation under way: what is reported, and what lies in whose slab."""

from __future__ import annotations

from dataclasses import dataclass, field

from dnb.hub.scheduling.leases import Lease
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import Failure


@dataclass(frozen=True, slots=True)
class ReportedShards:
    """Reported shards."""

    engine: int
    shards: tuple[int, ...]
    in_extra_slab: bool


@dataclass(frozen=True, slots=True)
class Death:
    """An engine that ended while it computed, by nobody's known hand."""

    engine: int
    reason: str
    shards: frozenset[int]  # it was at, and nobody has reported


@dataclass(slots=True)
class Task:
    """A step or an evaluation: every shard is in an open lease, is reported once, or waits for somebody to be free."""

    kind: WorkKind
    step: int
    parts: list[ReportedShards] = field(default_factory=list)
    num_done: int = 0  # shards of all parts
    touched: set[int] = field(default_factory=set)  # engines whose own slab holds something of this task
    has_gaps: bool = False  # some shards may be neither leased nor reported
    has_rivals: bool = False  # some shards may be leased twice
    failures: list[tuple[int, Failure]] = field(default_factory=list)  # of user code, with the engine
    failed_at: float = 0.0
    without_extra_slab: set[int] = field(default_factory=set)  # engines that cannot have another slab
    deaths: list[Death] = field(default_factory=list)
    num_taken: dict[int, int] = field(default_factory=dict)  # how often a silent engine's lease was taken from it

    def add(self, lease: Lease) -> None:
        """Count a lease as done."""
        self.parts.append(ReportedShards(lease.engine, lease.shards, lease.in_extra_slab))
        self.num_done += len(lease.shards)

    def invalidate(self, engine: int) -> int:
        """Give up an engine's slab, which is not what it reported any more; return how many shards are to be redone."""
        self.touched.discard(engine)
        torn = sum(len(part.shards) for part in self.parts if part.engine == engine)
        if torn:
            self.parts = [part for part in self.parts if part.engine != engine]
            self.num_done -= torn
            self.has_gaps = True
        return torn

    def shards_of(self, engine: int) -> set[int]:
        """Return the shards that an engine has reported, which are redone if its own slab is torn."""
        return {shard for part in self.parts if part.engine == engine for shard in part.shards}

    def forget_engine(self, lease: Lease, engine: int, reason: str) -> list[Death]:
        """Note an engine's death at its work; return all deaths at shards at which others had died before."""
        done = {shard for part in self.parts for shard in part.shards}
        death = Death(engine, reason, frozenset(lease.shards) - done)
        before = next((each for each in reversed(self.deaths) if each.shards & death.shards), None)
        self.deaths.append(death)
        return [] if before is None else [before, death]

    def can_redo(self, engine: int) -> bool:
        """Return True if there is a slab for an attempt that may fail: its own if that is empty, or one more."""
        if engine not in self.touched:
            return True
        return engine not in self.without_extra_slab and not any(
            part.engine == engine and part.in_extra_slab for part in self.parts
        )

    @property
    def reports(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(engine, shards) of every part, in order."""
        return tuple(sorted((part.engine, part.shards) for part in self.parts))
