"""Frozen facts that cross processes; every one is typed, and validated where it arrives."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

RunStatus = Literal["starting", "running", "paused", "failed", "stopped", "finished"]
# "outputs" is the first half of a step whose loss looks at the whole batch: forward alone.
WorkKind = Literal["step", "evaluation", "outputs"]
TransportKind = Literal["memory", "socket"]
# How losses of parts are put together: a mean over samples, a mean over the weights of targets, or a sum.
Reduction = Literal["samples", "targets", "sum"]
EngineState = Literal["ready", "busy", "hung", "spare"]
WorkerState = Literal["ready", "busy", "spare", "dead", "left"]
ENDED: frozenset[str] = frozenset({"failed", "stopped", "finished"})


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of plain facts."""


class Message(Record, frozen=True, tag=True):
    """Base of what is sent alone: its class name travels as the tag."""


# Facts ---------------------------------------------------------------------------------------


class Process(Record, frozen=True):
    """One process on one host, so that a recycled pid is never taken for it."""

    host: str
    pid: int
    create_time: float  # seconds since the epoch, as psutil gives it
    # Two containers may share a name and a home, and a host keeps its name over a reboot. Empty: not known.
    boot_id: str = ""  # of the host's kernel
    pid_namespace: str = ""  # in which the pid counts


class EngineFacts(Record, frozen=True):
    """What an engine says of itself when it joins."""

    engine: int
    process: Process
    cores: int  # threads given to torch
    memory_bytes: int  # physical memory of its host
    device: str
    torch_version: str


class EngineStatus(Record, frozen=True):
    """An engine as the hub sees it now."""

    facts: EngineFacts
    state: EngineState
    rss_bytes: int | None = None
    messages_in: int = 0  # from the engine to the hub, since it joined
    messages_out: int = 0  # from the hub to the engine


class Address(Record, frozen=True):
    """Where the hub listens and what one needs to be let in (Z85 CurveZMQ keys)."""

    url: str
    server_public: str
    public: str
    secret: str
    local: str = ""  # where it listens for processes of its host


class HubRestart(Record, frozen=True):
    """One time that the hub has ended against its will, and another one took its place."""

    time: float  # seconds since the epoch
    reason: str  # "ValueError: no such thing (in _tick (service.py:700))"
    traceback: str = ""  # empty if it was killed


class PoolFacts(Record, frozen=True):
    """A pool as it lies on disk, enough to find every process it owns."""

    cluster_id: str
    guardian: Process  # the hub's parent, which starts it again: the pool lives as long as it does
    hub: Process
    controller: Process
    helpers: tuple[Process, ...]  # other children of the controller and of the engines
    engines: tuple[EngineFacts, ...]
    owner: Process | None  # the kernel that may steer it
    run: str | None = None  # name of the run that the hub holds, active or ended
    run_status: RunStatus | None = None
    returning: tuple[EngineFacts, ...] = ()  # of the hub before, and not back yet
    restarts: tuple[HubRestart, ...] = ()  # of the hub, the last ones
    folders: tuple[str, ...] = ()  # of its shared memory; () in a record of an older dnb
    format: int = 1  # as `dnb.versions.POOL_FORMAT`; likewise in every record that has one
    version: str = ""  # of the dnb that wrote this; empty: an early one


class TensorSlot(Record, frozen=True):
    """Where one tensor lies in a flat buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32"
    offset_bytes: int


class Region(Record, frozen=True):
    """All slots of one dtype, as one flat tensor."""

    dtype: str
    offset_bytes: int
    num_elements: int


class Layout(Record, frozen=True):
    """A flat buffer cut into tensors, grouped by dtype."""

    slots: tuple[TensorSlot, ...]
    regions: tuple[Region, ...]
    num_bytes: int


class SegmentRef(Record, frozen=True):
    """A piece of shared memory, by the file that backs it."""

    path: str
    num_bytes: int


class BufferRef(Record, frozen=True):
    """Where one out-of-band buffer of a parcel lies in its segment."""

    offset_bytes: int
    num_bytes: int


class ParcelRef(Record, frozen=True):
    """A pickle without its tensors, and where those lie."""

    buffers: tuple[BufferRef, ...]
    arrays: tuple[int, ...]  # those of `buffers` that are pickle's own out-of-band buffers, in order
    segment: SegmentRef | None


class Failure(Record, frozen=True):
    """An exception of user code, as text."""

    kind: str  # "IndexError"
    message: str
    traceback: str
    place: str = ""  # "shard 3, sample 812"
    whole: str = ""  # if message or traceback were cut: all of it, which the hub puts into a file


class WireOffer(Record, frozen=True):
    """Where an engine connects its wire, and the secret that lets it prove who it is."""

    url: str  # "unix://NAME" | "tcp://HOST:PORT"
    token: str
    other_url: str = ""  # if the first does not answer
    sealed: bool = False  # what goes over TCP is: see `dnb.transport.sealing`


class RunEvent(Record, frozen=True):
    """Something that happened to a run: joined, left, died, paused, failed, finished, ..."""

    kind: str
    text: str
    step: int
    time: float  # seconds since the epoch
    engine: int | None = None


class Sums(Record, frozen=True):
    """What becomes the mean loss and the mean metrics, once the sums of all engines are added up."""

    loss_total: float
    loss_weight: float  # samples, or what a step function's Sum weighs
    metric_totals: dict[str, float]
    metric_weights: dict[str, float]  # samples, or what a step function's Sum weighs
    num_samples: int
    unit: float = 1.0  # the gradient of a Sum's total is so many times that in the slab


class Telemetry(Record, frozen=True):
    """What an engine measured since its last report; all times in seconds."""

    compute_seconds: float
    data_seconds: float
    rss_bytes: int | None
    cpu_percent: float | None
    start_rss_bytes: int | None = None  # before it loaded the run
    peak_rss_bytes: int | None = None  # since then
    peak_private_bytes: int | None = None  # of what it shares with nobody


class WorkerTotals(Record, frozen=True):
    """One engine's account of a run so far; all times in seconds."""

    engine: int
    host: str
    pid: int
    state: WorkerState
    compute_seconds: float
    data_seconds: float
    wait_seconds: float  # for other engines or the hub, while it had a part in a step
    alive_seconds: float  # since it joined the run; what is none of the above was idle
    cpu_percent: float | None
    rss_bytes: int | None
    samples: int
    steps: int
    start_rss_bytes: int | None = None  # as of `Telemetry`
    peak_rss_bytes: int | None = None
    peak_private_bytes: int | None = None
    device: str | None = None  # None of these is known of an engine that was not heard since the hub began
    cores: int | None = None  # threads given to torch
    memory_bytes: int | None = None  # physical memory of its host
    heartbeat_age_seconds: float | None = None  # since it was last heard; None once it is gone
    shards: tuple[int, ...] | None = None  # that it holds now


class UsageRow(Record, frozen=True):
    """How engines spent a span of a run, in seconds; those that were gone at its end are left out."""

    begin_seconds: float  # since the run was submitted
    end_seconds: float
    step: int  # committed at its end
    engines: tuple[int, ...]
    compute: tuple[float, ...]
    wait: tuple[float, ...]
    data: tuple[float, ...]
    idle: tuple[float, ...]


class Prediction(Record, frozen=True):
    """What a plan says of the run that follows it."""

    batch_size: int
    step_seconds: float
    compute_seconds: float  # until the last gradient is there
    bubble: float  # share of the engines' time in which they wait for each other
    stage_bytes: tuple[int, ...]  # parameters, gradients and activations, of an engine of each stage


ActionKind = Literal["forward", "backward", "backward-input", "backward-weight", "send", "wait"]


class Action(NamedTuple):
    """One bar of a timeline; the times are in seconds."""

    kind: ActionKind
    stage: int
    micro_batch: int  # -1: of several
    begin: float
    end: float


class StageTraffic(Record, frozen=True):
    """What one stage gave to other engines in a step; a neighbour on the same engine gets it for nothing."""

    stage: int
    forward_bytes: int  # activations
    backward_bytes: int  # gradients of what it was given


class StageTrace(Record, frozen=True):
    """What one engine of a pipeline did in one step, by its host's monotonic clock."""

    begin: float
    end: float
    cpu_seconds: float  # of all threads of the process meanwhile
    num_micro_batches: int
    actions: tuple[Action, ...]
    traffic: tuple[StageTraffic, ...]


class EngineTimeline(Record, frozen=True):
    """What one engine of a pipeline did in one step; times in seconds from the step's begin."""

    engine: int
    team: int  # which of the run's pipelines, counted from 0
    rank: int  # its place there
    cpu_seconds: float  # that its process got meanwhile, of all cores
    actions: tuple[Action, ...]  # in order, without gaps
    traffic: tuple[StageTraffic, ...]  # of its stages, in the whole step
    grown_bytes: int | None = None  # most resident memory so far, beyond what the process had before the run


class StepTimeline(Record, frozen=True):
    """One step of all pipelines of a run, and what the steps that were looked at had in common."""

    step: int
    schedule: str  # of the partition; a batch that is too small for it goes through by GPipe
    num_stages: int
    num_micro_batches: int
    engines: tuple[EngineTimeline, ...]
    median_bubble: float  # of the last steps that were looked at
    median_seconds: float  # that a pipeline took for them, without the hub's part
    num_sampled: int


class CheckpointPolicy(Record, frozen=True):
    """Which checkpoints a run writes by itself, and which of them it keeps."""

    every: int  # steps
    keep: int  # the last so many
    best: str | None  # and the best by this: see `dnb.planning.retention.read_goal`


class PlainJob(Record, frozen=True):
    """What of the user's objects can be said without pickle, so that a resume given the rest opens none."""

    loss: str | None  # name in torch.nn.functional
    optimizer: str | None
    lr: float | None
    metrics: tuple[str, ...]
    shuffle: bool
    drop_last: bool
    others: tuple[str, ...]  # arguments of `fit` that are objects, not words


class ResumeFrom(Record, frozen=True):
    """The checkpoint that a run continues."""

    folder: str  # on the hub's host; it was verified
    step: int
    notes: tuple[str, ...]  # for the run's events
    digest: str = ""  # of its manifest as it was verified


ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
# By outputs, which stay divided or are gathered ("_rep"); by inputs, which come divided or are cut ("_rep").
TensorStyle = Literal["colwise", "colwise_rep", "rowwise", "rowwise_rep"]


class Partition(Record, frozen=True):
    """How a model is divided over the engines of a team that computes together."""

    # "synced": the model is whole on all engines, and the batch is shared by those that wait for each other in forward.
    kind: Literal["pipeline", "tensor", "synced"]
    num_engines: int  # of the team
    num_stages: int = 1  # of a pipeline; a multiple of its engines: stage s is on engine s % num_engines of the team
    # Names of the modules at which stages 1, 2, ... begin; empty: the user's own `Job.stages`.
    cuts: tuple[str, ...] = ()
    schedule: ScheduleName = "1f1b"
    num_micro_batches: int = 1
    # Of tensor parallelism: how each layer that is divided is, by its name; all others are whole on every engine.
    styles: dict[str, TensorStyle] = {}
    # Numbers that a forward reads and of which an engine has its share, such as "blocks.0.num_heads".
    shares: dict[str, int] = {}


class Seat(Record, frozen=True):
    """An engine's place in a team, and where it meets the others."""

    team: int  # a number that never comes again
    rank: int
    partition: Partition
    host: str  # of the store by which the team's process group finds itself
    port: int


class Finding(Record, frozen=True):
    """What the rehearsal of a run has found, as an event of the run says it."""

    kind: str  # of the event
    text: str


class WarningFilter(Record, frozen=True):
    """One line of `warnings.filters`."""

    action: str
    message: str  # regular expression; empty: any
    category: str  # "module:name"
    module: str  # regular expression; empty: any
    line: int  # 0: any


class Package(Record, frozen=True):
    """A package as a process has imported it."""

    version: str
    file: str


class Settings(Record, frozen=True):
    """Process-wide settings of the notebook, as they were when it started a run."""

    default_dtype: str  # "float32"
    deterministic: int  # as `torch.set_deterministic_debug_mode` takes it
    matmul_precision: str
    flags: dict[str, bool] = {}  # of torch
    numpy_errors: dict[str, str] = {}
    recursion_limit: int = 0
    variables: dict[str, str | None] = {}  # of the environment, that were changed since the notebook's process began
    folder: str = ""  # in which it works; empty: none that can be named
    warnings: tuple[WarningFilter, ...] = ()
    packages: dict[str, Package] = {}  # that are imported


class RunSpec(Record, frozen=True):
    """What a run is, as numbers and names; the objects travel beside it in a parcel."""

    id: str  # unlike any other's: a name comes back when its folder is removed
    name: str
    folder: str  # of run.json, history and events, on the hub's host
    num_samples: int  # of the training set
    num_val_samples: int
    num_steps: int
    steps_per_epoch: int
    batch_size: int
    num_shards: int
    seed: int
    clip_norm: float | None
    exact: bool  # a gradient per shard, added up in the order of the shards
    transport: dict[str, TransportKind]  # by engine id; "" is for all others, and none at all lets the hub choose
    telemetry: bool
    micro_batch: int | None
    precision: str
    linger_seconds: float  # how long an orphaned pool waits for somebody to attach
    notes: tuple[str, ...]  # for the run's events, such as where shared memory had to go
    sys_path: tuple[str, ...]
    job: ParcelRef  # model, optimizer, loss, ...: unpickled by hub and engines
    data: ParcelRef  # datasets: unpickled by engines only
    checkpoints: CheckpointPolicy | None = None
    plain: PlainJob | None = None
    resumed: ResumeFrom | None = None
    partitions: tuple[Partition, ...] = ()  # how the model may be divided, by number of engines; empty: not at all
    team_size: int | None = None  # engines of a team; None: as many as there are
    ties: tuple[str, ...] = ()  # parameters that more than one stage may use
    choice: str = ""  # how strategy="auto" has divided the model, and why; for the run's events
    prediction: Prediction | None = None  # of the plan that the run follows
    memory_limit: int | None = None  # bytes by which an engine's memory may grow
    findings: tuple[Finding, ...] = ()  # of the rehearsal; for the run's events
    probe: float | None = None  # the notebook's own loss of the first samples; engines are held against it
    probe_samples: int = 8  # so many samples are the first ones
    reduction: Reduction = "samples"
    is_loss_new: bool = False  # given to a run that is resumed, so that no rehearsal has looked at it: engines do
    whole_metrics: tuple[str, ...] = ()  # that are no means over samples: computed of whole batches, and of all of val
    loss_over: str = "samples"  # "batch": the loss is computed on the gathered outputs of the whole batch
    buffers: dict[str, str] = {}  # by name: "first", "sum" or "mean"
    val_batch_size: int | None = None  # of batches that evaluations compute whole; None: any may be cut
    scheduler_every: str = "step"  # or "epoch"
    num_sampled: int = 20  # first steps of which some elements of the gradients are kept
    sync_batchnorm: bool = False
    settings: Settings | None = None  # of the notebook; None: engines keep theirs


# Engine to hub -------------------------------------------------------------------------------


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
    team: int | None = None  # that it has met, if it has a seat in one


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
    states: bytes = b""  # `dnb.transport.module_states.LooseStates` that have changed, of the batch's first shard
    thawed: tuple[str, ...] = ()  # parameters without a slot that got a gradient, as user code lets them train by now
    frozen: tuple[int, ...] = ()  # slots of the gradient layout that user code has frozen, in one of the parts at least


# Kind of the failure of an engine that could not go on because another one of its team was gone.
PEER_LOST = "PeerLost"


class WorkFailed(Message, frozen=True):
    """User code raised in a step or an evaluation."""

    run: str
    lease: int  # that is answered; 0 if it was a `Diagnose`
    kind: WorkKind
    step: int
    shards: tuple[int, ...]
    failure: Failure


class Diagnosis(Message, frozen=True):
    """Where a gradient was not finite."""

    run: str
    step: int
    shard: int | None  # None: it could not be reproduced
    parameter: str
    kind: str  # "NaN" | "inf"


class Printed(Message, frozen=True):
    """What user code has printed on an engine, and what else people should know of it there."""

    run: str
    lines: tuple[str, ...]
    kind: str = "output"  # of the run's event


class Fault(Message, frozen=True):
    """An engine ends of an error that is no user's: its last word."""

    engine: int
    failure: Failure


class Beat(Message, frozen=True):
    """An engine lives; said about ten times a second, whatever it is computing."""

    engine: int
    process: Process
    is_at_work: bool = False  # said for it by its watcher: it cannot beat, but works


EngineMessage = (
    Join
    | Beat
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


# Hub to engine -------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The hub has taken the engine in."""


class Rejoin(Message, frozen=True):
    """A new hub hears an engine beat that it does not know: it shall join."""

    life: int  # which hub of the pool asks, counted from 0


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
    seat: Seat | None = None  # in a team; None: alone


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
    """What a step's loss is computed on: outputs and targets of the whole batch, in the order of its shards."""

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


# So that a tensor can be made of the bytes where they lie.
LEAF_ALIGNMENT = 64


class Diagnose(Message, frozen=True):
    """Compute a step's shards again, one by one, and say whose gradient is not finite. Raw bytes as of `Work`."""

    run: str
    step: int
    shards: tuple[int, ...]
    shard_sizes: tuple[int, ...]
    slab: int
    batch_samples: int


class Mended(Message, frozen=True):
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
WireMessage = AddSlabs | Thaw | Freeze | Shipped | Work | Diagnose | Mended


# Client to hub -------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A kernel says who it is; the pool follows the life of the one that steers it."""

    owner: Process
    wish: Literal["steer", "take over", "watch"] = "steer"  # "steer" is refused while another kernel does
    format: int = 1
    version: str = ""  # of the kernel's dnb


class GetPool(Message, frozen=True):
    """Ask for the pool and its engines."""


class Submit(Message, frozen=True):
    """Start a run. Frames: spec, job pickle, data pickle, signature."""


class GetRun(Message, frozen=True):
    """What is new in a run. Answered by RunState and raw float64 columns."""

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


class Mend(Message, frozen=True):
    """Replace a run's step or loss function. Frames: their pickle, signature."""

    run: str


class GetState(Message, frozen=True):
    """Parameters and the states of optimizer and scheduler, as frames."""

    run: str
    optimizer: bool
    scheduler: bool = False
    kept: bool = False  # by functions of the user that the hub calls


class GetGradients(Message, frozen=True):
    """What was seen of a run's gradients in its first steps. Answered by `GradientRows`."""

    run: str


class TakeCheckpoint(Message, frozen=True):
    """Write a checkpoint after the step under way. Answered by CheckpointState, before it is durable."""

    run: str
    path: str | None  # on the hub's host; None is in the run's folder


class GetCheckpoint(Message, frozen=True):
    """What became of `TakeCheckpoint`. Answered by CheckpointState."""

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


class Chaos(Message, frozen=True):
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
    | Chaos
    | KillHub
    | Submit
    | GetRun
    | Control
    | SetOptions
    | Mend
    | GetState
    | GetGradients
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
    | Mend
    | GetState
    | GetGradients
    | TakeCheckpoint
    | GetCheckpoint
    | Shutdown
)


# Hub to client -------------------------------------------------------------------------------


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
    """Who is in the pool."""

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


class CheckpointState(Message, frozen=True):
    """How a checkpoint stands that was asked for."""

    ticket: int
    state: Literal["waiting", "writing", "durable", "failed"]
    path: str = ""
    step: int = 0
    error: str = ""  # name of a class in dnb.errors
    message: str = ""


class HubConfig(Record, frozen=True):
    """What the controller tells the hub's guardian, on standard input."""

    cluster_id: str
    key: str  # signs parcels
    security_dir: str
    log_dir: str
    host: str  # the interface to bind
    controller: Process
    owner: Process | None
    folders: tuple[str, ...] = ()  # of the pool's shared memory, which the guardian makes


class HubBinding(Record, frozen=True):
    """What the guardian answers once the hub's ports are bound."""

    guardian: Process
    client: Address
    engine: Address
    folders: tuple[str, ...] = ()  # of the pool's shared memory
    nursery: str = ""  # name of the socket where engines are ordered; "" where they are not forked


class HubPlace(Record, frozen=True):
    """What a connection file says of the hub, for its reader: an engine or a client."""

    address: Address
    guardian: Process
    nursery: str = ""  # as of `HubBinding`
    format: int = 1
    version: str = ""  # of the hub's dnb


Reply = Done | Refused | PoolState | Members | RunState | StateTree | CheckpointState | GradientRows
