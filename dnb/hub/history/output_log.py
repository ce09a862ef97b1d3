"""The file of a run in which everything stands that user code has printed on engines and in the hub."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dnb.hub.history.line_file import LineFile
from dnb.units import amount

# A run prints no more than that into its folder.
MOST_OUTPUT_BYTES = 16 << 20


class OutputLog:
    """Writes what engines and the hub print, each line with time, engine and step, up to a number of bytes for the run.

    Args:
        file: to which lines are added.
        most_bytes: after which a last line says that the rest is left out.
    """

    def __init__(self, file: LineFile, *, most_bytes: int = MOST_OUTPUT_BYTES) -> None:
        self._file = file
        self._most_bytes = most_bytes
        self._num_bytes = len(file.content())  # a hub before may have written some

    def append(self, lines: Sequence[str], *, engine: int | None, step: int, when: float) -> None:
        """Add lines that an engine has sent.

        Args:
            lines: without line feeds at their ends.
            engine: that printed them; None: the hub.
            step: that was committed last.
            when: they came, in seconds since the epoch.
        """
        if self._num_bytes > self._most_bytes:
            return
        who = "hub" if engine is None else f"engine {engine}"
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))} {who} step {step}: "
        text = "".join(f"{head}{' '.join(line.splitlines())}\n" for line in lines)
        self._num_bytes += len(text.encode())
        if self._num_bytes > self._most_bytes:
            text = f"{head}(more than {amount(self._most_bytes)} of output: the rest is left out)\n"
            self._num_bytes += len(text)
        self._file.append(text.encode())
