"""The heart of the hub: a state machine without I/O that decides who computes what, and when a step counts.

Events go in, actions come out; there is no clock, no socket, no thread, no tensor. One coordinator is one run.

    starting --all engines loaded--> running --last step, or stop--> finished | stopped
                                      |  ^
               refused step, or pause |  | resume
                                      v  |
                                     paused

    any state --user code failed, or no engine left--> failed

Within `running`, one *task* is under way: a training step or an evaluation. Its shards are leased to engines; a
shard whose engine is lost is leased again to a survivor; the task is committed once, when every shard has been
reported. A report that does not fit an open lease is ignored: that is how late and repeated messages are harmless.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from dnb.planning.shards import deal_shards
from dnb.records import ENDED, Failure, RunStatus, WorkKind

# Events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineJoined:
    """An engine is there, and has not loaded the run yet."""

    engine: int


@dataclass(frozen=True, slots=True)
class EngineLoaded:
    """An engine holds model and data, and can work."""

    engine: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """An engine died or left."""

    engine: int
    reason: str


@dataclass(frozen=True, slots=True)
class RetireEngine:
    """An engine is to leave; it is released when it holds no open lease."""

    engine: int


@dataclass(frozen=True, slots=True)
class RestEngine:
    """An engine is a spare: it loads the run, and gets no shards."""

    engine: int


@dataclass(frozen=True, slots=True)
class WakeEngine:
    """A spare takes part from now on."""

    engine: int


@dataclass(frozen=True, slots=True)
class WorkDone:
    """An engine reports shards of a task."""

    engine: int
    kind: WorkKind
    step: int
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UserCodeFailed:
    """User code raised on an engine; shards are empty if it was while loading."""

    engine: int
    step: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Committed:
    """What `Commit` asked for is done."""

    kind: WorkKind
    step: int


@dataclass(frozen=True, slots=True)
class CommitRefused:
    """The step's result must not be applied (a loss that is not finite)."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """The optimizer or scheduler raised."""

    step: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Asked:
    """The user asks for a change."""

    verb: Literal["pause", "resume", "stop"]


Event = (
    EngineJoined
    | EngineLoaded
    | EngineLost
    | RetireEngine
    | RestEngine
    | WakeEngine
    | WorkDone
    | UserCodeFailed
    | Committed
    | CommitRefused
    | CommitFailed
    | Asked
)


# Actions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadEngine:
    """Send model and data to an engine."""

    engine: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Let an engine compute shards of a task."""

    engine: int
    kind: WorkKind
    step: int
    shards: tuple[int, ...]
    fresh: bool  # the first shards of this task on this engine: its slab starts from zero


@dataclass(frozen=True, slots=True)
class Commit:
    """Reduce and apply a task, then answer with `Committed`, `CommitRefused` or `CommitFailed`."""

    kind: WorkKind
    step: int
    reports: tuple[tuple[int, tuple[int, ...]], ...]  # (engine, shards) of those that count, in order


@dataclass(frozen=True, slots=True)
class Release:
    """An engine that was asked to leave owes nothing any more: it may go."""

    engine: int


@dataclass(frozen=True, slots=True)
class Note:
    """Write an event into the run's history."""

    kind: str
    text: str
    engine: int | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The run has ended; engines may forget it."""

    status: RunStatus
    error: str = ""
    traceback: str = ""


Action = LoadEngine | Assign | Commit | Release | Note | End


# State ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Task:
    """A step or an evaluation under way: every shard is leased, or done, by exactly one engine."""

    kind: WorkKind
    step: int
    leases: dict[int, int] = field(default_factory=dict)  # open: shard -> engine
    reports: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # done: engine, shards
    touched: set[int] = field(default_factory=set)  # engines that were given shards

    def release(self, engine: int) -> list[int]:
        """Take back what a lost engine held; the shards to lease again.

        An engine that was still at work may have torn its slab, so what it had reported before is redone too;
        one that had reported everything left a whole slab, which still counts.
        """
        shards = [shard for shard, owner in self.leases.items() if owner == engine]
        if shards:
            shards += [shard for owner, part in self.reports if owner == engine for shard in part]
            self.reports = [report for report in self.reports if report[0] != engine]
        for shard in shards:
            self.leases.pop(shard, None)
        if shards:
            self.touched.discard(engine)
        return sorted(shards)

    def forget(self, engine: int) -> list[int]:
        """Drop what an engine reported; the shards to lease again."""
        shards = [shard for owner, part in self.reports if owner == engine for shard in part]
        self.reports = [report for report in self.reports if report[0] != engine]
        self.touched.discard(engine)
        return shards


class Coordinator:
    """Decides for one run.

    Args:
        num_steps: optimizer steps until the run is finished.
        num_shards: logical shards per step and per evaluation.
        evaluate_every: evaluate after each multiple of so many steps and after the last; None never does.
        engines: ids of the engines that take part from the start.
        step: committed by an earlier run that this one continues.
        evaluated: the last step after which that run had committed an evaluation.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        num_shards: int,
        evaluate_every: int | None,
        engines: Iterable[int],
        step: int = 0,
        evaluated: int = 0,
    ) -> None:
        self.num_steps = num_steps
        self.num_shards = num_shards
        self.evaluate_every = evaluate_every
        self.status: RunStatus = "starting"
        self.error = ""
        self.step = step  # committed
        self._evaluated = evaluated  # the last step after which an evaluation was committed
        self._loading: set[int] = set(engines)
        self._ready: set[int] = set()
        self._resting: set[int] = set()  # spares, loaded or not: they get no leases
        self._retiring: set[int] = set()  # asked to leave: they get no further leases
        self._task: _Task | None = None
        self._unowned: list[int] = []  # shards of the task that nobody holds, as no engine is ready
        self._wish: Literal["pause", "stop"] | None = None
        self._committing = False
        self._last_loss = ""

    def start(self) -> list[Action]:
        """The first actions."""
        return [LoadEngine(engine) for engine in sorted(self._loading)]

    def handle(self, event: Event) -> list[Action]:  # noqa: C901 - the table of events, in one place
        """Take one event, change state, and say what is to be done. Never raises on an event that comes late."""
        if self.status in ENDED:
            return []
        match event:
            case EngineJoined(engine):
                return self._join(engine)
            case EngineLoaded(engine):
                return self._load(engine)
            case EngineLost(engine, reason):
                return self._lose(engine, reason)
            case RetireEngine(engine):
                return self._retire(engine)
            case RestEngine(engine):
                self._resting.add(engine)
                return []
            case WakeEngine(engine):
                return self._wake(engine)
            case WorkDone():
                return self._take(event)
            case UserCodeFailed():
                return self._fail_on_engine(event)
            case Committed(kind, step):
                return self._advance(kind, step)
            case CommitRefused(step, reason):
                return self._refuse(step, reason)
            case CommitFailed(step, failure):
                return self._end("failed", f"step {step}: {failure.kind}: {failure.message}", failure.traceback)
            case Asked(verb):
                return self._ask(verb)

    @property
    def evaluated(self) -> int:
        """The last step after which an evaluation was committed."""
        return self._evaluated

    @property
    def working(self) -> frozenset[int]:
        """Engines that hold an open lease."""
        return frozenset(self._task.leases.values()) if self._task is not None else frozenset()

    @property
    def resting(self) -> frozenset[int]:
        """Spares of this run."""
        return frozenset(self._resting)

    @property
    def _workers(self) -> set[int]:
        """Engines that may be given shards."""
        return self._ready - self._resting - self._retiring

    def expects(self, report: WorkDone) -> bool:
        """Whether these very shards are leased to this engine now, so that its report will count."""
        task = self._task
        if task is None or self._committing or (report.kind, report.step) != (task.kind, task.step):
            return False
        if not report.shards or len(set(report.shards)) != len(report.shards):
            return False
        return all(task.leases.get(shard) == report.engine for shard in report.shards)

    # membership

    def _join(self, engine: int) -> list[Action]:
        if engine in self._loading | self._ready:
            return []
        self._loading.add(engine)
        return [LoadEngine(engine)]

    def _load(self, engine: int) -> list[Action]:
        if engine not in self._loading:
            return []
        self._loading.discard(engine)
        self._ready.add(engine)
        kind, more = ("spare", ", and rests") if engine in self._resting else ("joined", "")
        actions: list[Action] = [Note(kind, f"engine {engine} has model and data{more}", engine)]
        if self.status == "starting":
            return actions + self._begin_if_loaded()
        if self._task is not None and not self._committing:
            self._unowned.extend(self._task.forget(engine))  # what it reported in an earlier life is overwritten now
        return actions + self._lease_unowned()

    def _begin_if_loaded(self) -> list[Action]:
        if self.status != "starting" or self._loading or not self._workers:
            return []
        self.status = "running"
        return [
            Note("running", f"{len(self._workers)} engines, {self.num_shards} shards"),
            *self._next_task(),
        ]

    def _lose(self, engine: int, reason: str) -> list[Action]:
        if engine not in self._loading | self._ready:
            return []
        self._forget(engine)
        self._last_loss = f"engine {engine} {reason}"
        actions: list[Action] = [Note("died", self._last_loss, engine)]
        if self._committing:
            return actions  # what is being committed is whole; the next task sees who is left
        if not self._ready and not self._loading:
            return actions + self._end_without_engines()
        return actions + self._begin_if_loaded() + self._lease_again(engine)

    def _lease_again(self, lost: int) -> list[Action]:
        if self._task is None:
            return []
        shards = self._task.release(lost)
        if not shards:
            return []
        self._unowned.extend(shards)
        note = Note("reassigned", f"{len(shards)} shards of engine {lost} go to others", lost)
        return [note, *self._lease_unowned()]

    def _lease_unowned(self) -> list[Action]:
        """Lease shards that lost their engine, as soon as somebody is ready to take them."""
        if self._task is None or not self._workers:
            return []
        shards, self._unowned = sorted(self._unowned), []
        return self._lease(self._task, shards)

    def _forget(self, engine: int) -> None:
        for engines in (self._loading, self._ready, self._resting, self._retiring):
            engines.discard(engine)

    # those who leave, and spares

    def _retire(self, engine: int) -> list[Action]:
        if engine not in self._loading | self._ready:
            return []
        self._retiring.add(engine)
        return self._release_idle()

    def _release_idle(self) -> list[Action]:
        """Let those go who were asked to leave and have brought what they had; the last one leaves a paused run."""
        actions: list[Action] = []
        for engine in sorted(self._retiring - self.working):
            self._forget(engine)
            self._last_loss = ""
            actions += [Note("left", f"engine {engine} left, as asked", engine), Release(engine)]
        if not actions or self._committing:
            return actions
        return actions + (self._begin_if_loaded() if self._ready | self._loading else self._pause_without_engines())

    def _pause_without_engines(self) -> list[Action]:
        if self.status == "paused":
            return []
        self._task, self._unowned = None, []
        return self._pause(f"paused after step {self.step}: the last engine left. %dtrain add, then %dtrain resume")

    def _wake(self, engine: int) -> list[Action]:
        if engine not in self._resting:
            return []
        self._resting.discard(engine)
        if engine not in self._ready:
            return []  # it works as soon as it has loaded
        note = Note("joined", f"engine {engine}, a spare until now, takes part", engine)
        return [note, *self._begin_if_loaded(), *([] if self._committing else self._lease_unowned())]

    # tasks

    def _next_task(self) -> list[Action]:
        """Between two tasks: the only place where pause, stop, evaluation and the end are decided."""
        self._task = None
        if self._wish == "stop":
            return self._end("stopped")
        if self._owes_evaluation():
            return self._open("evaluation", self.step)
        if self.step == self.num_steps:
            return self._end("finished")
        if self._wish == "pause":
            return self._pause(f"paused after step {self.step}, as asked")
        return self._open("step", self.step + 1)

    def _owes_evaluation(self) -> bool:
        if self.evaluate_every is None or self.step == self._evaluated:
            return False
        return self.step == self.num_steps or self.step % self.evaluate_every == 0

    def _open(self, kind: WorkKind, step: int) -> list[Action]:
        if not self._ready and not self._loading:
            return self._end_without_engines() if self._last_loss else self._pause_without_engines()
        self._task = _Task(kind, step)
        self._unowned = list(range(self.num_shards))
        return self._lease_unowned()

    def _lease(self, task: _Task, shards: Iterable[int]) -> list[Action]:
        parts = deal_shards(tuple(shards), sorted(self._workers))
        actions: list[Action] = []
        for engine, part in parts.items():
            task.leases.update(dict.fromkeys(part, engine))
            actions.append(Assign(engine, task.kind, task.step, part, fresh=engine not in task.touched))
            task.touched.add(engine)
        return actions

    def _take(self, event: WorkDone) -> list[Action]:
        task = self._task
        if task is None or not self.expects(event):
            return []
        for shard in event.shards:
            del task.leases[shard]
        task.reports.append((event.engine, event.shards))
        if task.leases or self._unowned:
            return self._release_idle() if self._retiring else []
        self._committing = True
        commit = Commit(task.kind, task.step, tuple(sorted(task.reports)))
        return [*(self._release_idle() if self._retiring else []), commit]

    def _advance(self, kind: WorkKind, step: int) -> list[Action]:
        if not self._committing:
            return []
        self._committing = False
        if kind == "step":
            self.step = step
        else:
            self._evaluated = step
        return self._next_task()

    def _refuse(self, step: int, reason: str) -> list[Action]:
        if not self._committing:
            return []
        self._committing = False
        self._task = None
        if self._wish == "stop":
            return self._end("stopped")
        return self._pause(
            f"paused at step {step}: {reason}; nothing of this step was applied. "
            "run.set(lr=...) and run.resume() try it again, run.stop() keeps what was trained",
            error=reason,
        )

    # the user's wishes

    def _pause(self, text: str, *, error: str = "") -> list[Action]:
        self._wish = None
        self.status = "paused"
        self.error = text if error else ""
        return [Note("paused", text)]

    def _ask(self, verb: Literal["pause", "resume", "stop"]) -> list[Action]:
        if verb == "stop" and (self.status != "running" or not (self._workers or self.working or self._committing)):
            return self._end("stopped")
        if verb == "resume":
            return self._resume()
        if self._wish != "stop":
            self._wish = verb
        return []

    def _resume(self) -> list[Action]:
        if self.status != "paused":
            self._wish = self._wish if self._wish == "stop" else None
            return []
        self._wish = None
        self.status = "running"
        self.error = ""
        return [Note("resumed", f"resumed after step {self.step}"), *self._next_task()]

    # ends

    def _fail_on_engine(self, event: UserCodeFailed) -> list[Action]:
        if event.engine not in self._loading | self._ready:
            return []
        failure = event.failure
        place = f"step {event.step}" if event.step else "loading"
        text = f"{place} on engine {event.engine}: {failure.kind}: {failure.message}"
        return self._end("failed", text, failure.traceback)

    def _end_without_engines(self) -> list[Action]:
        return self._end("failed", f"no engine is left at step {self.step}: {self._last_loss}")

    def _end(self, status: RunStatus, error: str = "", traceback: str = "") -> list[Action]:
        self.status = status
        self.error = error
        self._task = None
        self._unowned = []
        text = error or f"{status} after step {self.step} of {self.num_steps}"
        return [Note(status, text), End(status, error, traceback)]
