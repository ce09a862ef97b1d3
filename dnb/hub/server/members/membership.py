"""The members of a pool: engines that have joined, that are expected back, that leave, that are dead; without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from dnb.hub.handover import PoolHandover
from dnb.hub.server.members.heartbeats import HeartbeatMonitor
from dnb.hub.server.members.roster import (
    Standing,
    becomes_spare,
    check_known,
    check_retirement,
    choose_successor,
    lacks_workers,
)
from dnb.protocol.pool import EngineFacts, Process
from dnb.transport.system.processes import Activity

# How often an engine is asked to join again that does not.
ASK_SECONDS = 1.0
# How long an engine that left its pool may take to end; then it is killed.
LEAVE_SECONDS = 5.0


@dataclass(slots=True)
class PoolEngine:
    """An engine that has joined this hub."""

    facts: EngineFacts
    identity: bytes  # of its socket
    messages_in: int = 0
    messages_out: int = 0
    num_wires: int = 0  # that it had lost when it joined
    is_spare: bool = False  # loads the run and rests
    is_retiring: bool = False  # leaves as soon as it owes the run nothing
    slowdown: float = 1.0  # on purpose: computes so many times as long


@dataclass(slots=True)
class ExpectedEngine:
    """An engine of the hub before that is not back yet."""

    is_spare: bool
    is_retiring: bool


class Membership:
    """The engines of one pool; the times are passed in.

    Args:
        poll: looks at the process of an engine whose heartbeats are missing; None if it cannot.
    """

    def __init__(self, *, poll: Callable[[Process], Activity | None]) -> None:
        self.engines: dict[int, PoolEngine] = {}
        self.returning: dict[int, EngineFacts] = {}  # engines of the hub before
        self.heartbeats = HeartbeatMonitor(poll=partial(self._poll_process, poll))
        self.dead: set[int] = set()
        self.killed: set[Process] = set()  # on purpose
        self.leavers: dict[Process, float] = {}  # told to end; when they are killed
        self.helpers: set[Process] = set()  # processes beside the engines that end with the pool
        self.wanted_spares = 0
        self.num_owed = 0  # engines that a run's work has ended, and that nobody has replaced yet
        self.num_threads = 0  # of the engine that joined last
        self.changed = False  # since the next hub could last read it
        self.has_other_engines = False  # since other kernels could last read it
        self._spares: frozenset[int] = frozenset()  # among those that return
        self._leaving: frozenset[int] = frozenset()  # among those that return: they were asked to leave
        self._asked: dict[int, float] = {}  # to join again; when they may be asked once more

    def restore(self, handover: PoolHandover) -> None:
        """Expect the engines of the hub before."""
        self.returning = {facts.engine: facts for facts in handover.engines}
        self._spares = frozenset(handover.spares)
        self._leaving = frozenset(handover.leaving)
        self.wanted_spares = handover.wanted_spares
        self.dead = set(handover.dead)
        self.num_owed = handover.num_owed
        self.helpers = set(handover.helpers)

    def _poll_process(self, poll: Callable[[Process], Activity | None], number: int) -> Activity | None:
        engine = self.engines.get(number)
        return None if engine is None else poll(engine.facts.process)

    # who is there

    @property
    def facts(self) -> list[EngineFacts]:
        """The engines that have joined."""
        return [engine.facts for engine in self.engines.values()]

    @property
    def workers(self) -> tuple[int, ...]:
        """The engines that have joined and neither rest nor leave."""
        return self._select(is_spare=False)

    @property
    def spares(self) -> tuple[int, ...]:
        """The spares that have joined and do not leave."""
        return self._select(is_spare=True)

    def _select(self, *, is_spare: bool) -> tuple[int, ...]:
        return tuple(
            number
            for number, engine in sorted(self.engines.items())
            if engine.is_spare is is_spare and not engine.is_retiring
        )

    @property
    def retiring(self) -> tuple[int, ...]:
        """The engines that have joined and leave as soon as they owe the run nothing."""
        return tuple(number for number, engine in self.engines.items() if engine.is_retiring)

    @property
    def all_spares(self) -> tuple[int, ...]:
        """All spares: those that are expected back, and those that have joined."""
        joined = (number for number, engine in self.engines.items() if engine.is_spare)
        return (*(self._spares & self.returning.keys()), *joined)

    @property
    def leaving(self) -> tuple[int, ...]:
        """Those among the engines that are expected back that are to leave."""
        return tuple(self._leaving & self.returning.keys())

    def find(self, identity: bytes) -> int | None:
        """Return the engine of a socket; None: it was given up."""
        return next((number for number, engine in self.engines.items() if engine.identity == identity), None)

    def others_than(self, number: int) -> list[tuple[int, Process]]:
        """Return the processes of all engines but one."""
        return [(other, engine.facts.process) for other, engine in self.engines.items() if other != number]

    # who comes

    def has_joined(self, facts: EngineFacts, *, num_wires: int) -> bool:
        """Return whether an engine is in already: it asks by itself, and is asked to."""
        known = self.engines.get(facts.engine)
        return known is not None and known.facts.process == facts.process and known.num_wires == num_wires

    def join(self, facts: EngineFacts, identity: bytes, *, num_wires: int, now: float) -> bool:
        """Let an engine in, as a spare or to work; return whether it is to leave at once."""
        number = facts.engine
        others = [engine for other, engine in self.engines.items() if other != number]
        is_back = self.returning.pop(number, None) is not None
        is_spare = number in self._spares if is_back else becomes_spare(others, wanted=self.wanted_spares)
        if not is_back and number not in self.engines and number not in self.dead:
            self.num_owed = max(self.num_owed - 1, 0)
        self.engines[number] = PoolEngine(facts, identity, num_wires=num_wires, is_spare=is_spare)
        self.dead.discard(number)  # it had only lost its connection, or stood still
        self.num_threads = facts.cores
        self.heartbeats.begin(number, now)
        self._note_engines()
        return is_back and number in self._leaving

    def may_ask(self, number: int, process: Process, *, now: float) -> bool:
        """Return whether an engine that is not in may be asked to join again: not one that leaves, nor all the time."""
        return process not in self.leavers and now >= self._asked.get(number, 0.0)

    def note_asked(self, number: int, *, now: float) -> None:
        """Remember that an engine was asked to join again."""
        self._asked[number] = now + ASK_SECONDS

    def choose_spare(self) -> int | None:
        """Let a spare work, and return it; None: there is none."""
        number = choose_successor(self.engines)
        if number is not None:
            self.engines[number].is_spare = False
        return number

    def keep_spares(self, number: int) -> None:
        """Let newcomers rest until there are so many spares."""
        self.wanted_spares = number
        self.changed = True

    def owe(self, number: int) -> None:
        """Note how many engines have ended at a run's work: the pool is filled up again, so that the run can go on."""
        self.num_owed = min(self.num_owed + number, len(self.dead))
        self.changed = True

    # who goes

    def lose(self, number: int) -> PoolEngine | None:
        """Forget an engine that is gone, and return it; None: it was not in."""
        lost = self.engines.pop(number, None)
        self.heartbeats.drop(number)
        self._note_engines()
        if lost is not None:
            self.dead.add(number)
        return lost

    def miss(self, number: int) -> bool:
        """Expect an engine of the hub before no more; return whether a spare is to work in its place."""
        del self.returning[number]
        self.dead.add(number)
        return number not in self._spares

    def expect_one_spare_less(self) -> None:
        """Let one of the spares that are still to come work."""
        self._spares = frozenset(sorted(self._spares)[1:])

    def retire(self, asked: Iterable[int], *, active_run: str | None, force: bool) -> list[int]:
        """Let engines leave: return those that are there, the others leave as soon as they are back.

        Args:
            asked: their ids.
            active_run: its name; None if no run is active.
            force: let the last one leave, too.

        Raises:
            ArgumentError: with the known engines, or with what would happen.
        """
        expected = {
            number: ExpectedEngine(is_spare=number in self._spares, is_retiring=number in self._leaving)
            for number in self.returning
        }
        known: Mapping[int, Standing] = {**expected, **self.engines}
        leaving = check_retirement(asked, known, active_run=active_run, force=force)
        self._leaving |= expected.keys() & set(leaving)
        self.changed = True
        return [number for number in leaving if number in self.engines]

    def start_leaving(self, leaving: Iterable[int]) -> bool:
        """Mark engines that leave; return whether nobody works any more."""
        for number in leaving:
            self.engines[number].is_retiring = self.changed = True
        return lacks_workers(self.engines)

    def release(self, number: int, *, now: float) -> None:
        """Forget an engine that was told to end; until it has, it belongs to the pool."""
        engine = self.engines.pop(number, None)
        self.heartbeats.drop(number)
        if engine is not None:
            self.leavers[engine.facts.process] = now + LEAVE_SECONDS
            self.helpers.add(engine.facts.process)
            self._note_engines()

    def check_known(self, number: int) -> PoolEngine:
        """Return an engine that has joined.

        Raises:
            ArgumentError: with those that have.
        """
        check_known([number], self.engines)
        return self.engines[number]

    def _note_engines(self) -> None:
        self.changed = self.has_other_engines = True
