"""Engines that compute together: to the coordinator a team is one engine, which leases shards and answers for all.

Sans I/O, as the coordinator is, and between it and what happens to engines. Engines are *free* until there are enough
for a team; a team is formed once and never changed. When one of its engines is gone, or its process group is broken,
another team takes its place: its engines get new *seats*, and the coordinator hears that the new team has joined
before it hears that the old one is lost, so a run whose only team is replaced goes on.

    free --enough--> seated --all have loaded--> at work --one died, hung, failed, left--> the others: free
                                                    |
                                                    +-- every member has reported --> one report to the coordinator

A member that hangs holds up all others, in a call that nothing but the end of a peer ends: after a while it is
*condemned*, which means killed. One that is at work is waited for, whether it can beat or not; to the coordinator a
team is busy if a member is. An answer counts if it comes from a member of a team that is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from dnb.hub.scheduling.coordinator import START_SECONDS, Coordinator
from dnb.hub.scheduling.events import (
    Action,
    ActivateSpare,
    Assign,
    Commit,
    CommitDeferred,
    CommitFailed,
    CommitRefused,
    Committed,
    Disband,
    End,
    EngineBusy,
    EngineEnding,
    EngineHeard,
    EngineJoined,
    EngineLoaded,
    EngineLost,
    EngineSilent,
    Event,
    EvictEngine,
    LeaseDeclined,
    LoadEngine,
    MakeSpare,
    Note,
    PeerWasLost,
    Release,
    RetireEngine,
    Tick,
    UserCodeFailed,
    WorkDone,
)
from dnb.hub.scheduling.note_words import text_of, traceback_of
from dnb.protocol.run import ENDED, Partition, RunStatus

# Teams are numbered from here, so that no engine has the number of one.
FIRST_TEAM = 1 << 20
# A member says that it lost a peer; if nobody is found dead by then, the team is formed anew all the same.
GRACE_SECONDS = 1.0
# How long a member may be silent, after the hub has noticed it, until it is ended: one that was stopped, and one that
# loads, or may sleep in a call that lets no other thread of its process run.
SILENT_SECONDS, ASLEEP_SECONDS = 1.0, 30.0


@dataclass(slots=True)
class Team:
    """Some engines, in the order of their ranks."""

    number: int
    members: tuple[int, ...]
    partition: Partition
    loading: set[int]
    lease: int | None = None  # under way
    reports: dict[int, WorkDone] = field(default_factory=dict)  # of it
    is_whole: bool = True
    broken_since: float | None = None

    @property
    def owner(self) -> int:
        """The member whose slab all write into."""
        return self.members[-1]


class Teams:
    """Decides for a run whose model is divided, with the interface of a coordinator.

    Args:
        make: makes the coordinator of the teams, which are its engines.
        partitions: how the model is divided over so many engines.
        size: engines of a team; None: as many as there are, up to the largest partition.
        engines: that take part from the start.
        returning: engines that are to join again, as the run is taken over.
        first: number of the first team: no team of a hub before had it.
    """

    def __init__(
        self,
        make: Callable[[Iterable[int]], Coordinator],
        *,
        partitions: Mapping[int, Partition],
        size: int | None,
        engines: Iterable[int],
        returning: Iterable[int] = (),
        first: int = FIRST_TEAM,
    ) -> None:
        self._partitions = dict(partitions)
        self._size = size
        self._now = 0.0
        self._next = first
        self._names: dict[int, str] = {}
        self._teams: dict[int, Team] = {}
        self._rosters: dict[int, tuple[int, ...]] = {}  # members of all teams, also of those that are gone
        self._team_of: dict[int, Team] = {}
        self._free: set[int] = set(engines)
        self._resting: set[int] = set()
        self._retiring: set[int] = set()
        self._silent: dict[int, tuple[float, str, float]] = {}  # since when, what the hub says, how long it may be
        self._busy: set[int] = set()
        self._told_busy: set[int] = set()
        self._returning: set[int] = set(returning)
        self._since: float | None = None  # when the first event came
        self._inner = make([team.number for team in self._form()])

    # what others ask

    @property
    def status(self) -> RunStatus:
        """Of the run."""
        return self._inner.status

    @property
    def step(self) -> int:
        """Committed."""
        return self._inner.step

    @property
    def error(self) -> str:
        """Why it is paused or has failed, for people."""
        trouble = self._inner.trouble
        return "" if trouble is None else text_of(trouble, self._names)

    @property
    def last_word(self) -> str:
        """How the run has ended, for people."""
        return text_of(self._inner.last_note, self._names)

    @property
    def traceback(self) -> str:
        """Of what is in `error`."""
        trouble = self._inner.trouble
        return "" if trouble is None else traceback_of(trouble, self._names)

    @property
    def evaluated(self) -> int:
        """The last step after which an evaluation was committed."""
        return self._inner.evaluated

    @property
    def resting(self) -> frozenset[int]:
        """Engines that are in no team."""
        return frozenset(self._free)

    @property
    def working(self) -> frozenset[int]:
        """Engines that compute."""
        return frozenset(
            engine for number in self._inner.working if number in self._teams for engine in self._teams[number].members
        )

    def assignment_of(self, engine: int) -> tuple[int, int, Partition] | None:
        """Team, rank and partition of an engine; None if it is in no team."""
        team = self._team_of.get(engine)
        return None if team is None else (team.number, team.members.index(engine), team.partition)

    def owner_of(self, engine: int) -> int:
        """The engine whose slab an engine writes into."""
        team = self._team_of.get(engine)
        return engine if team is None else team.owner

    def expects(self, report: WorkDone) -> bool:
        """Whether it is of a whole team, and of its open lease."""
        team = self._team_of.get(report.engine)
        if team is None or not team.is_whole or team.loading:
            return False
        return self._inner.expects(replace(report, engine=team.number))

    # events

    def start(self) -> list[Action]:
        """The first actions."""
        return [*map(self._plan_of, self._teams.values()), *self._out(self._inner.start())]

    def handle(self, event: Event, now: float | None = None) -> list[Action]:  # noqa: C901 - the table of events
        """As `Coordinator.handle`, of engines and not of teams."""
        self._now = self._now if now is None else now
        self._since = self._now if self._since is None else self._since
        if self.status in ENDED:
            return [Release(event.engine)] if isinstance(event, RetireEngine) else []
        match event:
            case EngineJoined(engine):
                return self._join(engine)
            case EngineLoaded(engine):
                return self._load(engine)
            case EngineLost():
                return self._lose(event)
            case EngineSilent(engine, reason, is_asleep):
                return self._silence(engine, reason, is_asleep=is_asleep)
            case EngineBusy(engine):
                return self._miss(engine)
            case PeerWasLost(engine, lease):
                return self._suspect(engine, lease)
            case WorkDone(engine):
                return self._take(engine, event)
            case UserCodeFailed(engine):
                return self._fail(engine, event)
            case RetireEngine(engine):
                return self._retire(engine)
            case MakeSpare(engine):
                return self._rest(engine)
            case ActivateSpare(engine):
                self._resting.discard(engine)
                return self._grow()
            case Tick():
                return self._tick(event)
            case EngineHeard(engine):
                return self._hear(engine)
            case LeaseDeclined() | EngineEnding():
                return []
            case Committed() | CommitRefused() | CommitDeferred() | CommitFailed():
                return self._tell(event) + self._grow_if_it_pays()
            case _:
                return self._tell(event)

    def _tell(self, event: Event) -> list[Action]:
        return self._out(self._inner.handle(event, self._now))

    # teams

    def _form(self) -> list[Team]:
        """As many teams as there are engines for; the numbers of those that are new."""
        formed: list[Team] = []
        while (members := self._choose()) is not None:
            team = Team(self._next, members, self._partitions[len(members)], set(members))
            self._next += 1
            self._teams[team.number] = team
            self._names[team.number] = _name(team)
            self._rosters[team.number] = members
            self._free -= set(members)
            for engine in members:
                self._team_of[engine] = team
            formed.append(team)
        return formed

    def _choose(self) -> tuple[int, ...] | None:
        """Engines for one more team: of the usual size, or of what is left if there is no team at all."""
        able = sorted(self._free - self._resting - self._retiring)
        if not able or self._is_return_awaited():
            return None
        largest = max(self._partitions)
        size = min(self._size or largest, largest)
        if len(able) < size:
            if any(team.is_whole for team in self._teams.values()):
                return None
            size = max((number for number in self._partitions if number <= len(able)), default=0)
        return tuple(able[:size]) if size else None

    def _is_return_awaited(self) -> bool:
        if not self._returning or self._since is None:
            return bool(self._returning)
        return self._now - self._since < START_SECONDS

    def _grow(self) -> list[Action]:
        """Form teams if there are engines for them."""
        return [action for team in self._form() for action in self._welcome(team)]

    def _welcome(self, team: Team) -> list[Action]:
        actions = [self._plan_of(team), *self._tell(EngineJoined(team.number))]
        return actions + (self._tell(EngineBusy(team.number)) if self._busy & set(team.members) else [])

    def _plan_of(self, team: Team) -> Note:
        size = len(team.members)
        if team.partition.kind == "synced":
            part = f"each has 1/{size} of every batch" if size > 1 else "it has every batch"
            return Note("planned", f"{self._names[team.number]}: {part}; BatchNorm takes statistics of the whole batch")
        if team.partition.kind == "tensor":
            num_layers = len(team.partition.styles)
            part = f"each has 1/{size} of {num_layers} layers" if num_layers else "it has the whole model"
            return Note("planned", f"{self._names[team.number]}: {part}")
        stages = [
            f"stage{'s' * (team.partition.num_stages > size)} "
            f"{', '.join(map(str, range(rank, team.partition.num_stages, size)))} on engine {engine}"
            for rank, engine in enumerate(team.members)
        ]
        return Note("planned", f"{self._names[team.number]}: {'; '.join(stages)}")

    def _grow_if_it_pays(self) -> list[Action]:
        """Between two tasks: a pipeline over all engines takes in those that have come."""
        if self._size is not None or len(self._teams) != 1:
            return []
        team = next(iter(self._teams.values()))
        able = len(team.members) + len(self._free - self._resting - self._retiring)
        wanted = max((number for number in self._partitions if number <= able), default=0)
        if not team.is_whole or team.loading or wanted <= len(team.members):
            return []
        return self._replace(team, f"it is formed anew over {wanted} engines")

    def _replace(self, team: Team, reason: str, *, dead: EngineLost | None = None) -> list[Action]:
        """Another team takes a team's place; without enough engines for one, the team is lost.

        Args:
            team: that is broken.
            reason: for people.
            dead: the member that is the reason; the others are free.
        """
        self._break(team)
        for engine in team.members:
            del self._team_of[engine]
            if dead is None or engine != dead.engine:
                self._free.add(engine)
        del self._teams[team.number]
        actions = [Disband(team.number), *self._grow()]
        lost = EngineLost(team.number, reason, is_slab_lost=True)  # the next team may write into the same
        if dead is not None:
            lost = replace(dead, engine=team.number, is_slab_lost=True, member=dead.engine)
        return actions + self._tell(lost) + self._release_retired()

    def _break(self, team: Team) -> None:
        team.is_whole = False
        team.reports.clear()

    # what happens to engines

    def _join(self, engine: int) -> list[Action]:
        if engine in self._free or engine in self._team_of:
            return []
        self._returning.discard(engine)
        self._free.add(engine)
        return self._grow()

    def _load(self, engine: int) -> list[Action]:
        team = self._team_of.get(engine)
        if team is None or engine not in team.loading or not team.is_whole:
            return []
        team.loading.discard(engine)
        return [] if team.loading else self._tell(EngineLoaded(team.number))

    def _lose(self, event: EngineLost) -> list[Action]:
        engine = event.engine
        known = engine in self._free or engine in self._team_of or engine in self._returning
        self._silent.pop(engine, None)
        self._busy.discard(engine)
        self._free.discard(engine)
        self._returning.discard(engine)
        self._resting.discard(engine)
        self._retiring.discard(engine)
        if not known:
            return []
        died = Note("died", event.reason, engine, "found")
        team = self._team_of.get(engine)
        if team is None:
            return [died, *self._grow()]
        return [died, *self._replace(team, event.reason, dead=event)]

    def _silence(self, engine: int, reason: str, *, is_asleep: bool) -> list[Action]:
        """The others of its team are stuck until it ends."""
        if engine in self._silent:
            return []
        self._silent[engine] = self._now, reason, ASLEEP_SECONDS if is_asleep else SILENT_SECONDS
        return self._forget_busy(engine)

    def _miss(self, engine: int) -> list[Action]:
        """It does not beat, but works; whoever was silent before stays so until it is heard."""
        team = self._team_of.get(engine)
        if engine in self._silent or engine in self._busy:
            return []
        self._busy.add(engine)
        if team is None:
            return []
        is_told = engine in self._told_busy or bool(team.loading)
        note = [] if is_told else [Note("busy", engine=engine, reason="in a call")]
        self._told_busy.update([engine] if note else [])
        return [*note, *(a for a in self._tell(EngineBusy(team.number)) if not isinstance(a, Note))]

    def _hear(self, engine: int) -> list[Action]:
        self._silent.pop(engine, None)
        return self._forget_busy(engine)

    def _forget_busy(self, engine: int) -> list[Action]:
        """A team is busy no more if none of its members is."""
        team = self._team_of.get(engine)
        was_busy = engine in self._busy
        self._busy.discard(engine)
        if team is None or not was_busy or self._busy & set(team.members):
            return []
        return self._tell(EngineHeard(team.number))

    def _end_silent(self) -> list[Action]:
        """Those that are silent for too long are ended."""
        actions: list[Action] = []
        for engine, (since, reason, patience) in list(self._silent.items()):
            team = self._team_of.get(engine)
            patience = ASLEEP_SECONDS if team is not None and engine in team.loading else patience
            if team is not None and self._now - since > patience:
                del self._silent[engine]
                actions += [Note("hung", reason, engine, "held up its team"), EvictEngine(engine)]
        return actions

    def _suspect(self, engine: int, lease: int | None) -> list[Action]:
        team = self._team_of.get(engine)
        if team is not None and team.lease == lease and team.broken_since is None:
            team.broken_since = self._now
        return []

    def _tick(self, event: Tick) -> list[Action]:
        actions: list[Action] = self._end_silent()
        for team in list(self._teams.values()):
            if team.broken_since is not None and self._now - team.broken_since > GRACE_SECONDS:
                actions += self._replace(team, "has lost a connection")
        if self._returning and not self._is_return_awaited():
            self._returning.clear()
        if not self._teams:
            actions += self._grow()
        return actions + self._tell(event)

    def _take(self, engine: int, report: WorkDone) -> list[Action]:
        if not self.expects(report):
            return []
        team = self._team_of[engine]
        team.reports[engine] = report
        if len(team.reports) < len(team.members):
            return []
        num_samples = sum(each.num_samples or 0 for each in team.reports.values())  # only one counts them
        team.reports.clear()
        team.lease = None
        return self._tell(replace(report, engine=team.number, num_samples=num_samples))

    def _fail(self, engine: int, event: UserCodeFailed) -> list[Action]:
        """What one of them raised has freed the others: the step is given up, and the team formed anew."""
        team = self._team_of.get(engine)
        if team is None or not team.is_whole:
            return []
        if event.lease not in (0, team.lease):
            return []  # of an earlier team: where all have the whole model, all of them raise
        actions = self._tell(replace(event, engine=team.number))
        if self.status in ENDED or event.lease == 0:
            return actions
        return actions + self._replace(team, "was ended by a failure")

    def _retire(self, engine: int) -> list[Action]:
        team = self._team_of.get(engine)
        self._retiring.add(engine)
        if team is None:
            return self._release_retired()
        return self._replace(team, f"engine {engine} leaves, as asked")

    def _release_retired(self) -> list[Action]:
        leaving = sorted(self._retiring & self._free)
        self._retiring -= set(leaving)
        self._free -= set(leaving)
        actions: list[Action] = []
        for engine in leaving:
            actions += [Note("left", engine=engine, reason="left, as asked"), Release(engine)]
        return actions

    def _rest(self, engine: int) -> list[Action]:
        self._resting.add(engine)
        team = self._team_of.get(engine)
        return [] if team is None else self._replace(team, f"engine {engine} rests")

    # what the coordinator wants

    def _out(self, actions: Iterable[Action]) -> list[Action]:
        return [own for action in actions for own in self._translated(action)]

    def _translated(self, action: Action) -> list[Action]:
        match action:
            case LoadEngine(number):
                team = self._teams.get(number)
                return [] if team is None else [LoadEngine(engine) for engine in team.members]
            case Assign(engine=number, in_extra_slab=True, lease=lease):
                return self._tell(LeaseDeclined(number, lease))  # there is one slab for all members
            case Assign(engine=number, lease=lease):
                team = self._teams.get(number)
                if team is None:
                    return []
                team.lease = lease
                team.reports.clear()
                return [replace(action, engine=engine) for engine in team.members]
            case Commit(reports=reports):
                everybody = [(engine, shards) for number, shards in reports for engine in self._rosters[number]]
                return [replace(action, reports=tuple(everybody))]
            case Release():
                return []  # engines are released, not teams
            case Note():
                return self._note(action)
            case End(status):
                # Else engines that still wait for each other would never hear of the next run.
                return [*map(Disband, self._teams), End(status, self.error, self.traceback)]
            case _:
                return [action]

    def _note(self, note: Note) -> list[Action]:
        """Say it of the team by its name, and not at all if it was told of the engine."""
        is_of_team = note.engine in self._names
        if is_of_team and note.kind in ("died", "left"):
            return []
        return [Note(note.kind, text_of(note, self._names), None if is_of_team else note.engine)]


def _name(team: Team) -> str:
    engines = ", ".join(map(str, team.members))
    kind = {"tensor": "tensor team", "synced": "team", "pipeline": "pipeline"}[team.partition.kind]
    return f"the {kind} of engines {engines}" if len(team.members) > 1 else f"engine {engines}"
