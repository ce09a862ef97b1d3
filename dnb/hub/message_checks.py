"""Checks of messages from engines and clients: made on arrival, before anything in the hub has changed.

Types are checked by decoding. Here it is whether values make sense, by themselves or for the run as it is. Who breaks
the rules loses its line, or has its request refused; nothing else happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from dnb.errors import ArgumentError
from dnb.protocol.client_messages import GetRun, Hello, InjectFault, KeepSpares, Request, SetOptions, TakeCheckpoint
from dnb.protocol.engine_messages import (
    Diagnosis,
    EngineMessage,
    LoadFailed,
    NoSharedMemory,
    Printed,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.measurements import StageTrace, Sums, Telemetry
from dnb.protocol.pool import EngineFacts, Process
from dnb.protocol.run import Failure
from dnb.transport.system.failures import MESSAGE_LENGTH, TRACEBACK_LENGTH, WHOLE_LENGTH, clean_text

T = TypeVar("T")

# Engines are numbered from 0 by ipyparallel; teams of them from here on, see `dnb.hub.scheduling.teams`.
MOST_ENGINES = 1 << 20
# No pid is larger, and psutil takes no larger one.
MOST_PID = (1 << 31) - 1
# Whatever is counted fits into the numbers that arrays and files have.
MOST_COUNT = (1 << 63) - 1
# More than any pool needs, and few enough to be a number of processes.
MOST_SPARES = 4096
# How long chaos may stop an engine, and how slow it may make one.
MOST_STOP_SECONDS, MOST_SLOWNESS = 86_400.0, 1e6
# Lines that an engine tells at once, and the kinds of events that they may become.
MOST_LINES = 1000
# Kinds of lines that an engine counts at once, with the one for all others.
MOST_COUNTED = 101
# Means over targets that one loss may add up.
MOST_TERMS = 1 << 20
TOLD_KINDS = frozenset({"output", "data", "metrics"})
# Letters of what names something: a host, a device, a version, a parameter.
NAME_LENGTH = 1000


class PeerError(Exception):
    """A peer has said what makes no sense."""


def decode_peer(decode: Callable[[Any], T], packed: bytes | memoryview) -> T:
    """Decode what a peer has sent.

    Raises:
        PeerError: it cannot be decoded, for whatever reason: text that is no UTF-8 and records that are nested too
            deep raise other errors than wrong types.
    """
    try:
        return decode(packed)
    except Exception as error:
        reason = clean_text(f"{type(error).__name__}: {error}", length=NAME_LENGTH)
        raise PeerError(f"a record cannot be decoded: {reason}") from error


def check_process(process: Process) -> None:
    """Refuse a process that cannot be one.

    Raises:
        PeerError: with what is wrong.
    """
    _require(0 < process.pid <= MOST_PID, f"no process has the pid {process.pid}")
    _require(math.isfinite(process.create_time), f"no process starts at {process.create_time}")
    _require(len(process.host) <= NAME_LENGTH, "the name of a host is too long")
    _require(len(process.boot_id + process.pid_namespace) <= NAME_LENGTH, "the name of a boot or namespace is too long")


def check_engine(facts: EngineFacts) -> None:
    """Refuse an engine that cannot be one.

    Raises:
        PeerError: with what is wrong.
    """
    _require(0 <= facts.engine < MOST_ENGINES, f"no engine has the number {facts.engine}")
    check_process(facts.process)
    _require(0 < facts.cores <= MOST_ENGINES, f"no engine has {facts.cores} threads")
    _require(0 <= facts.memory_bytes <= MOST_COUNT, f"no host has {facts.memory_bytes} bytes")
    _require(max(len(facts.device), len(facts.torch_version)) <= NAME_LENGTH, "a name is too long")


def check_request(request: Request) -> None:
    """Refuse a request whose values make no sense, whatever the pool is like.

    Raises:
        ArgumentError: with what is wrong.
    """
    match request:
        case Hello(owner=owner):
            try:
                check_process(owner)
            except PeerError as error:
                raise ArgumentError(f"this kernel cannot be greeted: {error}") from error
        case KeepSpares(number=number) if not 0 <= number <= MOST_SPARES:
            raise ArgumentError(f"the number of spares must be from 0 to {MOST_SPARES}, not {number}")
        case InjectFault(verb="stop", amount=seconds) if not 0 < seconds <= MOST_STOP_SECONDS:
            raise ArgumentError(
                f"an engine is stopped for more than 0 and at most {MOST_STOP_SECONDS:g} s, not {seconds}"
            )
        case InjectFault(verb="slow", amount=factor) if not 1 <= factor <= MOST_SLOWNESS:
            raise ArgumentError(f"an engine is slowed by a factor from 1 to {MOST_SLOWNESS:g}, not {factor}")
        case SetOptions(options=options) if not options:
            raise ArgumentError("set what? run.set(lr=1e-4), run.set(clip_norm=1.0)")
        case TakeCheckpoint(path=str(path)) if "\0" in path or not path.startswith("/"):
            raise ArgumentError(f"no checkpoint can be put at {path!r}: give the whole path of a folder")
        case GetRun():
            seen = [*request.seen.values(), request.seen_events, request.seen_timeline, request.seen_usage]
            if not all(0 <= number <= MOST_COUNT for number in seen):
                raise ArgumentError("a viewer has seen at least 0 rows of everything")
        case _:
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The limits of what an engine can say about one run."""

    num_gradients: int  # slots of the gradient layout
    num_parameters: int  # of the parameter layout
    num_shards: int
    num_stages: int  # largest of all partitions; 0 if the model is not divided


def check_message(message: EngineMessage, rules: Rules) -> EngineMessage:
    """Refuse what an engine cannot mean; the message, with texts of a length that can be shown.

    Raises:
        PeerError: with what is wrong.
    """
    match message:
        case WorkReport():
            return _checked_report(message, rules)
        case WorkFailed(failure=failure) | LoadFailed(failure=failure):
            return msgspec.structs.replace(message, failure=shortened(failure))
        case Diagnosis(shard=shard):
            _require(shard is None or 0 <= shard < rules.num_shards, f"there is no shard {shard}")
            return msgspec.structs.replace(
                message,
                parameter=clean_text(message.parameter, length=NAME_LENGTH),
                kind=clean_text(message.kind, length=NAME_LENGTH),
            )
        case Printed(lines=lines, kind=kind):
            _require(len(lines) <= MOST_LINES, f"{len(lines)} lines at once")
            _require(kind in TOLD_KINDS, "an engine tells of output, or of its files")
            cut = tuple(clean_text(line, length=MESSAGE_LENGTH) for line in lines)
            return msgspec.structs.replace(message, lines=cut, more=_checked_counts(message.more))
        case NoSharedMemory(reason=reason):
            return msgspec.structs.replace(message, reason=clean_text(reason, length=MESSAGE_LENGTH))
        case _:
            return message


def check_parts(report: WorkReport, *, num_slabs: int, num_samples: int, is_divided: bool) -> None:
    """Hold a report that answers an open lease against what was leased.

    Args:
        report: of an engine.
        num_slabs: that it was to write into.
        num_samples: of the whole batch.
        is_divided: whether it is of a member of a team, of which only one counts the samples.

    Raises:
        PeerError: with what is wrong.
    """
    num_parts = len(report.parts)
    if num_parts < 1 or (num_parts != num_slabs and not is_divided):
        raise PeerError(f"a report has {num_parts} parts for {num_slabs} slabs")
    for part in report.parts:
        if part.num_samples > num_samples:
            raise PeerError(f"a part has {part.num_samples} samples of {num_samples}")


def shortened(failure: Failure) -> Failure:
    """Shorten a failure for people to read, and its whole text, if it was cut, to what a file can hold."""
    return Failure(
        kind=clean_text(failure.kind, length=NAME_LENGTH),
        message=clean_text(failure.message, length=MESSAGE_LENGTH),
        traceback=clean_text(failure.traceback, length=TRACEBACK_LENGTH),
        place=clean_text(failure.place, length=MESSAGE_LENGTH),
        whole=clean_text(failure.whole, length=WHOLE_LENGTH),
    )


# Of every report of every step: what is wrong is put into words only when it is.


def _checked_report(report: WorkReport, rules: Rules) -> WorkReport:
    """Check a report's shards and step against the lease; without one nothing of a report is looked at."""
    unused = report.unused
    if unused and not 0 <= min(unused) <= max(unused) < rules.num_gradients:
        raise PeerError(f"of the model's {rules.num_gradients} gradients, {unused[:3]} are said to be unused")
    if report.frozen and not 0 <= min(report.frozen) <= max(report.frozen) < rules.num_gradients:
        raise PeerError(f"of the model's {rules.num_gradients} gradients, {report.frozen[:3]} are said to be frozen")
    if len(report.digests) not in (0, 4 * rules.num_parameters):
        raise PeerError(f"digests have {len(report.digests)} bytes")
    for part in report.parts:
        _check_sums(part)
    if report.telemetry is not None:
        _check_telemetry(report.telemetry)
    if report.trace is not None:
        _check_trace(report.trace, rules)
    if report.more_output:
        report = msgspec.structs.replace(report, more_output=_checked_counts(report.more_output))
    if not report.note:
        return report
    return msgspec.structs.replace(report, note=clean_text(report.note, length=MESSAGE_LENGTH))


def _checked_counts(more: dict[str, int]) -> dict[str, int]:
    _require(len(more) <= MOST_COUNTED, f"lines of {len(more)} kinds are counted")
    _require(all(0 < number <= MOST_COUNT for number in more.values()), "less than one line is counted")
    return {clean_text(kind, length=NAME_LENGTH): number for kind, number in more.items()}


def _check_sums(part: Sums) -> None:
    """Check sums: totals may be NaN, if the model's are; weights are counted by the engine itself."""
    if not 0 <= part.loss_weight < math.inf:
        raise PeerError("a weight is no number of at least 0")
    if not 0 < part.unit < math.inf:
        raise PeerError("the unit of a gradient is no number above 0")
    if not 0 <= part.num_samples <= MOST_COUNT:
        raise PeerError(f"a part has {part.num_samples} samples")
    if len(part.targets_per_sample) > MOST_TERMS or not all(0 <= each < math.inf for each in part.targets_per_sample):
        raise PeerError("targets for each sample are no few numbers of at least 0")
    if part.metric_weights or part.metric_totals:
        if part.metric_weights.keys() != part.metric_totals.keys():
            raise PeerError("a metric has no weight")
        for weight in part.metric_weights.values():
            if not 0 <= weight < math.inf:
                raise PeerError("a weight is no number of at least 0")


def _check_telemetry(telemetry: Telemetry) -> None:
    for value in (
        telemetry.compute_seconds,
        telemetry.data_seconds,
        telemetry.rss_bytes,
        telemetry.cpu_percent,
        telemetry.start_rss_bytes,
        telemetry.peak_rss_bytes,
        telemetry.peak_private_bytes,
    ):
        if value is not None and not 0 <= value <= MOST_COUNT:
            raise PeerError(f"telemetry says {value}")


def _check_trace(trace: StageTrace, rules: Rules) -> None:
    times = [trace.begin, trace.end, trace.cpu_seconds]
    times += [time for action in trace.actions for time in (action.begin, action.end)]
    _require(all(math.isfinite(time) for time in times), "a time of a trace is no number")
    _require(trace.begin <= trace.end and trace.cpu_seconds >= 0, "a trace ends before it begins")
    _require(all(action.begin <= action.end for action in trace.actions), "an action ends before it begins")
    _require(bool(trace.actions), "a trace has no action")
    _require(1 <= trace.num_micro_batches <= MOST_PID, f"a trace has {trace.num_micro_batches} micro-batches")
    # A step begins with waiting, which is of no stage yet: -1.
    stages = [action.stage for action in trace.actions if (action.kind, action.stage) != ("wait", -1)]
    stages += [traffic.stage for traffic in trace.traffic]
    _require(all(0 <= stage < rules.num_stages for stage in stages), "a trace is of a stage that is not there")
    micro_batches = (action.micro_batch for action in trace.actions)
    _require(all(-1 <= number < trace.num_micro_batches for number in micro_batches), "there is no such micro-batch")
    counts: Iterable[int] = (n for traffic in trace.traffic for n in (traffic.forward_bytes, traffic.backward_bytes))
    _require(all(0 <= count <= MOST_COUNT for count in counts), "a stage has sent less than nothing")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PeerError(clean_text(otherwise, length=NAME_LENGTH))
