"""What a run leaves on disk: run.json, and append-only history and events that survive a crash."""

from __future__ import annotations

import errno
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from dnb.records import Prediction, Record, RunEvent, RunSpec, RunStatus, StepTimeline, UsageRow

T = TypeVar("T", bound=msgspec.Struct)

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
HISTORY_FILE = "history.jsonl"
EVENTS_FILE = "events.jsonl"
USAGE_FILE = "usage.jsonl"
TIMELINE_FILE = "timeline.json"
ERRORS_FOLDER = "errors"  # texts that were cut where they are told
FORMAT = 1


class HistoryRow(Record, frozen=True):
    """One line of the history: a committed step, or an evaluation after one."""

    kind: str  # "step" | "evaluation"
    step: int
    time: float  # seconds since the epoch
    values: dict[str, float]
    samples: dict[int, int] = msgspec.field(default_factory=dict)  # that each engine brought to the step


class RunSummary(Record, frozen=True):
    """What run.json says: the run's numbers, and how it stands."""

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


def summarize(spec: RunSpec, **state: Any) -> RunSummary:
    """run.json of a run that has this spec and stands as `state` says."""
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


class RunFolder:
    """Writes the folder of one run. Every line goes to the system at once: a killed hub loses none.

    A full disk ends no training: what cannot be written is left out, and `take_fault` says so once.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._history = _open_append(path / HISTORY_FILE)
        self._events = _open_append(path / EVENTS_FILE)
        self._usage = _open_append(path / USAGE_FILE)
        self._encoder = msgspec.json.Encoder()
        self._fault = ""
        self._is_told = False

    def take_fault(self) -> str:
        """Why lines were left out, the first time it is asked after that; else empty."""
        if not self._fault or self._is_told:
            return ""
        self._is_told = True
        return self._fault

    def append_row(self, row: HistoryRow) -> None:
        """Add a line to the history."""
        self._append(self._history, _line(row))

    def append_rows(self, rows: Iterable[HistoryRow]) -> None:
        """Add many lines to the history, as those of a run that is continued."""
        self._write(self._history, b"".join(self._encoder.encode(_line(row)) + b"\n" for row in rows))

    def replace_history(self, rows: Iterable[HistoryRow]) -> None:
        """Write the history anew."""
        os.ftruncate(self._history, 0)
        self.append_rows(rows)

    def append_event(self, event: RunEvent) -> None:
        """Add a line to the events."""
        self._append(self._events, event)

    def append_usage(self, row: UsageRow) -> None:
        """Add a line to how engines spent their time."""
        self._append(self._usage, row)

    def write_summary(self, summary: RunSummary) -> None:
        """Replace run.json in one move, so that a reader never sees half of it."""
        self._replace(RUN_FILE, msgspec.json.format(self._encoder.encode(summary), indent=2))

    def write_timeline(self, timeline: StepTimeline) -> None:
        """Replace timeline.json likewise."""
        self._replace(TIMELINE_FILE, self._encoder.encode(timeline))

    def write_error(self, name: str, text: str) -> Path | None:
        """Put the whole text of an error into a file of its own, for its owner alone; None if it cannot be written."""
        folder = self.path / ERRORS_FOLDER
        path = folder / f"{name}.txt"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            return None
        return path

    def _replace(self, name: str, content: bytes) -> None:
        aside = self.path / f".{name}"
        try:
            aside.write_bytes(content + b"\n")
            aside.replace(self.path / name)
        except OSError as error:
            self._miss(error)

    def _append(self, descriptor: int, record: Any) -> None:
        self._write(descriptor, self._encoder.encode(record) + b"\n")

    def _write(self, descriptor: int, lines: bytes) -> None:
        try:
            written = os.write(descriptor, lines)
            if written < len(lines):  # the disk became full in the middle: no reader shall see half a line
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._miss(error)

    def _miss(self, error: OSError) -> None:
        if not self._fault:
            self._fault = (
                f"{self.path} cannot be written ({error.strerror}): training goes on, its history there has gaps"
            )
            log.warning(self._fault)

    def close(self) -> None:
        """Close the files."""
        os.close(self._history)
        os.close(self._events)
        os.close(self._usage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_summary(path: Path) -> RunSummary:
    """Read run.json.

    Raises:
        OSError: there is none.
        msgspec.MsgspecError: it is not one.
    """
    return msgspec.json.decode((path / RUN_FILE).read_bytes(), type=RunSummary)


def read_timeline(path: Path) -> StepTimeline | None:
    """The newest step whose timeline was written; None if there is none that can be read."""
    try:
        return msgspec.json.decode((path / TIMELINE_FILE).read_bytes(), type=StepTimeline)
    except (OSError, msgspec.MsgspecError):
        return None


def read_history(path: Path, *, skip_broken: bool = False) -> list[HistoryRow]:
    """Every whole line of the history; a torn last line is left out.

    Args:
        path: of the run's folder.
        skip_broken: leave out what somebody else has written there, too, as a run that goes on must.
    """
    return list(_read_lines(path / HISTORY_FILE, HistoryRow, skip_broken=skip_broken))


def read_events(path: Path, *, skip_broken: bool = False) -> list[RunEvent]:
    """Every whole line of the events; a torn last line is left out."""
    return list(_read_lines(path / EVENTS_FILE, RunEvent, skip_broken=skip_broken))


def read_usage(path: Path, *, skip_broken: bool = False) -> list[UsageRow]:
    """Every whole line of how engines spent their time; none if a run has no such file, as older ones have not."""
    try:
        return list(_read_lines(path / USAGE_FILE, UsageRow, skip_broken=skip_broken))
    except FileNotFoundError:
        return []


def _line(row: HistoryRow) -> dict[str, Any]:
    # JSON has no NaN and no infinity: they are written as words.
    values = {name: value if math.isfinite(value) else str(value) for name, value in row.values.items()}
    line = {"kind": row.kind, "step": row.step, "time": row.time, "values": values}
    return line | {"samples": row.samples} if row.samples else line


def _read_lines(path: Path, kind: type[T], *, skip_broken: bool) -> Iterator[T]:
    decoder = msgspec.json.Decoder(kind, strict=False)  # words become numbers again
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line feed is empty, or torn
        try:
            record = decoder.decode(line)
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            if not skip_broken:
                raise
            log.warning("line %d of %s is left out: %s: %s", number, path, type(error).__name__, error)
            continue
        yield record


def _open_append(path: Path) -> int:
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)  # a torn line of an earlier life must not swallow the next one
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
