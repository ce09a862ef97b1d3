"""Records of measurements: sums, times, events, timelines, and predictions to hold them against."""

from __future__ import annotations

from typing import Literal, NamedTuple

from dnb.protocol.base import Record

# "outputs" is the first half of a step whose loss looks at the whole batch: forward alone.
WorkKind = Literal["step", "evaluation", "outputs"]
WorkerState = Literal["ready", "busy", "spare", "dead", "left"]


class RunEvent(Record, frozen=True):
    """Something that happened to a run: joined, left, died, paused, failed, finished, ..."""

    kind: str
    text: str
    step: int
    time: float  # seconds since the epoch
    engine: int | None = None


class Sums(Record, frozen=True):
    """One engine's sums of losses and metrics; added up over all engines, they give the means."""

    loss_total: float
    loss_weight: float  # samples, or what a step function's Sum weighs
    metric_totals: dict[str, float]
    metric_weights: dict[str, float]  # samples, or what a step function's Sum weighs
    num_samples: int
    unit: float = 1.0  # the gradient of a Sum's total is so many times that in the slab
    # Of every mean over targets to which the loss adds something else; all parts must have the same.
    targets_per_sample: tuple[float, ...] = ()


class Telemetry(Record, frozen=True):
    """An engine's measurements since its last report; all times in seconds."""

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
    """The seconds that engines spent on each activity in one span of a run; engines gone by its end are left out."""

    begin_seconds: float  # since the run was submitted
    end_seconds: float
    step: int  # committed at its end
    engines: tuple[int, ...]
    compute: tuple[float, ...]
    wait: tuple[float, ...]
    data: tuple[float, ...]
    idle: tuple[float, ...]


class Prediction(Record, frozen=True):
    """A plan's prediction of step time, bubble and memory for the run that follows it."""

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
    """The bytes that one stage sent to other engines in a step; neighbours on the same engine do not count."""

    stage: int
    forward_bytes: int  # activations
    backward_bytes: int  # gradients of what it was given


class StageTrace(Record, frozen=True):
    """One pipeline engine's actions in one step, by its host's monotonic clock."""

    begin: float
    end: float
    cpu_seconds: float  # of all threads of the process meanwhile
    num_micro_batches: int
    actions: tuple[Action, ...]
    traffic: tuple[StageTraffic, ...]


class EngineTimeline(Record, frozen=True):
    """One pipeline engine's actions in one step; times in seconds from the step's begin."""

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
