"""The coordinator of a run, as the run sees it: one of engines, or one of teams of engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from dnb.hub.run.execution.gathered_batch import gathers_outputs
from dnb.hub.run.initial_state import InitialState
from dnb.hub.scheduling.coordinator import Coordinator
from dnb.hub.scheduling.events import Action, Event, WorkDone
from dnb.hub.scheduling.team_formation import FIRST_TEAM
from dnb.hub.scheduling.teams import Teams
from dnb.protocol.measurements import WorkKind
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import Partition, RunSpec, RunStatus


class RunCoordinator(Protocol):
    """Decisions about one run, whether its engines compute alone or in teams: events in, actions out."""

    @property
    def status(self) -> RunStatus:
        """The status of the run."""

    @property
    def step(self) -> int:
        """The last step that was committed."""

    @property
    def evaluated(self) -> int:
        """The last step after which an evaluation was committed."""

    @property
    def error(self) -> str:
        """The reason why the run is paused or has failed, for people."""

    @property
    def traceback(self) -> str:
        """The traceback of what is in `error`."""

    @property
    def last_word(self) -> str:
        """The way in which the run has ended, for people."""

    @property
    def working(self) -> frozenset[int]:
        """The engines that compute, even if their answer will be refused."""

    @property
    def spares(self) -> frozenset[int]:
        """The engines that get no work."""

    def assignment_of(self, engine: int) -> tuple[int, int, Partition] | None:
        """Return team, rank and partition of an engine; None if it is in no team."""

    def owner_of(self, engine: int) -> int:
        """Return the engine whose slab an engine writes into."""

    def expects(self, report: WorkDone) -> bool:
        """Return whether a report answers an open lease, so that it will count."""

    def start(self) -> list[Action]:
        """Return the first actions."""

    def handle(self, event: Event, now: float | None = None) -> list[Action]:
        """Take one event, change state, and return what is to be done."""


def make_coordinator(
    spec: RunSpec,
    initial_state: InitialState,
    *,
    engines: Iterable[EngineFacts],
    generation: int,
    name_samples: Callable[[WorkKind, int, Sequence[int]], str],
) -> RunCoordinator:
    """Make the coordinator of a run: of teams where the model is divided, else of engines.

    Args:
        spec: the run's numbers.
        initial_state: how far it has come.
        engines: those that take part from the start; of a run that was taken over, those that are to join again.
        generation: how many hubs the pool had before this one.
        name_samples: of some shards of the task under way, for people.
    """
    numbers = [facts.engine for facts in engines]
    present, returning = ([], numbers) if initial_state.is_taken_over else (numbers, [])

    def make(engines: Iterable[int], returning: Iterable[int] = ()) -> Coordinator:
        return Coordinator(
            num_steps=spec.num_steps,
            num_shards=spec.num_shards,
            evaluate_every=spec.steps_per_epoch if spec.num_val_samples else None,
            engines=engines,
            step=initial_state.step,
            evaluated=initial_state.evaluated,
            returning=returning,
            status=initial_state.status,
            error=initial_state.error,
            traceback=initial_state.traceback,
            generation=generation,
            name_samples=name_samples,
            gathers=gathers_outputs(spec),
        )

    if not spec.partitions:
        return make(present, returning)
    return Teams(
        make,
        partitions={partition.num_engines: partition for partition in spec.partitions},
        size=spec.team_size,
        engines=present,
        returning=returning,
        first=FIRST_TEAM * (generation + 1),
    )
