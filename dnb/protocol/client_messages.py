"""Messages between kernels and hub, in both directions."""

from __future__ import annotations

from typing import Literal

import msgspec

from dnb.protocol.base import Message, Record
from dnb.protocol.measurements import Prediction, RunEvent, StepTimeline, UsageRow, WorkerTotals
from dnb.protocol.memory import TensorSlot
from dnb.protocol.pool import EngineStatus, PoolFacts, Process
from dnb.protocol.run import RunStatus


class Hello(Message, frozen=True):
    """A kernel says who it is; the pool watches whether the one that steers it is alive."""

    owner: Process
    # "steer" is refused while another kernel does
    mode: Literal["steer", "take over", "watch"] = msgspec.field(default="steer", name="wish")
    format: int = 1
    version: str = ""  # of the kernel's dnb


class GetPool(Message, frozen=True):
    """Ask for the pool and its engines."""


class Submit(Message, frozen=True):
    """Start a run. Frames: spec, job pickle, data pickle, signature."""


class GetRun(Message, frozen=True):
    """A request for a run's newest state and rows. Answered by `RunState` and raw float64 columns."""

    run: str
    seen: dict[str, int]  # rows already held, per column
    seen_events: int
    seen_timeline: int = 0  # its step
    seen_usage: int = 0  # rows


class Control(Message, frozen=True):
    """Pause, resume or stop a run between two steps."""

    run: str
    verb: Literal["pause", "resume", "stop"]


class SetOptions(Message, frozen=True):
    """Change what may change while a run goes on: lr, clip_norm, or a number of the optimizer's groups."""

    run: str
    options: dict[str, float | None]


class ReplaceFunctions(Message, frozen=True):
    """Replace a run's step or loss function. Frames: their pickle, signature."""

    run: str


class GetState(Message, frozen=True):
    """Parameters and the states of optimizer and scheduler, as frames."""

    run: str
    optimizer: bool
    scheduler: bool = False
    kept: bool = False  # by functions of the user that the hub calls


class GetGradients(Message, frozen=True):
    """A request for the gradient samples of a run's first steps. Answered by `GradientRows`."""

    run: str


class GetJob(Message, frozen=True):
    """A request for what `fit` has sent, of a kernel that found the run again. Answered by `JobFrames`."""

    run: str


class TakeCheckpoint(Message, frozen=True):
    """Write a checkpoint after the step under way. Answered by CheckpointState, before it is durable."""

    run: str
    path: str | None  # on the hub's host; None is in the run's folder


class GetCheckpoint(Message, frozen=True):
    """A request for the outcome of a `TakeCheckpoint`. Answered by `CheckpointState`."""

    run: str
    ticket: int


class GetMembers(Message, frozen=True):
    """Ask who is in the pool. Cheap, unlike `GetPool`, which looks at every process. Answered by `Members`."""


class Retire(Message, frozen=True):
    """Let engines leave: each brings what it computes, then its process ends."""

    engines: tuple[int, ...]
    force: bool  # also the last one of an active run


class KeepSpares(Message, frozen=True):
    """From now on newcomers rest until there are so many spares."""

    number: int


class KeepRestart(Message, frozen=True):
    """Remember, for whichever kernel steers, whether engines that die are replaced."""

    policy: Literal["never", "always"]


class InjectFault(Message, frozen=True):
    """Harm an engine on purpose."""

    verb: Literal["kill", "stop", "slow"]
    engine: int
    amount: float = 0.0  # seconds that it is stopped; how many times as slow


class KillHub(Message, frozen=True):
    """Harm the hub on purpose: it ends by SIGKILL when it has answered."""


class Shutdown(Message, frozen=True):
    """End the pool."""


Request = (
    Hello
    | GetPool
    | GetMembers
    | Retire
    | KeepSpares
    | KeepRestart
    | InjectFault
    | KillHub
    | Submit
    | GetRun
    | Control
    | SetOptions
    | ReplaceFunctions
    | GetState
    | GetGradients
    | GetJob
    | TakeCheckpoint
    | GetCheckpoint
    | Shutdown
)
# What may be asked twice, as when the hub died before it answered: the second time changes nothing. A run is known by
# its id.
Repeatable = (
    Hello
    | GetPool
    | GetMembers
    | Retire
    | KeepSpares
    | KeepRestart
    | Submit
    | GetRun
    | SetOptions
    | ReplaceFunctions
    | GetState
    | GetGradients
    | GetJob
    | TakeCheckpoint
    | GetCheckpoint
    | Shutdown
)


class Done(Message, frozen=True):
    """The request was carried out."""


class Refused(Message, frozen=True):
    """The request was refused; says which error to raise."""

    error: str  # name of a class in dnb.errors
    message: str
    traceback: str = ""  # of user code in the hub


class PoolState(Message, frozen=True):
    """The pool and its living engines."""

    facts: PoolFacts
    engines: tuple[EngineStatus, ...]
    returning: tuple[int, ...] = ()  # engines of the hub before that may join this one at any moment


class Members(Message, frozen=True):
    """The pool's engines and spares, and the counts of those that died or are to be replaced."""

    workers: tuple[int, ...]
    spares: tuple[int, ...]
    leaving: tuple[int, ...]  # asked to, and still at work
    wanted_spares: int
    num_died: int  # since the pool was started; neither those that left on request, nor those that came back
    num_killed: int  # of these, by chaos
    restart: Literal["never", "always"] = "never"
    last_restart: str = ""  # why the hub was started again, if it was
    num_owed: int = 0  # to be started whatever the policy, in the place of those that a run's work has ended
    num_threads: int = 0  # for torch, of the engine that joined last


class Column(Record, frozen=True):
    """One column of the history, sent as raw float64."""

    name: str
    by: Literal["step", "evaluation"]
    num_rows: int  # rows of the frame that follows


class RunState(Message, frozen=True):
    """Frames: one float64 array per column; evaluation columns interleave (step, value)."""

    status: RunStatus
    step: int
    num_steps: int
    steps_per_epoch: int
    first_step: int  # committed by the run that this one continues; else 0
    started: float  # seconds since the epoch: when the run was submitted
    elapsed_seconds: float  # frozen when the run ends
    error: str
    remote_traceback: str
    columns: tuple[Column, ...]
    workers: tuple[WorkerTotals, ...]
    events: tuple[RunEvent, ...]
    timeline: StepTimeline | None = None  # if there is a newer one
    prediction: Prediction | None = None
    usage: tuple[UsageRow, ...] = ()  # that are new
    batch_size: int = 0
    num_samples: int = 0  # of the training set
    num_shards: int = 0
    num_owed: int = 0  # engines that the run's work has ended, and that nobody has replaced yet
    hub: Process | None = None


class StateTree(Message, frozen=True):
    """A nested state as msgpack, its tensors replaced by {"tensor": i}. Frames: their bytes."""

    tree: bytes
    tensors: tuple[TensorSlot, ...]


class GradientRows(Message, frozen=True):
    """Some elements of all gradients, step by step. Frame: float64; of each step the loss, the norm, the elements."""

    steps: tuple[int, ...]
    names: tuple[str, ...]  # of the parameters, in the order of their elements


class JobFrames(Message, frozen=True):
    """Frames: spec, job, data and signature as a client signed them, and the memory with the job's tensors."""


class CheckpointState(Message, frozen=True):
    """The progress of a requested checkpoint."""

    ticket: int
    state: Literal["waiting", "writing", "durable", "failed"]
    path: str = ""
    step: int = 0
    error: str = ""  # name of a class in dnb.errors
    message: str = ""


Reply = Done | Refused | PoolState | Members | RunState | StateTree | CheckpointState | GradientRows | JobFrames
