"""The end of the file to which descriptors 1 and 2 of an engine lead: output of C code and of child processes."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import re
import stat
import sys
import termios
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dnb.units import amount

# So much is read at once; what is written beyond that between two reads is in the file alone.
MOST_BYTES = 256 << 10
# How long ipykernel's threads may take to copy what lies in their pipes; else it comes with the next read.
PIPE_SECONDS = 0.05
LOOK_SECONDS = 0.0005
# How often it is looked whether something lies in buffers and pipes: short steps shall not become longer.
BETWEEN_LOOKS_SECONDS = 0.02

# As ipyparallel formats them: time, and the name of the engine's program.
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \[\w*Engine\w*(?:\.\d+)?\][^\n]*\n?", re.MULTILINE)


@dataclass(slots=True)
class _Place:
    """The part of a file that was read."""

    descriptor: int
    num_bytes: int


class DescriptorTail:
    """A reader of what is appended to the files of some descriptors; they are neither moved nor written.

    In an engine ipykernel puts pipes in the place of 1 and 2, of which its threads publish and copy to the engine's log
    what comes. Nothing is read of a terminal, or of another program's pipe, as an engine of another launcher may have.

    Args:
        descriptors: those of one file are read once.
        pipes: from which something may be on its way to these files.
    """

    def __init__(self, descriptors: Iterable[int], *, pipes: Iterable[int] = ()) -> None:
        self._places: list[_Place] = []
        self._flush = _flush_of_stdout()
        known = set()
        for number in descriptors:
            with contextlib.suppress(OSError):  # closed, or on a system that has no such names
                found = os.fstat(number)
                if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in known:
                    known.add((found.st_dev, found.st_ino))
                    own = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
                    self._places.append(_Place(own, found.st_size))
        self._pipes = [number for number in pipes if _is_pipe(number)]
        self._next_look = 0.0
        self._num_waiting = array.array("i", [0])

    def read(self) -> str:
        """Return what was appended since the last call."""
        if not self._places:
            return ""
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + BETWEEN_LOOKS_SECONDS
            self._flush()
            if self._pipes and (num_bytes := self._num_on_the_way()):
                self._wait_for(num_bytes)
        return _without_log("".join([self._read(place) for place in self._places]))

    def close(self) -> None:
        """Let the files go."""
        while self._places:
            os.close(self._places.pop().descriptor)

    def _num_on_the_way(self) -> int:
        number = 0
        for pipe in self._pipes:
            fcntl.ioctl(pipe, termios.FIONREAD, self._num_waiting)
            number += self._num_waiting[0]
        return number

    def _wait_for(self, num_bytes: int) -> None:
        wanted = num_bytes + sum(place.num_bytes for place in self._places)
        deadline = time.monotonic() + PIPE_SECONDS
        while sum(_size_of(place) for place in self._places) < wanted and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)  # the threads that copy need the interpreter

    def _read(self, place: _Place) -> str:
        size = _size_of(place)
        begin, place.num_bytes = place.num_bytes, size
        if size <= begin:  # shorter if somebody has emptied it
            return ""
        text = os.pread(place.descriptor, min(size - begin, MOST_BYTES), begin).decode("utf-8", "backslashreplace")
        rest = size - begin - MOST_BYTES
        return f"{text}\n({amount(rest)} more of that are in the engine's log alone)\n" if rest > 0 else text


def _without_log(text: str) -> str:
    """Leave out what the engine's program writes of itself to the same file."""
    return _LOG_LINE.sub("", text)


def tail_of_streams() -> DescriptorTail:
    """Return the tail of what standard output and error lead to in this process."""
    descriptors = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it has none
            descriptors.append(stream.fileno())  # ipykernel's: of the file that was there before its pipe
    return DescriptorTail([*descriptors, 1, 2], pipes=(1, 2))


def _size_of(place: _Place) -> int:
    return os.fstat(place.descriptor).st_size


def _is_pipe(number: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(number).st_mode)
    except OSError:
        return False


def _flush_of_stdout() -> Callable[[], object]:
    """Return a function that writes what the C library still holds of its standard output."""
    try:
        library = ctypes.CDLL(None)
        stream = ctypes.c_void_p.in_dll(library, "stdout")
        flush = library.fflush
    except (OSError, ValueError, AttributeError):  # another C library
        return lambda: None
    flush.argtypes = [ctypes.c_void_p]
    return lambda: flush(stream)
