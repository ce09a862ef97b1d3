"""Output of user code on an engine: what the training thread prints goes to the run, the rest to where it went."""

from __future__ import annotations

import sys
import threading
from typing import Any, TextIO

from dnb.errors import clean_text

# Of each engine and run; the rest is dropped, and that is said.
MOST_LINES = 200
LINE_LENGTH = 500


class CapturedOutput:
    """The output of this thread while a run is loaded; other threads print as before."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lines: list[str] = []
        self._rest = ""  # of a line that has not ended yet
        self._num_lines = 0
        self._replaced: list[tuple[str, Any, _Split]] = []
        for name in ("stdout", "stderr"):
            before = getattr(sys, name)
            split = _Split(before, self)
            setattr(sys, name, split)
            self._replaced.append((name, before, split))

    def collect(self) -> tuple[str, ...]:
        """Return the lines printed since the last call."""
        if self._rest:
            self._end_line(self._rest)
            self._rest = ""
        if not self._lines:
            return ()
        found, self._lines = tuple(self._lines), []
        return found

    def close(self) -> None:
        """Let everything be printed as before, unless user code has put something else in our place."""
        for name, before, split in self._replaced:
            if getattr(sys, name) is split:
                setattr(sys, name, before)

    def is_own_thread(self) -> bool:
        """Say whether the caller is the training thread."""
        return threading.get_ident() == self._thread

    def write(self, text: str) -> None:
        """Take what the training thread prints."""
        if self._num_lines > MOST_LINES:
            return
        *lines, rest = (self._rest + text).split("\n")
        for line in lines:
            self._end_line(line)
        self._rest = rest[-LINE_LENGTH:]

    def _end_line(self, line: str) -> None:
        self._num_lines += 1
        if self._num_lines <= MOST_LINES:
            # A progress bar writes over its line: only the last state is read.
            self._lines.append(clean_text(line.rstrip("\r").rpartition("\r")[2], length=LINE_LENGTH))
        elif self._num_lines == MOST_LINES + 1:
            self._lines.append(f"(more than {MOST_LINES} lines: the rest is not shown)")


class _Split:
    """A stream that gives what the training thread writes to a run, and all else to the stream that was there."""

    def __init__(self, target: TextIO, output: CapturedOutput) -> None:
        self._target = target
        self._output = output

    def write(self, text: str) -> int:
        if self._output.is_own_thread():
            self._output.write(str(text))
            return len(text)
        return self._target.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._output.is_own_thread():
            self._target.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
