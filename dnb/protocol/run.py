"""A run as it is submitted: what is trained, on what, how, and by which engines."""

from __future__ import annotations

from typing import Literal

from dnb.protocol.base import Record
from dnb.protocol.measurements import Prediction
from dnb.protocol.memory import PayloadRef

RunStatus = Literal["starting", "running", "paused", "failed", "stopped", "finished"]
TransportKind = Literal["memory", "socket"]
# How losses of parts are put together: a mean over samples, a mean over the weights of targets, a sum; or "terms", of
# which some are means over targets and others over samples, which is right where parts weigh the same by both.
Reduction = Literal["samples", "targets", "sum", "terms"]
ENDED: frozenset[str] = frozenset({"failed", "stopped", "finished"})


class Failure(Record, frozen=True):
    """An exception of user code, as text."""

    kind: str  # "IndexError"
    message: str
    traceback: str
    place: str = ""  # "shard 3, sample 812"
    whole: str = ""  # if message or traceback were cut: all of it, which the hub puts into a file


class CheckpointPolicy(Record, frozen=True):
    """The rule by which a run writes checkpoints by itself and removes old ones."""

    every: int  # steps
    keep: int  # the last so many
    best: str | None  # and the best by this: see `dnb.planning.checkpoint_policy.read_goal`


class PlainJob(Record, frozen=True):
    """The part of a job that can be written without pickle, so that a resume given the rest unpickles nothing."""

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
    """The division of a model over the engines of a team."""

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


class Finding(Record, frozen=True):
    """A finding of a run's dry run, as an event of the run says it."""

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
    """A run's definition in numbers and names; the objects travel beside it in a payload."""

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
    job: PayloadRef  # model, optimizer, loss, ...: unpickled by hub and engines
    data: PayloadRef  # datasets: unpickled by engines only
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
    val_reduction: Reduction = "targets"  # of val_step
    is_loss_new: bool = False  # or step: given to a run that is resumed, so that no rehearsal has seen it: engines do
    trusts_loss: bool = False  # the user says what a loss is over, so that nobody judges it
    whole_metrics: tuple[str, ...] = ()  # that are no means over samples: computed of whole batches, and of all of val
    target_metrics: tuple[str, ...] = ()  # of step, or of val_step as "val_...", which weigh as its loss does
    loss_over: str = "samples"  # "batch": the loss is computed on the gathered outputs of the whole batch
    buffers: dict[str, str] = {}  # by name: "first", "sum" or "mean"
    val_batch_size: int | None = None  # of batches that evaluations compute whole; None: any may be cut
    scheduler_every: str = "step"  # or "epoch"
    num_sampled: int = 20  # first steps of which some elements of the gradients are kept
    sync_batchnorm: bool = False
    described: dict[str, str] = {}  # what was given to fit, by argument, in words for people
    settings: Settings | None = None  # of the notebook; None: engines keep theirs
