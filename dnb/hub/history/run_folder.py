"""The folder of a run, as the hub writes it: run.json, and append-only history and events that survive a crash."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from dnb.errors import ArgumentError
from dnb.hub.handover import read_handover_bytes, remove_handover, write_handover_bytes
from dnb.hub.history.backlog import Backlog
from dnb.hub.history.disk_news import DiskNews
from dnb.hub.history.line_file import PIECE_BYTES, LineFile
from dnb.hub.history.output_log import OutputLog
from dnb.hub.history.run_files import (
    ERRORS_FOLDER,
    EVENTS_FILE,
    HISTORY_FILE,
    LINE_FILES,
    OUTPUT_FILE,
    RUN_FILE,
    TIMELINE_FILE,
    USAGE_FILE,
    HistoryRow,
    RunSummary,
    decode_lines,
    line_of,
    read_summary,
)
from dnb.protocol.measurements import RunEvent, StepTimeline, UsageRow
from dnb.transport.segments import megabytes
from dnb.transport.system.private_files import make_private_folder, open_private

T = TypeVar("T", bound=msgspec.Struct)

log = logging.getLogger(__name__)

# How often a disk that failed is tried again, and removed files are looked for.
RETRY_SECONDS = 1.0
# So much of the history waits line by line: a quarter of a million steps. Later ones are rebuilt from the columns.
MOST_WAITING_BYTES = 64 << 20
STEPS_AT_ONCE = 4096
# Without so much room no run is begun.
LEAST_ROOM_BYTES = 256 << 10

Rebuild = Callable[[int, int], list[HistoryRow]]  # first step, number of steps


class RunFolder:
    """Writes the folder of one run. Every line goes to the system at once: a killed hub loses none.

    A disk that fails ends no training and raises nothing. What it does not take waits, in order, in the pool's memory,
    and is written when there is room again, by this hub or the next; `tick` says what people should know.

    Args:
        path: made if it is not there.
        folders: of the pool's memory, where what waits is kept; without one, only this process has it.
        clock: monotonic.
        most_waiting_bytes: of the history that wait as lines; later steps are rebuilt, see `rebuild_with`.
    """

    def __init__(
        self,
        path: Path,
        *,
        folders: Sequence[Path] = (),
        clock: Callable[[], float] = time.monotonic,
        most_waiting_bytes: int = MOST_WAITING_BYTES,
    ) -> None:
        self.path = path
        self._most_waiting_bytes = most_waiting_bytes
        self._folders = folders
        self._rebuild: Rebuild = lambda _first, _num_steps: []
        self._clock = clock
        self._lines = {name: LineFile(path / name, self._backlog(name)) for name in LINE_FILES}
        self._history = self._lines[HISTORY_FILE]
        self.output = OutputLog(self._lines[OUTPUT_FILE])
        self._encoder = msgspec.json.Encoder()
        self._contents: dict[str, bytes] = {}  # of the files that are replaced, as they should be
        self._owed: dict[str, OSError] = {}  # of them, those that are not on disk, and why
        self._unkept_from: int | None = None  # from this step on, rows do not wait but are rebuilt
        self._next_look = 0.0
        self._displaced: OSError | None = None  # why a file that was removed is not there again
        self._news = DiskNews(path, was_behind=any(file.was_behind for file in self._lines.values()))

    def rebuild_with(self, rebuild: Rebuild) -> None:
        """Have rows that are too many to wait made anew when they can be written."""
        self._rebuild = rebuild

    def append_row(self, row: HistoryRow) -> None:
        """Add a line to the history."""
        if self._unkept_from is not None and row.step >= self._unkept_from:
            return
        if self._unkept_from is None and row.kind == "step" and self._history.num_waiting > self._most_waiting_bytes:
            self._unkept_from = row.step
            self._news.add(
                f"{megabytes(self._history.num_waiting)} wait to be written to {self.path}: steps from {row.step} on "
                "will be there, too, but without which engine had which samples"
            )
            return
        self._append(self._history, line_of(row))

    def append_rows(self, rows: Iterable[HistoryRow]) -> None:
        """Add many lines to the history, as those of a run that is continued."""
        rows = iter(rows)
        while some := list(islice(rows, STEPS_AT_ONCE)):
            self._history.append(b"".join(self._encoder.encode(line_of(row)) + b"\n" for row in some))

    def replace_history(self, rows: Iterable[HistoryRow]) -> None:
        """Write the history anew."""
        self._history.replace()
        self.append_rows(rows)

    def append_event(self, event: RunEvent) -> None:
        """Add a line to the events."""
        self._append(self._lines[EVENTS_FILE], event)

    def append_usage(self, row: UsageRow) -> None:
        """Add a line to how engines spent their time."""
        self._append(self._lines[USAGE_FILE], row)

    def write_summary(self, summary: RunSummary) -> None:
        """Replace run.json in one move: a reader never sees half of it. The next hub finds it in memory, too."""
        content = msgspec.json.format(self._encoder.encode(summary), indent=2) + b"\n"
        write_handover_bytes(self._folders, self._name_of(RUN_FILE), content)
        self._replace(RUN_FILE, content)

    def write_timeline(self, timeline: StepTimeline) -> None:
        """Replace timeline.json likewise."""
        self._replace(TIMELINE_FILE, self._encoder.encode(timeline) + b"\n")

    # what a hub finds that takes over

    def summary(self) -> RunSummary:
        """Return the summary as it was written last, on disk or in memory.

        Raises:
            OSError: there is none.
            msgspec.MsgspecError: it is not one.
        """
        kept = read_handover_bytes(self._folders, self._name_of(RUN_FILE))
        return read_summary(self.path) if kept is None else msgspec.json.decode(kept, type=RunSummary)

    def rows(self) -> list[HistoryRow]:
        """Return the history, also what is not on disk yet."""
        return self._read(self._history, HistoryRow)

    def events(self) -> list[RunEvent]:
        """Return the events, also those that are not on disk yet."""
        return self._read(self._lines[EVENTS_FILE], RunEvent)

    def usage(self) -> list[UsageRow]:
        """Return the rows of usage, also those that are not on disk yet."""
        return self._read(self._lines[USAGE_FILE], UsageRow)

    def _read(self, file: LineFile, kind: type[T]) -> list[T]:
        return list(decode_lines(file.content(), kind, path=file.path, skip_broken=True))

    # disks that fail

    def tick(self) -> list[str]:
        """Write what waits, and restore what was removed, now and then; returns sentences on what is new."""
        now = self._clock()
        is_behind = self._is_catching_up()
        if now >= self._next_look or is_behind:
            self._next_look = now + RETRY_SECONDS
            if not is_behind:
                self._put_back(now)
            self._catch_up(limit_bytes=PIECE_BYTES)
            self._tell(now)
        return self._news.take()

    def finish(self) -> list[str]:
        """Write all that waits, as the run has ended; returns sentences for people."""
        self._catch_up(limit_bytes=None)
        self._tell(self._clock())
        return self._news.take()

    @property
    def num_waiting_bytes(self) -> int:
        """The number of bytes that are not on disk yet."""
        return sum(file.num_waiting for file in self._lines.values())

    def _is_catching_up(self) -> bool:
        """Return whether the disk takes the backlog again, and more waits."""
        is_rebuilding = self._unkept_from is not None and self._history.is_whole
        return is_rebuilding or any(file.is_catching_up for file in self._lines.values())

    def _catch_up(self, *, limit_bytes: int | None) -> None:
        for file in self._lines.values():
            if not file.is_whole:
                file.catch_up(limit_bytes=limit_bytes)
        while self._unkept_from is not None and self._history.is_whole:
            rows = self._rebuild(self._unkept_from, STEPS_AT_ONCE)
            self._unkept_from = rows[-1].step + 1 if rows else None
            self.append_rows(rows)
            if limit_bytes is not None:
                break
        for name in list(self._owed):
            self._replace(name, self._contents[name])

    def _put_back(self, now: float) -> None:
        """Write anew what was removed, or was replaced by somebody else."""
        removed: list[str] = []
        self._displaced = None
        for name, file in self._lines.items():
            if not file.is_in_place():
                try:
                    file.put_back()
                    removed.append(name)
                except OSError as error:
                    self._displaced = error
        for name in self._contents.keys() - self._owed.keys():
            if not (self.path / name).exists():
                self._replace(name, self._contents[name])
                removed.append(name)
        self._news.add_removed(removed, now)

    def _tell(self, now: float) -> None:
        found = [*(file.fault for file in self._lines.values()), *self._owed.values(), self._displaced]
        faults = [fault for fault in found if fault is not None]
        self._news.add_faults(faults, now, is_over=not faults and self._unkept_from is None)

    def write_error(self, name: str, text: str) -> Path | None:
        """Put the whole text of an error into a file of its own, for its owner alone; None if it cannot be written."""
        folder = self.path / ERRORS_FOLDER
        path = folder / f"{name}.txt"
        try:
            make_private_folder(folder)
            descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            return None
        return path

    def _replace(self, name: str, content: bytes) -> None:
        self._contents[name] = content
        aside = self.path / f".{name}"
        try:
            make_private_folder(self.path)
            descriptor = open_private(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            aside.replace(self.path / name)
        except OSError as error:
            self._owed[name] = error
            with contextlib.suppress(OSError):
                aside.unlink()
        else:
            self._owed.pop(name, None)

    def _append(self, file: LineFile, record: Any) -> None:
        file.append(self._encoder.encode(record) + b"\n")

    def _backlog(self, name: str) -> Backlog:
        return Backlog(self._folders, self._name_of(name))

    def _name_of(self, name: str) -> str:
        return f"kept-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]}-{name}"

    def forget(self) -> None:
        """Remove what was kept for another hub: the run is over, and all of it on disk, or lost with the pool."""
        if self.num_waiting_bytes:
            log.warning("%s lacks %d bytes, which could not be written", self.path, self.num_waiting_bytes)
        for file in self._lines.values():
            file.forget()
        remove_handover(self._folders, self._name_of(RUN_FILE))

    def discard(self) -> None:
        """Remove the folder of a run that cannot begin, unless others have put something there."""
        self.forget()
        self.close()
        for name in LINE_FILES:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Close the files; what waits is left to the next hub."""
        for file in self._lines.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def make_run_folder(path: Path) -> None:
    """Make the folder of a new run, and see that something can be written there.

    Raises:
        ArgumentError: nothing can; the folder is not left behind.
    """
    was_there = path.exists()
    try:
        make_private_folder(path)
        _try_to_write(path)
    except OSError as error:
        if not was_there:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise ArgumentError(
            f"run {path.name!r} cannot be kept in {path} ({error.strerror}, {_free(path)} free): make room, or change "
            "to a folder that can be written with %cd, then fit again; nothing was started"
        ) from error


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        content = memoryview(bytes(LEAST_ROOM_BYTES))
        while len(content):
            content = content[file.write(content) :]


def _free(path: Path) -> str:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        return megabytes(shutil.disk_usage(there).free)
    except OSError:
        return "unknown space"
