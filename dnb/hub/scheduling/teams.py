"""Engines that compute together: to the coordinator a team is one engine, which leases shards and answers for all.

Sans I/O, as the coordinator is, and between it and what happens to engines. Engines are *free* until there are enough
for a team; a team is formed once and never changed. When one of its engines is gone, or its process group is broken,
another team takes its place: its engines get new *assignments*, and the coordinator hears that the new team has joined
before it hears that the old one is lost, so a run whose only team is replaced goes on.

    free --enough--> seated --all have loaded--> at work --one died, hung, failed, left--> the others: free
                                                    |
                                                    +-- every member has reported --> one report to the coordinator

A member that hangs holds up all others, in a call that nothing but the end of a peer ends: after a while it is
*evicted*, which means killed. One that is at work is waited for, whether it can beat or not; to the coordinator a
team is busy if a member is. An answer counts if it comes from a member of a team that is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

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
from dnb.hub.scheduling.member_watch import MemberWatch
from dnb.hub.scheduling.note_words import text_of, traceback_of
from dnb.hub.scheduling.team_formation import FIRST_TEAM, Team, TeamFormation
from dnb.protocol.run import ENDED, Partition, RunStatus


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
        self._formation = TeamFormation(partitions, size=size, engines=engines, returning=returning, first=first)
        self._now = 0.0
        self._since: float | None = None  # when the first event came
        self._watch = MemberWatch()
        self._inner = make([team.number for team in self._form()])

    # what others ask

    @property
    def status(self) -> RunStatus:
        """The status of the run."""
        return self._inner.status

    @property
    def step(self) -> int:
        """Committed."""
        return self._inner.step

    @property
    def error(self) -> str:
        """Why it is paused or has failed, for people."""
        trouble = self._inner.trouble
        return "" if trouble is None else text_of(trouble, self._formation.names)

    @property
    def last_word(self) -> str:
        """The end of the run in words, for people."""
        return text_of(self._inner.last_note, self._formation.names)

    @property
    def traceback(self) -> str:
        """The traceback of the failure in `error`."""
        trouble = self._inner.trouble
        return "" if trouble is None else traceback_of(trouble, self._formation.names)

    @property
    def evaluated(self) -> int:
        """The last step after which an evaluation was committed."""
        return self._inner.evaluated

    @property
    def spares(self) -> frozenset[int]:
        """Engines that are in no team."""
        return frozenset(self._formation.free)

    @property
    def working(self) -> frozenset[int]:
        """Engines that compute."""
        teams = self._formation.teams
        return frozenset(engine for n in self._inner.working if n in teams for engine in teams[n].members)

    def assignment_of(self, engine: int) -> tuple[int, int, Partition] | None:
        """Team, rank and partition of an engine; None if it is in no team."""
        team = self._formation.team_of.get(engine)
        return None if team is None else (team.number, team.members.index(engine), team.partition)

    def owner_of(self, engine: int) -> int:
        """Return the engine whose slab an engine writes into."""
        team = self._formation.team_of.get(engine)
        return engine if team is None else team.owner

    def expects(self, report: WorkDone) -> bool:
        """Return True if a report is of a whole team, and of its open lease."""
        team = self._formation.team_of.get(report.engine)
        if team is None or not team.is_whole or team.loading:
            return False
        return self._inner.expects(replace(report, engine=team.number))

    # events

    def start(self) -> list[Action]:
        """Return the first actions."""
        plans = [Note("planned", team.plan) for team in self._formation.teams.values()]
        return [*plans, *self._out(self._inner.start())]

    def handle(self, event: Event, now: float | None = None) -> list[Action]:  # noqa: C901 - the table of events
        """Handle an event as `Coordinator.handle` does, of engines and not of teams."""
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
                return self._make_spare(engine)
            case ActivateSpare(engine):
                self._formation.spares.discard(engine)
                return self._grow()
            case Tick():
                return self._tick(event)
            case EngineHeard(engine):
                return self._hear(engine)
            case LeaseDeclined() | EngineEnding():
                return []
            case Committed() | CommitRefused() | CommitDeferred() | CommitFailed():
                return self._pass_on(event) + self._grow_if_it_pays()
            case _:
                return self._pass_on(event)

    def _pass_on(self, event: Event) -> list[Action]:
        return self._out(self._inner.handle(event, self._now))

    # teams

    def _form(self) -> list[Team]:
        return [] if self._is_return_awaited() else self._formation.form()

    def _is_return_awaited(self) -> bool:
        if not self._formation.returning or self._since is None:
            return bool(self._formation.returning)
        return self._now - self._since < START_SECONDS

    def _grow(self) -> list[Action]:
        """Form teams if there are engines for them."""
        return [action for team in self._form() for action in self._welcome(team)]

    def _welcome(self, team: Team) -> list[Action]:
        actions = [Note("planned", team.plan), *self._pass_on(EngineJoined(team.number))]
        return actions + (self._pass_on(EngineBusy(team.number)) if self._watch.is_busy(team) else [])

    def _grow_if_it_pays(self) -> list[Action]:
        """Let a pipeline over all engines take in those that have come, between two tasks."""
        wider = self._formation.find_wider()
        if wider is None:
            return []
        team, wanted = wider
        return self._replace(team, f"it is formed anew over {wanted} engines")

    def _replace(self, team: Team, reason: str, *, dead: EngineLost | None = None) -> list[Action]:
        """Put another team in a team's place; without enough engines for one, the team is lost.

        Args:
            team: that is broken.
            reason: for people.
            dead: the member that is the reason; the others are free.
        """
        self._formation.disband(team, dead=None if dead is None else dead.engine)
        actions = [Disband(team.number), *self._grow()]
        lost = EngineLost(team.number, reason, is_slab_lost=True)  # the next team may write into the same
        if dead is not None:
            lost = replace(dead, engine=team.number, is_slab_lost=True, member=dead.engine)
        return actions + self._pass_on(lost) + self._release_retired()

    # what happens to engines

    def _join(self, engine: int) -> list[Action]:
        if engine in self._formation.free or engine in self._formation.team_of:
            return []
        self._formation.returning.discard(engine)
        self._formation.free.add(engine)
        return self._grow()

    def _load(self, engine: int) -> list[Action]:
        team = self._formation.team_of.get(engine)
        if team is None or engine not in team.loading or not team.is_whole:
            return []
        team.loading.discard(engine)
        return [] if team.loading else self._pass_on(EngineLoaded(team.number))

    def _lose(self, event: EngineLost) -> list[Action]:
        engine = event.engine
        self._watch.end_silence(engine)
        self._watch.end_busy(engine)
        if not self._formation.forget(engine):
            return []
        died = Note("died", event.reason, engine, "found")
        team = self._formation.team_of.get(engine)
        if team is None:
            return [died, *self._grow()]
        return [died, *self._replace(team, event.reason, dead=event)]

    def _silence(self, engine: int, reason: str, *, is_asleep: bool) -> list[Action]:
        """Note a silent engine; the others of its team are stuck until it ends."""
        is_new = self._watch.note_silent(engine, self._now, reason, is_asleep=is_asleep)
        return self._forget_busy(engine) if is_new else []

    def _miss(self, engine: int) -> list[Action]:
        """Note an engine that does not beat, but works; one that was silent before stays so until it is heard."""
        team = self._formation.team_of.get(engine)
        if not self._watch.note_busy(engine) or team is None:
            return []
        is_reported = bool(team.loading) or not self._watch.note_reported(engine)
        note = [] if is_reported else [Note("busy", engine=engine, reason="in a call")]
        return [*note, *(a for a in self._pass_on(EngineBusy(team.number)) if not isinstance(a, Note))]

    def _hear(self, engine: int) -> list[Action]:
        self._watch.end_silence(engine)
        return self._forget_busy(engine)

    def _forget_busy(self, engine: int) -> list[Action]:
        """Forget that an engine was busy; a team is busy no more if none of its members is."""
        team = self._formation.team_of.get(engine)
        was_busy = self._watch.end_busy(engine)
        if team is None or not was_busy or self._watch.is_busy(team):
            return []
        return self._pass_on(EngineHeard(team.number))

    def _end_silent(self) -> list[Action]:
        """End those that are silent for too long."""
        overdue = self._watch.take_overdue(self._formation.team_of, self._now)
        hung = [(Note("hung", reason, engine, "held up its team"), EvictEngine(engine)) for engine, reason in overdue]
        return [action for pair in hung for action in pair]

    def _suspect(self, engine: int, lease: int | None) -> list[Action]:
        team = self._formation.team_of.get(engine)
        if team is not None and team.lease == lease and team.broken_since is None:
            team.broken_since = self._now
        return []

    def _tick(self, event: Tick) -> list[Action]:
        actions: list[Action] = self._end_silent()
        for team in self._formation.find_broken(self._now):
            actions += self._replace(team, "has lost a connection")
        if self._formation.returning and not self._is_return_awaited():
            self._formation.returning.clear()
        if not self._formation.teams:
            actions += self._grow()
        return actions + self._pass_on(event)

    def _take(self, engine: int, report: WorkDone) -> list[Action]:
        if not self.expects(report):
            return []
        team = self._formation.team_of[engine]
        team.reports[engine] = report
        if len(team.reports) < len(team.members):
            return []
        num_samples = sum(each.num_samples or 0 for each in team.reports.values())  # only one counts them
        team.reports.clear()
        team.lease = None
        return self._pass_on(replace(report, engine=team.number, num_samples=num_samples))

    def _fail(self, engine: int, event: UserCodeFailed) -> list[Action]:
        """Give up the step and form the team anew: the error of one engine has freed the others."""
        team = self._formation.team_of.get(engine)
        if team is None or not team.is_whole:
            return []
        if event.lease not in (0, team.lease):
            return []  # of an earlier team: where all have the whole model, all of them raise
        actions = self._pass_on(replace(event, engine=team.number))
        if self.status in ENDED or event.lease == 0:
            return actions
        return actions + self._replace(team, "was ended by a failure")

    def _retire(self, engine: int) -> list[Action]:
        team = self._formation.team_of.get(engine)
        self._formation.retiring.add(engine)
        if team is None:
            return self._release_retired()
        return self._replace(team, f"engine {engine} leaves, as asked")

    def _release_retired(self) -> list[Action]:
        actions: list[Action] = []
        for engine in self._formation.release():
            actions += [Note("left", engine=engine, reason="left, as asked"), Release(engine)]
        return actions

    def _make_spare(self, engine: int) -> list[Action]:
        self._formation.spares.add(engine)
        team = self._formation.team_of.get(engine)
        return [] if team is None else self._replace(team, f"engine {engine} rests")

    # what the coordinator wants

    def _out(self, actions: Iterable[Action]) -> list[Action]:
        return [own for action in actions for own in self._translated(action)]

    def _translated(self, action: Action) -> list[Action]:
        match action:
            case LoadEngine(number):
                team = self._formation.teams.get(number)
                return [] if team is None else [LoadEngine(engine) for engine in team.members]
            case Assign(engine=number, in_extra_slab=True, lease=lease):
                return self._pass_on(LeaseDeclined(number, lease))  # there is one slab for all members
            case Assign(engine=number, lease=lease):
                team = self._formation.teams.get(number)
                if team is None:
                    return []
                team.lease = lease
                team.reports.clear()
                return [replace(action, engine=engine) for engine in team.members]
            case Commit(reports=reports):
                rosters = self._formation.rosters
                everybody = [(engine, shards) for number, shards in reports for engine in rosters[number]]
                return [replace(action, reports=tuple(everybody))]
            case Release():
                return []  # engines are released, not teams
            case Note():
                return self._note(action)
            case End(status):
                # Else engines that still wait for each other would never hear of the next run.
                return [*map(Disband, self._formation.teams), End(status, self.error, self.traceback)]
            case _:
                return [action]

    def _note(self, note: Note) -> list[Action]:
        """Note it of the team by its name, and not at all if it was noted of the engine."""
        is_of_team = note.engine in self._formation.names
        if is_of_team and note.kind in ("died", "left"):
            return []
        return [Note(note.kind, text_of(note, self._formation.names), None if is_of_team else note.engine)]
