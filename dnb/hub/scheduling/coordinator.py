"""The coordinator of a run: a state machine without I/O that decides who computes what, and when a step counts.

Events go in, actions come out (`dnb.hub.scheduling.events`); there is no clock, no socket, no thread, no tensor: the
time comes with the events. One coordinator is one run.

    starting --all engines loaded--> running --last step, or stop--> finished | stopped
                                      |  ^
        refused step, user code that  |  | resume: the same step again
        failed in it, or pause        v  |
                                     paused

    any state --optimizer or sampler failed, no engine could load, or none is left--> failed

Within `running`, one *task* is under way: a training step or an evaluation. A step whose loss looks at the whole batch
is two tasks: the first gathers outputs, and the shards of the second go to the engines that have computed these. The
shards of a task are leased to engines, one lease to an engine, and it is committed once, when every shard has been
reported. Leases bear numbers that never come
again, and an answer counts only if its lease is open: that is how late, repeated and foreign messages are harmless.

    free --lease--> at work --report, or failure--> free
                      |  ^                           ^
       overtaken, or  |  | none: what was taken      | its answer, which is refused
       step given up  |  | away stays so             |
                      v  |                           |
                    occupied ------------------------+          any --died, or released--> gone

- A lost engine's open lease is given to those who are free. What it had reported before lies in the slab it was
  writing to, so that is redone too; an engine that had answered all it had left a whole slab, which still counts.
- A *late* lease, or one of a *silent* engine (which neither beats nor works), is given to an idle engine besides, in a
  slab of its own: the first answer wins, and only then is the other taken away. So work that is slow, or that holds its
  engine's interpreter, always comes to an end, and nobody waits for an engine that hangs. Without memory for such a
  slab a silent engine's lease is taken away at once, a second time after twice as long, and so on.
- A silent engine gets nothing more until it is heard and has answered; a *busy* one (which works, but cannot beat)
  is like any other, except that neither a start nor a stop waits for it for ever.
- Shares follow the engines' speeds where these really differ (`dnb.hub.scheduling.speeds`).
- Work that ends its engine is given to others once: if it ends the next one, too, the run pauses, names the shards that
  both had, and asks for engines in the place of those that died. A death that somebody is known to have caused is none
  of these; a step that is committed acquits everybody.
- User code that fails pauses the run at that step, once everybody who can be waited for has answered.
- An engine that retires answers its lease, gets no other, and is released; without the last one the run pauses.
- A spare has loaded the run and rests: it gets nothing until it is woken.
- A coordinator may take a run over from one that is gone, after the last step that counts. It waits for the engines of
  its predecessor to return; who takes too long joins later. Nothing else is inherited: leases die with the wires.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from dnb.hub.scheduling.events import (
    Action,
    ActivateSpare,
    Asked,
    Assign,
    Commit,
    CommitDeferred,
    CommitFailed,
    CommitRefused,
    Committed,
    End,
    EngineBusy,
    EngineEnding,
    EngineHeard,
    EngineJoined,
    EngineLoaded,
    EngineLost,
    EngineSilent,
    Event,
    LeaseDeclined,
    LoadEngine,
    MakeSpare,
    Note,
    PeerWasLost,
    Reason,
    Release,
    Replace,
    RetireEngine,
    Tick,
    UserCodeFailed,
    WorkDone,
)
from dnb.hub.scheduling.failures import describe_deaths
from dnb.hub.scheduling.leases import Lease, Leases
from dnb.hub.scheduling.note_words import text_of, traceback_of
from dnb.hub.scheduling.task import Death, Task
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import ENDED, Failure, Partition, RunStatus

# When user code has failed, and how long the others take is not known yet: so long they are waited for.
FAILED_SECONDS = 2.0
# An engine may be silent only because the run's data are unpacked in one long call: so long it holds up the start.
START_SECONDS = 2.0
# And so long if it is seen to be at work. It may as well be stuck in a call of the run before.
BUSY_START_SECONDS = 10.0
# A run that is to stop ends without the step under way if all were in calls that hold their interpreters for so long.
BUSY_STOP_SECONDS = 5.0
# How long a run that is resumed without engines waits for the first that joins.
REFILL_SECONDS = 60.0
# A run whose every step is late would fill its history: so often the same is noted of an engine.
MOST_REPORTED = 3


class Coordinator:
    """Decides for one run.

    Args:
        num_steps: optimizer steps until the run is finished.
        num_shards: logical shards per step and per evaluation.
        evaluate_every: evaluate after each multiple of so many steps and after the last; None never does.
        engines: ids of the engines that take part from the start.
        step: committed by an earlier run that this one continues.
        evaluated: the last step after which that run had committed an evaluation.
        returning: ids of engines that are to join again, as this coordinator takes the run over.
        status: "starting", or as the run was taken over: paused, or ended.
        error: of a run that was taken over.
        traceback: of what is in `error`.
        generation: how many coordinators had the run before: no lease has the number of one of theirs.
        name_samples: of some shards of the task under way, for people.
        gathers: whether outputs are gathered before each step.
    """

    def __init__(  # noqa: PLR0913 - what a run is begun with
        self,
        *,
        num_steps: int,
        num_shards: int,
        evaluate_every: int | None,
        engines: Iterable[int],
        step: int = 0,
        evaluated: int = 0,
        returning: Iterable[int] = (),
        status: RunStatus = "starting",
        error: str = "",
        traceback: str = "",
        generation: int = 0,
        name_samples: Callable[[WorkKind, int, Sequence[int]], str] = lambda _kind, _step, _shards: "",
        gathers: bool = False,
    ) -> None:
        self.num_steps = num_steps
        self.num_shards = num_shards
        self.evaluate_every = evaluate_every
        self.status: RunStatus = status
        self.trouble = Note(status, error, traceback=traceback) if error else None  # why it is paused or has failed
        self.step = step  # committed
        self._evaluated = evaluated  # the last step after which an evaluation was committed
        self._loading: set[int] = set(engines)
        self._returning: set[int] = set(returning)
        self._returning_since: float | None = None
        self._ready: set[int] = set()
        self._silent: dict[int, float] = {}  # since when, of those that are loading or ready
        self._busy: dict[int, float] = {}  # likewise
        self._retiring: set[int] = set()
        self._spares: set[int] = set()  # spares, loaded or not
        self._leases = Leases(num_shards, first=generation << 32)
        self._task: Task | None = None
        self._requested: Literal["pause", "stop"] | None = None
        self._committing = False
        self._last_loss: Note | None = None
        self._was_asked_for = False  # the last loss
        self._ending: set[int] = set()  # engines that are about to be lost
        self._name_samples = name_samples
        self._gathers = gathers
        self._holders: dict[int, set[int]] = {}  # shards whose outputs each engine has computed for the step under way
        self._refill_since: float | None = None  # resumed without engines, as others are to come
        self._load_failures: list[tuple[int, Failure]] = []
        self._reported_late: set[int] = set()
        self._reported_silent: set[int] = set()
        self._num_reported: Counter[tuple[str, int]] = Counter()  # by kind and engine

    def start(self) -> list[Action]:
        """Return the first actions."""
        return [LoadEngine(engine) for engine in sorted(self._loading)]

    def handle(self, event: Event, now: float | None = None) -> list[Action]:  # noqa: C901 - the table of events
        """Take one event, change state, and say what is to be done. Never raises on an event that comes late.

        Args:
            event: what happened.
            now: seconds on a clock that never goes back; None is as late as the event before.
        """
        if now is not None:
            self._leases.now = now
        if self.status in ENDED:
            return [Release(event.engine)] if isinstance(event, RetireEngine) else []
        match event:
            case WorkDone():
                return self._take(event)
            case Committed(kind, step):
                return self._advance(kind, step)
            case Tick():
                return self._poll_engines()
            case EngineJoined(engine):
                return self._join(engine)
            case EngineLoaded(engine):
                return self._load(engine)
            case EngineLost():
                return self._lose(event)
            case EngineEnding(engine):
                self._ending.add(engine)
                return []
            case EngineSilent(engine, reason, is_asleep):
                return self._silence(engine, reason, is_asleep=is_asleep)
            case EngineBusy(engine):
                return self._miss(engine)
            case EngineHeard(engine):
                return self._hear(engine)
            case RetireEngine(engine):
                return self._retire(engine)
            case MakeSpare(engine):
                self._spares.add(engine)
                return []
            case ActivateSpare(engine):
                return self._activate_spare(engine)
            case LeaseDeclined(engine, lease):
                return self._decline(engine, lease)
            case UserCodeFailed():
                return self._fail_on_engine(event)
            case CommitRefused(step, reason):
                return self._refuse(step, reason)
            case CommitDeferred():
                return self._compute_again()
            case CommitFailed(step, failure):
                return self._end("failed", Note("failed", reason="commit failed", step=step, failures=((0, failure),)))
            case Asked(verb):
                return self._ask(verb)
            case PeerWasLost():
                return []  # of teams: see `dnb.hub.scheduling.teams`

    @property
    def evaluated(self) -> int:
        """The last step after which an evaluation was committed."""
        return self._evaluated

    @property
    def spares(self) -> frozenset[int]:
        """Spares of this run."""
        return frozenset(self._spares)

    @property
    def working(self) -> frozenset[int]:
        """Engines that compute, even if their answer will be refused."""
        return frozenset(self._leases.by_engine)

    def expects(self, report: WorkDone) -> bool:
        """Return True if the lease that is answered is this engine's and open, so that the report will count."""
        lease = self._leases.behind(report)
        return lease is not None and lease.is_open

    def owner_of(self, engine: int) -> int:
        """Return the engine whose slab an engine writes into: its own, as it is in no team."""
        return engine

    def assignment_of(self, engine: int) -> tuple[int, int, Partition] | None:  # noqa: ARG002 - see `dnb.hub.scheduling.teams`
        """Return None: no engine has a rank in a team."""
        return None

    # membership

    def _join(self, engine: int) -> list[Action]:
        if engine in self._loading or engine in self._ready:
            return []
        self._returning.discard(engine)
        self._loading.add(engine)
        return [LoadEngine(engine)]

    def _load(self, engine: int) -> list[Action]:
        if engine not in self._loading:
            return []
        self._loading.discard(engine)
        self._ready.add(engine)
        self._refill_since = None
        is_spare = engine in self._spares
        loaded = Note("spare", reason="loaded as a spare") if is_spare else Note("joined", reason="loaded")
        actions: list[Action] = [replace(loaded, engine=engine)]
        if self.status == "starting":
            return actions + self._begin_if_loaded()
        if self._task is not None and not self._committing:
            self._task.invalidate(engine)  # what it reported before it came back is overwritten now
        return actions + self._go_on()

    def _begin_if_loaded(self) -> list[Action]:
        workers = self._ready - self._spares
        if self.status != "starting" or not workers:
            return []
        now = self._leases.now
        mute = {e for e in self._loading if now - self._silent.get(e, now) >= START_SECONDS}
        stuck = {e for e in self._loading if now - self._busy.get(e, now) >= BUSY_START_SECONDS}
        if mute | stuck != self._loading or self._is_return_awaited():
            return []
        self.status = "running"
        return [
            *(Note("hung", engine=engine, reason="silent at the start") for engine in sorted(mute)),
            *(Note("busy", engine=engine, reason="busy at the start") for engine in sorted(stuck)),
            Note("running", reason="begins", count=len(workers), num_shards=self.num_shards),
            *self._next_task(),
        ]

    def _is_return_awaited(self) -> bool:
        """Return True if engines of the run's last generation may still be on their way."""
        if not self._returning:
            return False
        if self._returning_since is None:
            self._returning_since = self._leases.now
        return self._leases.now - self._returning_since < START_SECONDS

    def _lose(self, event: EngineLost) -> list[Action]:
        engine = event.engine
        self._ending.discard(engine)
        if event.is_slab_lost and self._task is not None and not self._committing:
            self._task.invalidate(engine)
        is_known = engine in self._loading or engine in self._ready
        if not is_known and engine not in self._returning:
            return []
        note = Note("died", event.reason, engine, "found")
        self._was_asked_for = False
        self._last_loss = note if event.member is None else replace(note, engine=event.member)
        if not is_known:
            self._returning.discard(engine)
            return [note, *self._end_or_go_on()]
        deaths = self._suspected(event) if event.is_suspect else []
        if deaths:
            self._forget(engine)
            return [note, *self._pause_at_deaths(deaths)]
        return [note, *self._drop(engine)]

    def _suspected(self, event: EngineLost) -> list[Death]:
        """Return the deaths that are no accident, if this one is not the first at its shards, or the last possible."""
        lease, task = self._leases.by_engine.get(event.engine), self._task
        if lease is None or task is None or self._committing or (lease.kind, lease.step) != (task.kind, task.step):
            return []
        who = event.engine if event.member is None else event.member
        deaths = task.forget_engine(lease, who, event.reason)
        is_last = not (self._ready | self._loading | self._returning) - {event.engine}
        if not deaths and is_last and event.is_crash and task.deaths[-1].shards:
            return task.deaths[-1:]
        return deaths

    def _pause_at_deaths(self, deaths: Sequence[Death]) -> list[Action]:
        """Pause: work has ended engines, and nobody else is given it before the user has looked at it."""
        task = self._task
        assert task is not None
        self._give_up()
        replacements = Replace(len(task.deaths))
        if self._requested == "stop":
            return [replacements, *self._end("stopped")]
        shards = sorted(frozenset.intersection(*(death.shards for death in deaths)))
        detail = describe_deaths(deaths, self._name_samples(task.kind, task.step, shards))
        return [*self._pause_for_replacement(task, detail=detail), replacements, *self._release_free()]

    def _give_up(self) -> None:
        """Give up the task under way: no answer to it will count."""
        for lease in self._leases.open:
            lease.is_open = False
        self._task = None

    def _pause_for_replacement(
        self, task: Task, *, detail: str = "", failures: Sequence[tuple[int, Failure]] = ()
    ) -> list[Action]:
        reason: Reason = "evaluation failed" if task.kind == "evaluation" else "step failed"
        note = Note("paused", detail, reason=reason, step=task.step, failures=tuple(failures))
        return self._pause(note, is_error=True)

    def _forget(self, engine: int) -> int:
        """Forget an engine that is gone; return how many shards are to be redone for that."""
        for group in (self._loading, self._ready, self._retiring, self._spares, self._ending):
            group.discard(engine)
        self._silent.pop(engine, None)
        self._busy.pop(engine, None)
        lease = self._leases.drop(engine)
        return self._take_away(lease) if lease is not None and lease.is_open else 0

    def _drop(self, engine: int) -> list[Action]:
        """Let an engine go, and others redo what is lost with it."""
        num_shards = self._forget(engine)
        if self._committing:
            return []  # what is being committed is whole; the next task sees who is left
        actions = [_reassigned(engine, num_shards)] if num_shards and self._has_engines else []
        return [*actions, *self._end_or_go_on()]

    @property
    def _has_engines(self) -> bool:
        return bool(self._ready or self._loading or self._returning) or self._is_refill_awaited()

    def _is_refill_awaited(self) -> bool:
        since = self._refill_since
        return since is not None and self._leases.now - since < REFILL_SECONDS

    def _end_or_go_on(self) -> list[Action]:
        """Go on without an engine that is gone, or end if nobody is left."""
        if not self._has_engines:
            return self._end_without_engines()
        return self._begin_if_loaded() + self._go_on()

    def _retire(self, engine: int) -> list[Action]:
        if engine not in self._loading and engine not in self._ready:
            return [Release(engine)]
        self._retiring.add(engine)
        return self._release_free()

    def _release_free(self) -> list[Action]:
        """Let those go who were asked to, and hold nothing that is worth waiting for."""
        actions: list[Action] = []
        for engine in sorted(self._retiring):
            lease = self._leases.by_engine.get(engine)
            if engine in self._retiring and (lease is None or not lease.is_open or engine in self._silent):
                self._last_loss, self._was_asked_for = Note("left", engine=engine, reason="left, as asked"), True
                actions += [self._last_loss, Release(engine), *self._drop(engine)]
        return actions

    def _activate_spare(self, engine: int) -> list[Action]:
        if engine not in self._spares:
            return []
        self._spares.discard(engine)
        if engine not in self._ready:
            return []  # it works as soon as it has loaded
        note = Note("joined", engine=engine, reason="woken")
        return [note, *self._begin_if_loaded(), *self._go_on()]

    def _silence(self, engine: int, reason: str, *, is_asleep: bool) -> list[Action]:
        if engine in self._silent or (engine not in self._loading and engine not in self._ready):
            return []
        self._silent[engine] = self._leases.now
        self._busy.pop(engine, None)
        if engine in self._loading:
            return []
        if engine in self._leases.by_engine:
            self._leases.by_engine[engine].was_silent = True
        actions: list[Action] = []
        if not is_asleep or self._was_reported("hung", engine):
            self._reported_silent.add(engine)
            actions.append(Note("hung", reason, engine, "found"))
        return [*actions, *self._release_free(), *self._go_on()]

    def _miss(self, engine: int) -> list[Action]:
        """Note an engine that cannot beat, but works."""
        if engine in self._silent or (engine not in self._loading and engine not in self._ready):
            return []
        self._busy.setdefault(engine, self._leases.now)
        lease = self._leases.by_engine.get(engine)
        if lease is None or self._num_reported["busy", engine]:
            return []
        self._num_reported["busy", engine] += 1
        return [Note("busy", engine=engine, reason="in a call")]

    def _hear(self, engine: int) -> list[Action]:
        self._busy.pop(engine, None)
        if self._silent.pop(engine, None) is None or engine in self._loading:
            return []
        was_reported = engine in self._reported_silent
        self._reported_silent.discard(engine)
        note = [Note("recovered", engine=engine, reason="heard")] if was_reported else []
        return [*note, *self._go_on()]

    def _was_reported(self, kind: str, engine: int) -> bool:
        """Return True if a note of that kind is still written about an engine; from now on that is once less."""
        self._num_reported[kind, engine] += 1
        return self._num_reported[kind, engine] <= MOST_REPORTED

    def _go_on(self) -> list[Action]:
        """Give free engines the shards that nobody has, or that are late: one came, went, fell silent or got free."""
        task = self._task
        if task is None or self._committing:
            return []
        if task.failures:
            return self._pause_if_answered(task)
        if self._requested == "stop" and not self._can_advance():
            return self._end("stopped")
        return self._hand_out(task) + (self._redo_late(task) if self._silent else [])

    def _can_advance(self) -> bool:
        now = self._leases.now
        return any(
            engine not in self._silent and now - self._busy.get(engine, now) < BUSY_STOP_SECONDS
            for engine in self._ready - self._spares
        )

    # leases

    def _can_help(self, engine: int) -> bool:
        """Return True if an engine that is ready is free, or will be when it answers."""
        if engine in self._silent or engine in self._retiring or engine in self._spares or engine in self._ending:
            return False
        lease = self._leases.by_engine.get(engine)
        return lease is None or lease.is_open

    def _lease(
        self, task: Task, engine: int, shards: tuple[int, ...], *, in_extra_slab: bool = False, root: int | None = None
    ) -> Assign:
        fresh = in_extra_slab or engine not in task.touched
        task.touched.add(engine)
        return self._leases.issue(
            engine, task.kind, task.step, shards, fresh=fresh, in_extra_slab=in_extra_slab, root=root
        )

    def _take_away(self, lease: Lease) -> int:
        """Close a lease, whose answer will be refused; return how many shards nobody else has, to be redone."""
        lease.is_open = False
        if self._task is None:
            return 0
        self._task.has_gaps = True
        return len(lease.shards) + (0 if lease.in_extra_slab else self._task.invalidate(lease.engine))

    def _hand_out(self, task: Task) -> list[Action]:
        """Lease what nobody has to those who are free; those who will be soon get their part then."""
        if not task.has_gaps:
            return []
        covered = {shard for part in task.parts for shard in part.shards}
        engines = [engine for engine in sorted(self._ready) if self._can_help(engine)]
        task.has_gaps, parts = self._leases.deal_left(task.kind, covered, engines)
        free = [engine for engine in parts if engine not in self._leases.by_engine]
        return [self._lease(task, engine, parts[engine]) for engine in free]

    def _poll_engines(self) -> list[Action]:
        """Act on time that has passed."""
        task = self._task
        if self.status == "starting":
            return self._begin_if_loaded()
        if task is None or self._committing:
            return []
        if self._refill_since is not None and not self._has_engines:
            return self._end_without_engines()
        if self._requested == "stop" and not self._can_advance():
            return self._end("stopped")
        return self._pause_if_answered(task) if task.failures else self._redo_late(task)

    def _redo_late(self, task: Task) -> list[Action]:
        """Let idle engines overtake those that are late or silent."""
        busy = self._leases.by_engine
        free = [e for e in sorted(self._ready) if e not in busy and self._can_help(e)]
        idle = [e for e in free if task.can_redo(e)]
        actions: list[Action] = []
        attempts: dict[int, list[Lease]] = {}
        for lease in self._leases.open if free else ():
            attempts.setdefault(lease.root, []).append(lease)
        for root, leases in sorted(attempts.items()):
            if not all(lease.engine in self._silent or self._leases.is_late(lease) for lease in leases):
                continue
            if idle:
                actions += self._speculate(task, leases[0], idle.pop(0), root=root)
            elif len(free) > sum(isinstance(action, Assign) for action in actions):
                actions += self._take_from_silent(task, leases)
        return actions

    def _speculate(self, task: Task, late: Lease, engine: int, *, root: int) -> list[Action]:
        """Lease again what a late engine holds, and what it has reported if that is lost should it lose the race."""
        shards = set(late.shards) if late.in_extra_slab else {*late.shards, *task.shards_of(late.engine)}
        task.has_rivals = True
        actions: list[Action] = [
            self._lease(task, engine, tuple(sorted(shards)), in_extra_slab=engine in task.touched, root=root)
        ]
        if late.engine not in self._reported_late:
            self._reported_late.add(late.engine)
            if self._was_reported("late", late.engine):
                why: Reason = "silent" if late.engine in self._silent else "late"
                note = Note("reassigned", engine=late.engine, reason=why, count=len(shards), other=engine)
                actions.append(note)
        return actions

    def _take_from_silent(self, task: Task, leases: Iterable[Lease]) -> list[Action]:
        """Take a lease away from engines that are silent for long, for one that is free but has only its own slab."""
        leases = [lease for lease in leases if lease.engine in self._silent]
        actions: list[Action] = []
        for lease in leases:
            num_taken = task.num_taken.get(lease.engine, 0)
            if self._leases.now - self._silent[lease.engine] >= 2**num_taken - 1:
                task.num_taken[lease.engine] = num_taken + 1
                actions.append(_reassigned(lease.engine, self._take_away(lease)))
        return actions + self._hand_out(task) if actions else []

    def _decline(self, engine: int, number: int) -> list[Action]:
        lease = self._leases.by_engine.get(engine)
        if lease is None or lease.number != number:
            return []
        del self._leases.by_engine[engine]
        if lease.is_open and self._task is not None:
            self._task.without_extra_slab.add(engine)
            self._take_away(lease)
        return self._go_on()

    # tasks

    def _next_task(self) -> list[Action]:
        """Begin the next task: here alone pause, stop, evaluation and the end are decided."""
        self._task = None
        if self._requested == "stop":
            return self._end("stopped")
        if self._owes_evaluation():
            return self._open("evaluation", self.step)
        if self.step == self.num_steps:
            return self._end("finished")
        if self._requested == "pause":
            return self._pause(Note("paused", reason="paused, as asked", step=self.step))
        return self._open("outputs" if self._gathers else "step", self.step + 1)

    def _owes_evaluation(self) -> bool:
        if self.evaluate_every is None or self.step == self._evaluated:
            return False
        return self.step == self.num_steps or self.step % self.evaluate_every == 0

    def _open(self, kind: WorkKind, step: int) -> list[Action]:
        if not self._has_engines:
            return self._end_without_engines()
        self._task = task = Task(kind, step)
        engines = sorted(self._ready)
        busy = self._leases.by_engine
        if busy or self._silent or self._retiring or self._spares or self._ending:
            engines = [engine for engine in engines if engine not in busy and self._can_help(engine)]
        if not engines:
            task.has_gaps = True
            return []
        if kind == "step" and self._gathers:
            return self._lease_to_holders(task, engines)
        return [self._lease(task, engine, part) for engine, part in self._leases.deal(kind, engines).items()]

    def _lease_to_holders(self, task: Task, engines: Iterable[int]) -> list[Action]:
        """Shards go where their outputs were computed; those of engines that are gone, or busy, to whoever is free."""
        holders = {engine: self._holders[engine] for engine in engines if engine in self._holders}
        leased: list[Action] = [self._lease(task, engine, tuple(sorted(shards))) for engine, shards in holders.items()]
        task.has_gaps = sum(map(len, holders.values())) < self.num_shards
        return leased + self._hand_out(task)

    def _take(self, event: WorkDone) -> list[Action]:
        lease = self._leases.behind(event)
        if lease is None:
            return []
        self._leases.close(lease, num_samples=event.num_samples)
        task = self._task
        if not lease.is_open or task is None:
            return self._go_on()
        self._reported_late.discard(lease.engine)
        task.add(lease)
        if task.has_rivals:
            for rival in self._leases.open:
                if rival.root == lease.root:
                    self._take_away(rival)
        actions: list[Action] = []
        if task.failures:
            actions = self._pause_if_answered(task)
        elif task.num_done == self.num_shards:
            self._committing = True
            if task.kind == "outputs":
                self._holders = {engine: task.shards_of(engine) for engine, _ in task.reports}
            actions = [Commit(task.kind, task.step, task.reports)]
        elif task.has_gaps or self._silent:
            actions = self._go_on()
        return actions + self._release_free() if self._retiring else actions

    def _advance(self, kind: WorkKind, step: int) -> list[Action]:
        if not self._committing:
            return []
        self._committing = False
        if kind == "outputs":
            return self._open("step", step)
        if kind == "step":
            self.step = step
        else:
            self._evaluated = step
        return self._next_task()

    def _compute_again(self) -> list[Action]:
        if not self._committing:
            return []
        self._committing = False
        return self._next_task()

    def _refuse(self, step: int, reason: str) -> list[Action]:
        if not self._committing:
            return []
        self._committing = False
        self._task = None
        if self._requested == "stop":
            return self._end("stopped")
        return self._pause(Note("paused", reason, reason="refused", step=step), is_error=True)

    # requests of the user

    def _pause(self, note: Note, *, is_error: bool = False) -> list[Action]:
        self._requested = None
        self.status = "paused"
        self.trouble = note if is_error else None
        return [note]

    def _ask(self, verb: Literal["pause", "resume", "stop"]) -> list[Action]:
        if verb == "stop" and (self.status != "running" or not (self._committing or self._can_advance())):
            return self._end("stopped")
        if verb == "resume":
            return self._resume()
        if self._requested != "stop":
            self._requested = verb
        return []

    def _resume(self) -> list[Action]:
        if self.status != "paused":
            self._requested = self._requested if self._requested == "stop" else None
            return []
        self._requested = None
        self.status = "running"
        self.trouble = None
        if not self._has_engines and not self._was_asked_for:
            self._refill_since = self._leases.now
        return [Note("resumed", reason="resumed", step=self.step), *self._next_task()]

    # failures and ends

    def _fail_on_engine(self, event: UserCodeFailed) -> list[Action]:
        if event.lease == 0 and event.engine in self._loading:
            return self._leave_out(event.engine, event.failure)
        lease, task = self._leases.by_engine.get(event.engine), self._task
        if lease is None or lease.number != event.lease:
            return []
        del self._leases.by_engine[event.engine]
        if lease.is_open and task is not None:
            task.failed_at = task.failed_at if task.failures else self._leases.now
            task.failures.append((event.engine, event.failure))
        return self._go_on() + self._release_free()

    def _leave_out(self, engine: int, failure: Failure) -> list[Action]:
        """Leave out an engine that could not load the run, which fails only if nobody could."""
        self._load_failures.append((engine, failure))
        self._was_asked_for = False
        self._last_loss = Note("left", engine=engine, reason="could not load", failures=((engine, failure),))
        return [self._last_loss, *self._drop(engine)]

    def _pause_if_answered(self, task: Task) -> list[Action]:
        """Pause, as user code has failed, unless another engine may still report that it failed there too."""
        if any(self._is_awaited(lease, task) for lease in self._leases.open):
            return []
        self._give_up()
        if self._requested == "stop":
            return self._end("stopped")
        return self._pause_for_replacement(task, failures=task.failures) + self._release_free()

    def _is_awaited(self, lease: Lease, task: Task) -> bool:
        if lease.engine in self._silent or self._leases.is_late(lease):
            return False
        return self._leases.may_be_late(lease) or self._leases.now - task.failed_at <= FAILED_SECONDS

    def _end_without_engines(self) -> list[Action]:
        """End a run whose last engine is gone: it has failed, unless the user took it away, or it is paused."""
        if self.status == "paused":
            return []
        if self._refill_since is not None:
            self._refill_since = self._task = None
            return self._pause(Note("paused", f"{REFILL_SECONDS:g} s", reason="nobody came", step=self.step))
        if self._was_asked_for:
            self._task = None
            return self._pause(Note("paused", reason="the last one left", step=self.step))
        if self.status == "starting" and self._load_failures:
            note = Note("failed", reason="nobody could load", failures=tuple(self._load_failures))
            return self._end("failed", note)
        return self._end("failed", Note("failed", reason="nobody is left", step=self.step, cause=self._last_loss))

    def _end(self, status: RunStatus, trouble: Note | None = None) -> list[Action]:
        self.status = status
        self.trouble = trouble
        self._task = None
        self._leases.by_engine.clear()
        released = [Release(engine) for engine in sorted(self._retiring)]
        self._retiring.clear()
        return [self.last_note, End(status, self.error, self.traceback), *released]

    @property
    def last_note(self) -> Note:
        """The note of how the run has ended."""
        return self.trouble or Note(self.status, reason="ended", step=self.step, count=self.num_steps)

    @property
    def last_word(self) -> str:
        """The same in words."""
        return text_of(self.last_note)

    @property
    def error(self) -> str:
        """The reason why it is paused or has failed, in words; empty if it is neither, or the user asked for it."""
        return "" if self.trouble is None else text_of(self.trouble)

    @property
    def traceback(self) -> str:
        """The traceback of what is in `error`."""
        return "" if self.trouble is None else traceback_of(self.trouble)


def _reassigned(engine: int, num_shards: int) -> Note:
    return Note("reassigned", engine=engine, reason="lost", count=num_shards)
