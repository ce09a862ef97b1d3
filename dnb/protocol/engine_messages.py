"""Messages between engines and hub, in both directions."""

from __future__ import annotations

from dnb.protocol.base import Message, Record
from dnb.protocol.measurements import StageTrace, Sums, Telemetry, WorkKind
from dnb.protocol.memory import Layout, SegmentRef
from dnb.protocol.pool import EngineFacts, Process
from dnb.protocol.run import Failure, Partition, TransportKind


class WireOffer(Record, frozen=True):
    """The address at which an engine connects its wire, and the secret by which it proves its identity there."""

    url: str  # "unix://NAME" | "tcp://HOST:PORT"
    token: str
    other_url: str = ""  # if the first does not answer
    sealed: bool = False  # what goes over TCP is: see `dnb.transport.sockets.sealing`


class RankAssignment(Record, frozen=True):
    """An engine's place in a team, and where it meets the others."""

    team: int  # a number that never comes again
    rank: int
    partition: Partition
    host: str  # of the store by which the team's process group finds itself
    port: int


class Join(Message, frozen=True):
    """An engine asks to be taken in, or to be taken back."""

    facts: EngineFacts
    num_wires: int = 0  # that it has lost: who asks twice with one number is taken in once
    format: int = 1
    version: str = ""  # of the engine's dnb


class Attach(Message, frozen=True):
    """The first record on a wire: who calls, and the answer to the hub's challenge."""

    engine: int
    proof: str
    nonce: str = ""  # drawn by the engine for this wire


class NoSharedMemory(Message, frozen=True):
    """An engine cannot map the hub's memory: load it again over a socket."""

    run: str
    reason: str


class Loaded(Message, frozen=True):
    """An engine holds model and data of a run."""

    run: str
    team: int | None = None  # that it has joined, if it has a rank in one


class LoadFailed(Message, frozen=True):
    """User code raised while model or data were unpickled."""

    run: str
    failure: Failure
    team: int | None = None


class OutputLeaf(Record, frozen=True):
    """One tensor of what models gave or are held against, gathered for a loss over the whole batch."""

    dtype: str  # "float32"
    shape: tuple[int, ...]
    has_rows: bool  # one for each sample; else it is the same whatever the samples are


class OutputPiece(Message, frozen=True):
    """A part of what stands behind the report of a lease, and is too long for one record. Raw bytes: the part."""

    run: str
    lease: int


class WorkReport(Message, frozen=True):
    """One engine's account of its part of one step, or of one evaluation.

    Raw bytes: the rows of `outputs`, one tensor after the other, behind those that came as `OutputPiece`s.
    """

    run: str
    lease: int  # that is answered
    kind: WorkKind
    step: int
    shards: tuple[int, ...]  # logical shards whose gradients are in the slab
    parts: tuple[Sums, ...]  # one per shard of an exact run, else one for all
    is_sum: bool  # the gradients in the slab are of a total, not yet divided by the weight
    unused: tuple[int, ...]  # slots of the gradient layout that got no gradient
    telemetry: Telemetry | None
    note: str = ""  # for the run's events
    probe: float | None = None
    digests: bytes = b""  # uint32 per slot of the parameter layout, if asked for
    trace: StageTrace | None = None  # of a pipeline's step, if asked for
    outputs: tuple[OutputLeaf, ...] = ()  # of "outputs": what the model gave, then targets
    states: bytes = (
        b""  # `dnb.transport.pickling.module_states.LooseStates` that have changed, of the batch's first shard
    )
    thawed: tuple[str, ...] = ()  # parameters without a slot that got a gradient, as user code lets them train by now
    frozen: tuple[int, ...] = ()  # slots of the gradient layout that user code has frozen, in one of the parts at least
    more_output: dict[str, int] = {}  # printed lines since the last report that were only counted, by kind


# Kind of the failure of an engine that could not go on because another one of its team was gone: its error's class.
PEER_LOST = "PeerLostError"


class WorkFailed(Message, frozen=True):
    """User code raised in a step or an evaluation."""

    run: str
    lease: int  # that is answered; 0 if it was a `Diagnose`
    kind: WorkKind
    step: int
    shards: tuple[int, ...]
    failure: Failure


class Diagnosis(Message, frozen=True):
    """The origin of a gradient that was not finite: its shard, its parameter and the kind of value."""

    run: str
    step: int
    shard: int | None  # None: it could not be reproduced
    parameter: str
    kind: str  # "NaN" | "inf"


class Printed(Message, frozen=True):
    """Lines that user code printed on an engine, or other notes from there, for the run's events."""

    run: str
    lines: tuple[str, ...]
    kind: str = "output"  # of the run's event
    more: dict[str, int] = {}  # lines that were only counted, by kind, where no report says it


class Fault(Message, frozen=True):
    """An engine ends of an error that is no user's: its last word."""

    engine: int
    failure: Failure


class Heartbeat(Message, frozen=True):
    """An engine's sign of life, sent about ten times a second, whatever it is computing."""

    engine: int
    process: Process
    is_at_work: bool = False  # sent for it by its watcher: it cannot send, but works


EngineMessage = (
    Join
    | Heartbeat
    | Fault
    | Printed
    | Attach
    | NoSharedMemory
    | Loaded
    | LoadFailed
    | OutputPiece
    | WorkReport
    | WorkFailed
    | Diagnosis
)


class Welcome(Message, frozen=True):
    """The hub has taken the engine in."""


class Rejoin(Message, frozen=True):
    """A new hub got a heartbeat of an engine that it does not know: it shall join."""

    generation: int  # which hub of the pool asks, counted from 0


class Challenge(Message, frozen=True):
    """The first record of the hub on a wire."""

    nonce: str


class Load(Message, frozen=True):
    """Take part in a run. Frames: spec and job pickle and data pickle as signed by the client, signature."""

    run: str
    transport: TransportKind
    wire: WireOffer
    parameters: SegmentRef
    parameter_layout: Layout
    gradient_layout: Layout
    buffer_layout: Layout  # in the slab, behind the gradients
    assignment: RankAssignment | None = None  # in a team; None: alone


class AddSlabs(Message, frozen=True):
    """More slabs for an engine; they are numbered in the order in which they are added."""

    run: str
    slabs: tuple[SegmentRef, ...]  # over a socket only their number counts: the engine makes its own


class Thaw(Message, frozen=True):
    """Let parameters train that were frozen: slabs are laid out anew, and all that were added before are gone."""

    run: str
    gradient_layout: Layout
    buffer_layout: Layout


class Freeze(Message, frozen=True):
    """Let these parameters be frozen, of those that have a slot, and all others train."""

    run: str
    names: tuple[str, ...]


class Shipped(Message, frozen=True):
    """All pieces that an engine without shared memory needs to load a run have been sent."""

    run: str


class Gathered(Record, frozen=True):
    """The input of a step's loss: outputs and targets of the whole batch, in the order of its shards."""

    leaves: tuple[OutputLeaf, ...]
    shard_sizes: tuple[int, ...]  # of all shards
    groups: tuple[tuple[int, ...], ...]  # shards that went through one forward, of those in which this work has a part


class Work(Message, frozen=True):
    """Compute these shards. Raw bytes: int64 sample indices of all of them, in order.

    Behind them, if there is something gathered: the indices of the whole batch, and the leaves, each from a multiple of
    `LEAF_ALIGNMENT` on.
    """

    run: str
    lease: int  # unlike any other's of this run; the answer names it
    kind: WorkKind
    step: int
    shards: tuple[int, ...]
    shard_sizes: tuple[int, ...]
    slabs: tuple[int, ...]  # one per shard of an exact run, else one for all
    batch_samples: int  # of the whole global batch
    fresh: bool  # zero the slab first; else add to what is there
    probe: bool = False  # report the loss of the first samples, to be held against other engines
    check_copy: bool = False  # report digests of the parameters that are not the hub's own memory
    trace: bool = False  # report what was done when
    gathered: Gathered | None = None  # for a step whose loss looks at the whole batch
    states: bytes = b""  # all `LooseStates`, if they have changed since the last work


class Diagnose(Message, frozen=True):
    """Compute a step's shards again, one by one, and say whose gradient is not finite. Raw bytes as of `Work`."""

    run: str
    step: int
    shards: tuple[int, ...]
    shard_sizes: tuple[int, ...]
    slab: int
    batch_samples: int


class FunctionsReplaced(Message, frozen=True):
    """Go on with another step or loss function. Raw bytes: their pickle, as the client signed it."""

    run: str
    signature: bytes


class Unload(Message, frozen=True):
    """Forget a run."""

    run: str


class Slow(Message, frozen=True):
    """Compute so many times as slowly, on purpose."""

    factor: float  # 1 is as fast as can be


class Exit(Message, frozen=True):
    """End the process: the pool is shut down, or the engine was asked to leave it."""


HubMessage = Welcome | Rejoin | Load | Unload | Slow | Exit
WireMessage = AddSlabs | Thaw | Freeze | Shipped | Work | Diagnose | FunctionsReplaced
