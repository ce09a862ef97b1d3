"""Lines that wait for a disk that takes nothing: in the pool's memory folder, so that the next hub finds them, too."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

from dnb.transport.system.own_files import create_file, open_file, open_folder

log = logging.getLogger(__name__)

# What is not known: the file that the lines belong to could not be opened.
UNKNOWN = -1
# So much of a memory folder's free space one backlog may take; what is more waits in this process only.
LARGEST_PART = 1 / 8

_OFFSET = struct.Struct("<q")


class Backlog:
    """Lines that wait for their file, in order.

    Args:
        folders: of the pool in memory, the best first; the first that is there takes it. Without one, it is kept in
            this process only.
        name: of the file there; what a hub before has left in it is taken up.
    """

    def __init__(self, folders: Sequence[Path], name: str) -> None:
        self._folders = folders
        self._name = name
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._num_kept = 0  # bytes of lines in that file
        self._room = 0
        self._rest = bytearray()  # lines after those
        self.offset = UNKNOWN  # in the file that they wait for, of their first byte
        self._take_up()

    def __len__(self) -> int:
        """Return the number of bytes that wait."""
        return self._num_kept + len(self._rest)

    @property
    def is_shared(self) -> bool:
        """True if the next hub would find all of it."""
        return not self._rest

    def begin(self, offset: int) -> None:
        """Set the offset in their file of the lines that follow; it is empty until now."""
        self.offset = offset
        for folder in self._folders:
            path = folder / self._name
            try:
                with open_folder(folder) as place:
                    path.unlink(missing_ok=True)
                    descriptor = create_file(self._name, folder=place)
                self._room = int(shutil.disk_usage(folder).free * LARGEST_PART)
            except FileNotFoundError:  # the pool has put nothing there
                continue
            except OSError as error:
                log.warning("lines that wait for a disk cannot be kept in %s: %s", folder, error.strerror)
                continue
            self._path, self._descriptor = path, descriptor
            if self._write(_OFFSET.pack(offset), at=0):
                return
            self._forget_file()

    def append(self, lines: bytes) -> None:
        """Add whole lines."""
        has_room = self._descriptor is not None and not self._rest and self._num_kept + len(lines) <= self._room
        if has_room and self._write(lines, at=_OFFSET.size + self._num_kept):
            self._num_kept += len(lines)
        else:
            self._rest += lines

    def read(self, begin: int, num_bytes: int) -> bytes:
        """Return a piece of the waiting bytes."""
        if self._descriptor is None or begin >= self._num_kept:
            first = begin - self._num_kept
            return bytes(self._rest[first : first + num_bytes])
        return os.pread(self._descriptor, min(num_bytes, self._num_kept - begin), _OFFSET.size + begin)

    def read_from(self, begin: int) -> bytes:
        """Return all waiting bytes from an offset on."""
        pieces: list[bytes] = []
        while piece := self.read(begin, 1 << 24):
            pieces.append(piece)
            begin += len(piece)
        return b"".join(pieces)

    def settle(self, offset: int) -> None:
        """Set the offset in the file at which the lines belong."""
        self.offset = offset
        if self._descriptor is not None:
            self._write(_OFFSET.pack(offset), at=0)

    def clear(self) -> None:
        """Drop all lines."""
        self._forget_file()
        self._num_kept, self._rest, self.offset = 0, bytearray(), UNKNOWN

    def close(self) -> None:
        """Leave what waits to the next hub."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take_up(self) -> None:
        for folder in self._folders:
            path = folder / self._name
            try:
                descriptor = open_file(path, writable=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s is of no use: %s", path, error.strerror)
                continue
            content = _read_all(descriptor)
            self._path, self._descriptor = path, descriptor
            whole = content.rfind(b"\n") + 1
            if whole <= _OFFSET.size:
                self._forget_file()
                continue
            (self.offset,) = _OFFSET.unpack_from(content)
            self._num_kept = whole - _OFFSET.size
            self._room = self._num_kept + int(shutil.disk_usage(folder).free * LARGEST_PART)
            return

    def _write(self, content: bytes, *, at: int) -> bool:
        """Write to the shared file, and return whether there was room for all of it."""
        assert self._descriptor is not None
        try:
            return os.pwrite(self._descriptor, content, at) == len(content)
        except OSError:
            return False

    def _forget_file(self) -> None:
        self.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._path = None


def _read_all(descriptor: int) -> bytes:
    pieces: list[bytes] = []
    begin = 0
    while piece := os.pread(descriptor, 1 << 24, begin):
        pieces.append(piece)
        begin += len(piece)
    return b"".join(pieces)
