"""The events that go into the coordinator, and the actions that come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import Failure, RunStatus

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
    is_slab_lost: bool = False  # even what it had reported whole does not count any more
    is_suspect: bool = False  # nobody is known to have ended it: what it computed may have done so
    is_crash: bool = False  # nothing but what it ran can have ended it
    member: int | None = None  # of a team: the engine that is lost


@dataclass(frozen=True, slots=True)
class EngineEnding:
    """An engine is about to be lost, for no fault of what it may be given now: it gets nothing more."""

    engine: int


@dataclass(frozen=True, slots=True)
class EngineSilent:
    """An engine has stopped to beat and is not at work: it is not ended, but others need not wait for it."""

    engine: int
    reason: str
    is_asleep: bool = False  # it was not stopped: a call of user code may sleep, and hold the interpreter's lock


@dataclass(frozen=True, slots=True)
class EngineBusy:
    """An engine has stopped to beat but is at work: a call of user code holds the interpreter's lock."""

    engine: int


@dataclass(frozen=True, slots=True)
class EngineHeard:
    """An engine that was silent, or busy, beats again."""

    engine: int


@dataclass(frozen=True, slots=True)
class RetireEngine:
    """The user wants to have an engine back: let it finish what it has, then `Release` it."""

    engine: int


@dataclass(frozen=True, slots=True)
class MakeSpare:
    """An engine is a spare: it loads the run, and gets no shards."""

    engine: int


@dataclass(frozen=True, slots=True)
class ActivateSpare:
    """A spare takes part from now on."""

    engine: int


@dataclass(frozen=True, slots=True)
class WorkDone:
    """An engine reports the shards of a lease."""

    engine: int
    lease: int
    kind: WorkKind
    step: int
    shards: tuple[int, ...]
    num_samples: int | None = None  # of these shards, where it is known


@dataclass(frozen=True, slots=True)
class LeaseDeclined:
    """There is no room for the slab that a lease needs besides the engine's own."""

    engine: int
    lease: int


@dataclass(frozen=True, slots=True)
class UserCodeFailed:
    """User code raised on an engine; step and lease are 0 if it was while loading."""

    engine: int
    step: int
    failure: Failure
    lease: int = 0


@dataclass(frozen=True, slots=True)
class PeerWasLost:
    """An engine of a team could not answer a lease, as another one of it did not answer to it."""

    engine: int
    lease: int | None  # None: while it was sitting down


@dataclass(frozen=True, slots=True)
class Committed:
    """The answer that a task which `Commit` asked for is committed."""

    kind: WorkKind
    step: int


@dataclass(frozen=True, slots=True)
class CommitRefused:
    """The step's result must not be applied (a loss that is not finite)."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class CommitDeferred:
    """The step is to be computed once more: the memory that its result lies in has changed."""

    step: int


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """User code in the hub raised in a step: the optimizer or scheduler, or the sampler before there was anything."""

    step: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Asked:
    """The user asks for a change."""

    verb: Literal["pause", "resume", "stop"]


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened but time."""


Event = (
    EngineJoined
    | EngineLoaded
    | EngineLost
    | EngineEnding
    | EngineSilent
    | EngineBusy
    | EngineHeard
    | RetireEngine
    | MakeSpare
    | ActivateSpare
    | WorkDone
    | LeaseDeclined
    | UserCodeFailed
    | PeerWasLost
    | Committed
    | CommitRefused
    | CommitDeferred
    | CommitFailed
    | Asked
    | Tick
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
    lease: int  # unlike any other's; the answer names it
    in_extra_slab: bool = False  # into another slab, as what the engine has reported lies in its own


@dataclass(frozen=True, slots=True)
class Commit:
    """Reduce and apply a task, then answer with `Committed`, or another event whose name begins with "Commit"."""

    kind: WorkKind
    step: int
    reports: tuple[tuple[int, tuple[int, ...]], ...]  # (engine, shards) of those that count, in order


# Why a note is written: `dnb.hub.scheduling.note_words` has a sentence for each.
Reason = Literal[
    "told",  # in the note's own words
    "loaded",
    "loaded as a spare",
    "woken",
    "silent at the start",
    "busy at the start",
    "begins",
    "found",
    "held up its team",
    "in a call",
    "heard",
    "left, as asked",
    "could not load",
    "lost",
    "late",
    "silent",
    "paused, as asked",
    "nobody came",
    "the last one left",
    "refused",
    "step failed",
    "evaluation failed",
    "resumed",
    "commit failed",
    "nobody could load",
    "nobody is left",
    "ended",
]


@dataclass(frozen=True, slots=True)
class Note:
    """Write an event into the run's history: its facts, which `dnb.hub.scheduling.note_words` puts into words."""

    kind: str
    detail: str = ""  # in the words of whoever found it
    engine: int | None = None  # or the team
    reason: Reason = "told"
    step: int = 0
    count: int = 0  # of shards, engines or steps
    num_shards: int = 0  # of a batch
    other: int | None = None  # the engine that computes what another one holds
    failures: tuple[tuple[int, Failure], ...] = ()  # of user code, with the engine of each
    cause: Note | None = None
    traceback: str = ""  # if there are no failures that have one


@dataclass(frozen=True, slots=True)
class Release:
    """The run needs an engine no more: it is free to go."""

    engine: int


@dataclass(frozen=True, slots=True)
class EvictEngine:
    """End an engine's process, as others cannot go on while it stands still."""

    engine: int


@dataclass(frozen=True, slots=True)
class Replace:
    """Fill the pool up again by so many engines, whether it replaces the dead or not."""

    number: int


@dataclass(frozen=True, slots=True)
class Disband:
    """A team will never come together: whoever waits for its other members need not."""

    team: int


@dataclass(frozen=True, slots=True)
class End:
    """The run has ended; engines may forget it."""

    status: RunStatus
    error: str = ""
    traceback: str = ""


Action = LoadEngine | Assign | Commit | Note | Release | EvictEngine | Replace | Disband | End
