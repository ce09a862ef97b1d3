"""The dispatch of a run: events go to its coordinator, and what that decides is carried out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Literal

from dnb.errors import SpaceError
from dnb.hub.run.engine_links import EngineLinks
from dnb.hub.run.execution.run_coordinator import RunCoordinator
from dnb.hub.run.execution.task_executor import TaskExecutor
from dnb.hub.run.pool_links import PoolLinks
from dnb.hub.run.recorder import RunRecorder
from dnb.hub.run.run_end import RunEnd
from dnb.hub.scheduling import events as machine


class Dispatcher:
    """Hands events to the coordinator until nothing more follows from what it wants.

    Args:
        coordinator: decides.
        pool: the functions by which the run reaches its pool.
        tasks: carries out what concerns shards and steps.
        links: to the engines.
        recorder: of the run.
        ending: of the run.
    """

    def __init__(
        self,
        coordinator: RunCoordinator,
        pool: PoolLinks,
        *,
        tasks: TaskExecutor,
        links: EngineLinks,
        recorder: RunRecorder,
        ending: RunEnd,
    ) -> None:
        self._coordinator = coordinator
        self._pool = pool
        self._tasks = tasks
        self._links = links
        self._recorder = recorder
        self._ending = ending

    def start(self) -> None:
        """Carry out the coordinator's first actions."""
        self._perform_all(self._coordinator.start())

    def dispatch(self, event: machine.Event) -> None:
        """Let the coordinator decide on an event, and on all that follows from it."""
        events: deque[machine.Event] = deque([event])
        while events:
            events.extend(self._perform_all(self._coordinator.handle(events.popleft(), time.monotonic())))

    def forget_engine(self, engine: int, *, exit_state: Literal["dead", "left"]) -> None:
        """Count an engine's time no further, and send it nothing more."""
        self._recorder.stats.leave(engine, exit_state=exit_state)
        self._links.remove(engine)

    def end_search(self, engine: int) -> None:
        """Refuse the step in which this engine was to find a number that is not finite: it will not."""
        if refused := self._tasks.search.give_up(engine):
            self.dispatch(refused)

    def change_to_socket(self, engine: int, reason: str) -> None:
        """Load the run anew on an engine that cannot use shared memory."""
        if self._links.change_to_socket(engine):
            text = f"engine {engine} gets its data over a socket: {reason}"
            self._recorder.add_event(machine.Note("memory", text, engine))
            self._load(engine)

    def _perform_all(self, actions: Iterable[machine.Action]) -> list[machine.Event]:
        return [follow for action in actions if (follow := self._perform(action)) is not None]

    def _perform(self, action: machine.Action) -> machine.Event | None:  # noqa: C901 - the table of actions
        match action:
            case machine.LoadEngine(engine):
                return self._load(engine)
            case machine.Assign():
                return self._tasks.assign(action)
            case machine.Commit("outputs", step, reports):
                return self._tasks.gather(step, reports)
            case machine.Commit(kind, step, reports):
                return self._tasks.commit(kind, step, reports)
            case machine.Release(engine):
                self._let_go(engine)
            case machine.Note():
                self._ending.add_event(action)
            case machine.Disband(team):
                self._links.disband(team)
            case machine.EvictEngine(engine):
                self._pool.evict(engine)
            case machine.Replace(number):
                self._pool.replace(number)
            case machine.End():
                self._ending.begin()
        return None

    def _load(self, engine: int) -> machine.Event | None:
        try:
            self._links.load(engine)
        except SpaceError as error:
            return machine.EngineLost(engine, f"cannot take part: {error}")
        return None

    def _let_go(self, engine: int) -> None:
        self.forget_engine(engine, exit_state="left")
        self._pool.release(engine)
        self.end_search(engine)
