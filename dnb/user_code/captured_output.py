"""Output of user code while a run is loaded: what its thread prints goes to the run, the rest to where it went."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from dnb.errors import clean_text
from dnb.user_code.descriptor_tail import tail_of_streams
from dnb.user_code.output_kinds import OTHER_KINDS, kind_of_line

# Of each process and run: kinds that are told apart, lines of each that come whole, and whole lines beyond the first of
# each kind. What goes beyond is counted.
MOST_KINDS = 100
LINES_OF_A_KIND = 50
MOST_REPEATED = 800
LINE_LENGTH = 500
# Indented lines that belong to the one before: a warning's source, rows of a tensor.
MOST_CONTINUED = 10
# Escape sequences of terminals, and control characters but the tab.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class CapturedOutput:
    """The output of this thread while a run is loaded; other threads print as before.

    C code and child processes write to the file of descriptors 1 and 2: what is appended to it is read, too.

    Args:
        of_all_threads: takes what every thread of the process prints, and what its loggers tell of, but dnb's own.
    """

    def __init__(self, *, of_all_threads: bool = False) -> None:
        self._thread = None if of_all_threads else threading.get_ident()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # user code may print where an object is collected, in the midst of a write
        self._is_muted = False
        self._tail = None if of_all_threads else tail_of_streams()
        self._texts: list[str] = []
        self._num_whole: dict[str, int] = {}  # lines that came whole, by kind
        self._num_repeated = 0
        self._num_continued = 0  # lines that belong to the last text
        self._is_counted = False  # the last line was counted only, and so is what belongs to it
        self._more: dict[str, int] = {}
        self._replaced: list[tuple[str, Any, _Split]] = []
        for name in ("stdout", "stderr"):
            before = getattr(sys, name)
            split = _Split(before, self)
            setattr(sys, name, split)
            self._replaced.append((name, before, split))
        self._lines = [*(split.line for _, _, split in self._replaced), _Line()]
        self._handlers = [] if of_all_threads else self._adopt_handlers()
        self._root_handler = _UserLogHandler(sys.stderr) if of_all_threads else None
        if self._root_handler is not None:
            logging.getLogger().addHandler(self._root_handler)

    def collect(self) -> tuple[str, ...]:
        """Return the lines printed since the last call; indented ones that belong to one are in its text."""
        if self._tail is not None and (raw := self._tail.read()):
            self.write(raw, self._lines[-1])
        if not self._texts and not any(line.rest for line in self._lines):
            return ()
        with self._lock:
            for line in self._lines:
                rest, line.rest = line.rest, ""
                self._take_line(rest, line)
                line.has_head = False
            found, self._texts = tuple(self._texts), []
        return found

    def take_counts(self) -> dict[str, int]:
        """Return how many lines were only counted since the last call, by kind."""
        if not self._more:
            return {}
        with self._lock:
            found, self._more = self._more, {}
        return found

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Let go what is printed meanwhile: what is computed once more is printed once more."""
        self._is_muted = True
        try:
            yield
        finally:
            if self._tail is not None:
                self._tail.read()
            self._is_muted = False

    def close(self) -> None:
        """Let everything be printed as before, unless user code has put something else in our place."""
        if self._tail is not None:
            self._tail.close()
        for name, before, split in self._replaced:
            split.is_open = False
            if getattr(sys, name) is split:
                setattr(sys, name, before)
        if self._root_handler is not None:
            logging.getLogger().removeHandler(self._root_handler)
        for handler, stream in self._handlers:
            if isinstance(handler.stream, _Split):
                handler.setStream(stream)

    def takes_from_here(self) -> bool:
        """Say whether the caller's thread is one of which output is taken; a forked child has nobody to give it to."""
        return self._thread in (None, threading.get_ident()) and os.getpid() == self._pid

    def write(self, text: str, line: _Line) -> None:
        """Take what is printed to one of the streams, behind what its last line has so far."""
        if self._is_muted:
            return
        with self._lock:
            if "\n" not in text and len(line.rest) <= 4 * LINE_LENGTH:  # print writes each of its words by itself
                line.rest += text
                return
            *ended, rest = (line.rest + text).split("\n")
            for each in ended:
                self._take_line(each, line)
            line.has_head = line.has_head and bool(rest)
            line.rest = rest if len(rest) <= 4 * LINE_LENGTH else _trimmed(rest)

    def _take_line(self, text: str, line: _Line) -> None:
        if line.has_head and text[:1] in (" ", "\t"):
            self._continue(text)
        else:
            line.has_head = self._end_line(text)

    def _end_line(self, line: str) -> bool:
        """Keep or count a line, unless it is empty: that says nothing."""
        text = _fit(line)
        if not text or text.isspace():
            return False
        kind = kind_of_line(text)
        number = self._num_whole.get(kind)
        self._num_continued = 0
        if number is None and len(self._num_whole) >= MOST_KINDS:
            kind = OTHER_KINDS
        elif number is None or (number < LINES_OF_A_KIND and self._num_repeated < MOST_REPEATED):
            self._num_whole[kind] = (number or 0) + 1
            self._num_repeated += number is not None
            self._texts.append(text)
            self._is_counted = False
            return True
        self._is_counted = True
        self._more[kind] = self._more.get(kind, 0) + 1
        return True

    def _continue(self, line: str) -> None:
        """Add a line to the text before, written in one call with it."""
        if not self._is_counted and self._num_continued < MOST_CONTINUED and not line.isspace():
            self._num_continued += 1
            self._texts[-1] += f"\n{_fit(line)}"

    def _adopt_handlers(self) -> list[tuple[logging.StreamHandler[Any], Any]]:
        """Let handlers of loggers that hold the streams of before write to ours; return each with its own."""
        ours = {id(before): split for _, before, split in self._replaced}
        found = []
        for logger in (logging.getLogger(), *list(logging.Logger.manager.loggerDict.values())):
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and id(handler.stream) in ours:
                    found.append((handler, handler.stream))
                    handler.setStream(ours[id(handler.stream)])
        return found


@dataclass(slots=True)
class _Line:
    """The last line of a stream, which has not ended yet."""

    rest: str = ""
    has_head: bool = False  # it was written with a line to which it may belong


class _Split:
    """A stream that gives what the training thread writes to a run, and all else to the stream that was there."""

    def __init__(self, target: TextIO, output: CapturedOutput) -> None:
        self._target = target
        self._output = output
        self.is_open = True
        self.line = _Line()

    def write(self, text: str) -> int:
        if self.is_open and self._output.takes_from_here():
            self._output.write(str(text), self.line)
            return len(text)
        return self._target.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self.is_open or not self._output.takes_from_here():
            self._target.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class _UserLogHandler(logging.StreamHandler[Any]):
    """Writes what loggers of user code tell of as Python does where no handler is."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.setLevel(logging.WARNING)
        self.addFilter(lambda record: record.name.partition(".")[0] != "dnb")


def _fit(line: str) -> str:
    """Return a line as it is seen: of a progress bar the last state, without control characters, and not too long."""
    if line.isprintable():
        return line if len(line) <= LINE_LENGTH else clean_text(line, length=LINE_LENGTH)
    shown = line.rstrip("\r").rpartition("\r")[2]
    return clean_text(_CONTROL.sub("", shown), length=LINE_LENGTH).rstrip()


def _trimmed(rest: str) -> str:
    """Shorten a line that does not end."""
    state = rest.rstrip("\r").rpartition("\r")[2]
    return state if len(state) <= 4 * LINE_LENGTH else state[: 2 * LINE_LENGTH] + state[-2 * LINE_LENGTH :]
