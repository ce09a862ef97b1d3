"""A run's numbers in files that other programs read: CSV, Parquet, TensorBoard's event files."""

from __future__ import annotations

import csv
import errno
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dnb.errors import ArgumentError, SpaceError
from dnb.progress import long_work

# By their end event files that were written here are known again, and replaced.
EVENTS_SUFFIX = ".dnb"
# No curves: the hash would lose its last digits, and the time is beside every value anyway.
_NOT_CURVES = frozenset({"digest", "seconds"})
_TELL_EVERY = 1000
# Indented by four, a text is shown as it is: TensorBoard reads Markdown.
_VERBATIM = "    "


# By name: a value for every step, and whether there is one.
Table = dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]


class ColumnSource(Protocol):
    """A history: one column per name."""

    def __iter__(self) -> Iterator[str]: ...

    def column(self, name: str, /) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return steps and values."""


class Happening(Protocol):
    """An event of a run."""

    @property
    def kind(self) -> str:
        """The kind of event."""

    @property
    def text(self) -> str:
        """The event in words."""

    @property
    def step(self) -> int:
        """After which step."""

    @property
    def time(self) -> float:
        """In seconds since the epoch."""


def write_csv(columns: ColumnSource, path: str | Path) -> Path:
    """Write one line per step; a cell is empty where nothing was measured, and "nan" where that was measured.

    Raises:
        ArgumentError: there is nothing to write, or the file cannot be written.
    """
    steps, table = _table(columns)
    cells = [[str(step) for step in steps.tolist()]]
    for values, known in table.values():
        cells.append([repr(value) if there else "" for value, there in zip(values.tolist(), known, strict=True)])
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *table])
        writer.writerows(zip(*cells, strict=True))
    return Path(path)


def write_parquet(columns: ColumnSource, path: str | Path) -> Path:
    """Write one row per step; null is what was not measured, NaN what was measured so.

    Raises:
        ArgumentError: pyarrow is not installed, there is nothing to write, or the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ArgumentError(_missing("Parquet needs the package pyarrow", extra="export")) from error
    steps, table = _table(columns)
    arrays = {name: pa.array(values, mask=~known) for name, (values, known) in table.items()}
    with replacing(path) as aside:
        pq.write_table(pa.table({"step": steps, **arrays}), aside)
    return Path(path)


def write_tensorboard(
    columns: ColumnSource,
    folder: str | Path,
    *,
    started: float,
    events: Sequence[Happening] = (),
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write an event file into a folder, in the place of one that was written here before.

    Args:
        columns: every one is a curve.
        folder: made if only its last part is missing.
        started: seconds since the epoch, to which the column "seconds" counts; 0 if not known.
        events: become texts.
        texts: more of them, by name.

    Raises:
        ArgumentError: tensorboard is not installed, there is nothing to write, or the folder cannot be written.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import text as as_text
    except ImportError as error:
        raise ArgumentError(_missing("event files need the package tensorboard", extra="tensorboard")) from error
    steps, table = _table(columns)
    curves = {name: column for name, column in table.items() if name not in _NOT_CURVES}
    folder = Path(folder)
    _require_folder(folder.parent, of=folder)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with _system_refusals(folder), _removed(aside):
        writer = FileWriter(str(aside), filename_suffix=EVENTS_SUFFIX)
        with closing(writer), long_work(f"writing TensorBoard's events into {folder}") as report:
            times = _times_of(steps, columns, started=started)
            for number, (step, values) in enumerate(_rows(steps, curves)):
                # not SummaryWriter.add_scalar: an event for each value, by way of an array, takes five times as long
                found = [Summary.Value(tag=name, simple_value=value) for name, value in values]
                writer.add_event(Event(summary=Summary(value=found)), step, walltime=times[number])
                if number % _TELL_EVERY == 0:
                    report(f"{number:,} of {len(steps):,} steps")
            for event in events:
                text = as_text(f"events/{event.kind}", _VERBATIM + event.text)
                writer.add_summary(text, event.step, walltime=event.time)
            for name, text in (texts or {}).items():
                lines = "\n".join(_VERBATIM + line for line in text.splitlines())
                writer.add_summary(as_text(name, lines), 0, walltime=times[0])
        _move_events(aside, folder)
    return folder


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a file to write beside `path`, which takes its place when it is whole.

    Raises:
        ArgumentError: the folder is not there, or cannot be written.
        SpaceError: the disk is full.
    """
    path = Path(path)
    _require_folder(path.parent, of=path)
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder: name a file in it")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with _system_refusals(path):
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _times_of(steps: NDArray[np.int64], columns: ColumnSource, *, started: float) -> list[float]:
    """Return the times at which the steps were done, in seconds since the epoch."""
    known, seconds = columns.column("seconds")
    begin = started or time.time()
    times = begin + np.interp(steps, known, seconds) if len(known) else np.full(len(steps), begin)
    return list(times.tolist())


def _rows(steps: NDArray[np.int64], table: Table) -> Iterator[tuple[int, list[tuple[str, float]]]]:
    columns = [(name, values.tolist(), known.tolist()) for name, (values, known) in table.items()]
    for row, step in enumerate(steps.tolist()):
        yield step, [(name, values[row]) for name, values, known in columns if known[row]]


def _table(columns: ColumnSource) -> tuple[NDArray[np.int64], Table]:
    """Return all steps that have a value, and for every column its value there and whether there is one."""
    known = {name: columns.column(name) for name in columns}
    if not any(len(steps) for steps, _ in known.values()):
        raise ArgumentError("nothing was measured yet, so that there is nothing to export: run.wait() waits for it")
    every = np.unique(np.concatenate([steps for steps, _ in known.values()]))
    table = {}
    for name, (steps, values) in known.items():
        places = np.searchsorted(every, steps)
        column, there = np.full(len(every), np.nan), np.zeros(len(every), dtype=bool)
        column[places], there[places] = values, True
        table[name] = (column, there)
    return every, table


def _move_events(aside: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    older = list(folder.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"))
    for file in aside.iterdir():
        file.replace(folder / file.name)
        older = [each for each in older if each.name != file.name]
    for file in older:
        file.unlink(missing_ok=True)


def _require_folder(folder: Path, *, of: Path) -> None:
    if not folder.is_dir():
        raise ArgumentError(f"{of} cannot be written: there is no folder {folder}; make it, or name another place")


@contextmanager
def _system_refusals(path: Path) -> Iterator[None]:
    """Raise a refusal of the system as an error of ours."""
    try:
        yield
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ArgumentError
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise kind(f"{path} cannot be written: {reason}") from error


@contextmanager
def _removed(aside: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if aside.is_dir():
            for file in aside.iterdir():
                file.unlink()
            aside.rmdir()


def _missing(need: str, *, extra: str) -> str:
    return f"{need}, which is not installed: pip install 'dnb[{extra}]'"


def export_run(run: Any, path: str | Path) -> Path:
    """Write a run in the format that the ending of a path says.

    Raises:
        ArgumentError: the ending says nothing, there is nothing to write, or it cannot be written.
    """
    writers = {".csv": run.history.to_csv, ".parquet": run.history.to_parquet, ".html": run.report}
    ending = kind_of(path, suffixes=list(writers))
    return Path({**writers, "": run.to_tensorboard}[ending](path))


def kind_of(path: str | Path, *, suffixes: Sequence[str]) -> Any:
    """Return the suffix that says what is written, or "" for a folder of event files.

    Raises:
        ArgumentError: nothing is written with this suffix.
    """
    suffix = Path(path).suffix.lower()
    if not suffix or str(path).endswith("/") or Path(path).is_dir():
        return ""
    if suffix not in suffixes:
        raise ArgumentError(
            f"{path}: cannot write {suffix}; known: {', '.join(suffixes)}, or a folder, which ends "
            "with / or has no ending, for TensorBoard"
        )
    return suffix
