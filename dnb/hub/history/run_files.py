"""Files of a run's folder: what they are called, what is in them, and how they are read."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dnb.errors import ArgumentError
from dnb.protocol.base import Record
from dnb.protocol.measurements import Prediction, RunEvent, StepTimeline, UsageRow
from dnb.protocol.run import RunSpec, RunStatus
from dnb.protocol.versions import explain_unreadable, name_dnb, name_this_dnb

T = TypeVar("T", bound=msgspec.Struct)

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
HISTORY_FILE = "history.jsonl"
EVENTS_FILE = "events.jsonl"
USAGE_FILE = "usage.jsonl"
OUTPUT_FILE = "output.log"  # text for people, of which no program reads a record
TIMELINE_FILE = "timeline.json"
ERRORS_FOLDER = "errors"  # texts that were cut where they are told
LINE_FILES = (HISTORY_FILE, EVENTS_FILE, USAGE_FILE, OUTPUT_FILE)
FORMAT = 1


class HistoryRow(Record, frozen=True):
    """One line of the history: a committed step, or an evaluation after one."""

    kind: str  # "step" | "evaluation"
    step: int
    time: float  # seconds since the epoch
    values: dict[str, float]
    samples: dict[int, int] = msgspec.field(default_factory=dict)  # that each engine brought to the step


class RunSummary(Record, frozen=True):
    """The content of run.json: the run's numbers, and its status."""

    format: int
    name: str
    status: RunStatus
    error: str
    remote_traceback: str
    started: float  # seconds since the epoch
    elapsed_seconds: float
    step: int
    num_steps: int
    steps_per_epoch: int
    options: dict[str, Any]
    prediction: Prediction | None = None
    versions: dict[str, str] = msgspec.field(default_factory=dict)  # with which it was trained
    ending: RunStatus | None = None  # how it ends once its last checkpoint is whole; until then it is "running"


def summarize(spec: RunSpec, **state: Any) -> RunSummary:
    """Compose run.json of a run that has this spec and stands as `state` says."""
    names = (
        "num_samples",
        "num_val_samples",
        "batch_size",
        "num_shards",
        "seed",
        "clip_norm",
        "micro_batch",
        "precision",
        "exact",
        "memory_limit",
    )
    options = {name: getattr(spec, name) for name in names}
    if spec.plain is not None:
        words = {name: getattr(spec.plain, name) for name in ("loss", "optimizer", "lr", "shuffle", "drop_last")}
        options |= words | {"metrics": list(spec.plain.metrics)}
    options |= {name: text for name, text in spec.described.items() if options.get(name) in (None, [])}
    return RunSummary(
        format=FORMAT,
        name=spec.name,
        num_steps=spec.num_steps,
        steps_per_epoch=spec.steps_per_epoch,
        options=options,
        prediction=spec.prediction,
        versions=_versions(),
        **state,
    )


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("dnb", "torch", "numpy")}}


def read_summary(path: Path) -> RunSummary:
    """Read run.json.

    Raises:
        OSError: there is none.
        ArgumentError: it is of another format.
        msgspec.MsgspecError: it is not one.
    """
    text = (path / RUN_FILE).read_bytes()
    header = msgspec.json.decode(text, type=_Header)
    if header.format != FORMAT:
        raise _other_version(path, header, "it is of another format")
    return msgspec.json.decode(text, type=RunSummary)


# Runs that a message names.
MOST_NAMED = 20
# What reading the files of a run may raise that anybody may have written; a UnicodeDecodeError is a ValueError.
NOT_READ = (OSError, msgspec.MsgspecError, ValueError, RecursionError, KeyError)


def explain_unreadable_run(path: Path, error: Exception) -> ArgumentError:
    """Say why a run cannot be read from its folder: as it holds none, or as another version has written it."""
    if isinstance(error, ArgumentError):
        return error
    try:
        header = msgspec.json.decode((path / RUN_FILE).read_bytes(), type=_Header)
    except NOT_READ:
        header = None
    if header is not None and isinstance(error, msgspec.ValidationError):
        return _other_version(path, header, explain_unreadable(error))
    if header is not None:
        return ArgumentError(f"the run in {path} is damaged: {error or type(error).__name__}")
    if isinstance(error, FileNotFoundError):
        return ArgumentError(f"{path} is not the folder of a run: {_runs_beside(path)}")
    return ArgumentError(f"{path} is not the folder of a run: {error or type(error).__name__}")


def _runs_beside(path: Path) -> str:
    """Name the runs of a folder, for a message on one that is not there."""
    try:
        names = sorted(file.parent.name for file in path.parent.glob(f"*/{RUN_FILE}"))
    except OSError:
        names = []
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"in {path.parent} there are {', '.join(names[:MOST_NAMED])}{more}" if names else "there is none"


class _Header(msgspec.Struct):
    """The fields of run.json that every version can read."""

    format: int
    versions: dict[str, Any] = {}


def _other_version(path: Path, header: _Header, reason: str) -> ArgumentError:
    writer = name_dnb(str(header.versions.get("dnb", "")), header.format)
    return ArgumentError(
        f"{path} was written by {writer}, and this is {name_this_dnb(FORMAT)}, which cannot read it ({reason}): "
        "read it with that version"
    )


def read_timeline(path: Path) -> StepTimeline | None:
    """Read the newest timeline that was written; None if there is none that can be read."""
    try:
        return msgspec.json.decode((path / TIMELINE_FILE).read_bytes(), type=StepTimeline)
    except NOT_READ:
        return None


def read_history(path: Path, *, skip_broken: bool = False) -> list[HistoryRow]:
    """Read every whole line of the history; a torn last line is left out.

    Args:
        path: of the run's folder.
        skip_broken: leave out what somebody else has written there, too, as a run that goes on must.
    """
    return list(_read_lines(path / HISTORY_FILE, HistoryRow, skip_broken=skip_broken))


def read_events(path: Path, *, skip_broken: bool = False) -> list[RunEvent]:
    """Read every whole line of the events; a torn last line is left out."""
    return list(_read_lines(path / EVENTS_FILE, RunEvent, skip_broken=skip_broken))


def read_usage(path: Path, *, skip_broken: bool = False) -> list[UsageRow]:
    """Read every whole line of usage; none if a run has no such file, as older ones have not."""
    try:
        return list(_read_lines(path / USAGE_FILE, UsageRow, skip_broken=skip_broken))
    except FileNotFoundError:
        return []


def line_of(row: HistoryRow) -> dict[str, Any]:
    """Return a row as its line says it."""
    # JSON has no NaN and no infinity: they are written as words.
    values = {name: value if math.isfinite(value) else str(value) for name, value in row.values.items()}
    line = {"kind": row.kind, "step": row.step, "time": row.time, "values": values}
    return line | {"samples": row.samples} if row.samples else line


def _read_lines(path: Path, kind: type[T], *, skip_broken: bool) -> Iterator[T]:
    return decode_lines(path.read_bytes(), kind, path=path, skip_broken=skip_broken)


def decode_lines(content: bytes, kind: type[T], *, path: Path, skip_broken: bool) -> Iterator[T]:
    """Yield the record of every whole line; a torn last line is left out.

    Args:
        content: of the file.
        kind: of the records.
        path: of the file, for the log.
        skip_broken: leave out what is no record, too.
    """
    decoder = msgspec.json.Decoder(kind, strict=False)  # words become numbers again
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line feed is empty, or torn
        try:
            record = decoder.decode(line)
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            if not skip_broken:
                raise
            log.warning("line %d of %s is left out: %s: %s", number, path, type(error).__name__, error)
            continue
        yield record
