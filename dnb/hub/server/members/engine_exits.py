"""Ends of this host's engines: the system tells them until the supervisor has waited for them, then the supervisor."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from dnb.protocol.pool import Process
from dnb.transport.system.processes import exit_code_of, liveness

_EXIT = struct.Struct("<qq")  # pid, exit code as `subprocess` counts
# More of them than any hub can have missed; a reader who comes late reads the rest then.
_READ_BYTES = 256 * _EXIT.size


class ExitWriter:
    """The supervisor's side of a pipe that outlives every hub."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        for end in (self.reader, self._writer):
            os.set_blocking(end, False)

    def write(self, pid: int, status: int) -> None:
        """Write the exit of a child that was waited for; nobody need ever read it."""
        try:
            os.write(self._writer, _EXIT.pack(pid, os.waitstatus_to_exitcode(status)))
        except BlockingIOError:
            return  # full: no hub has asked for thousands of deaths


class ExitReader:
    """A hub's side.

    Args:
        reader: of the supervisor's pipe; None if it forks no engines.
    """

    def __init__(self, reader: int | None) -> None:
        self._reader = reader
        self._codes: dict[int, int] = {}

    def code_of(self, process: Process) -> int | None:
        """Return the exit code of a process of this host, as `subprocess` counts; None if it is not known."""
        code = exit_code_of(process)
        if code is None and liveness(process) == "gone":
            self._read()
            code = self._codes.pop(process.pid, None)
        return code

    def ending(self, processes: Iterable[tuple[int, Process]]) -> list[int]:
        """List the keys of those that are gone, or on their way out."""
        return [key for key, process in processes if exit_code_of(process) is not None or liveness(process) == "gone"]

    def _read(self) -> None:
        if self._reader is None:
            return
        try:
            packed = os.read(self._reader, _READ_BYTES)
        except BlockingIOError:
            return
        self._codes.update(_EXIT.iter_unpack(packed))
