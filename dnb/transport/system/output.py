"""A process's output where it goes into a file: a full disk fails no `print` of user code."""

from __future__ import annotations

import contextlib
import io
from typing import TextIO


class LossyOutput(io.TextIOBase):
    """Writes where another stream writes, and drops what the disk does not take.

    Args:
        target: in whose file it ends.
    """

    def __init__(self, target: TextIO) -> None:
        self._target = target

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The target's encoding."""
        return self._target.encoding

    def writable(self) -> bool:
        """Say that it may be written."""
        return True

    def isatty(self) -> bool:
        """Say whether a person reads it."""
        return self._target.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the target's file."""
        return self._target.fileno()

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            self._target.write(text)
            self._target.flush()
        except (OSError, ValueError):  # full, read-only, closed; or letters that the encoding does not have
            pass
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        with contextlib.suppress(OSError, ValueError):
            self._target.flush()
