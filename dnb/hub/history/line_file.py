"""A file of lines that are only added: what a disk does not take is kept in order, and written when it takes it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from dnb.hub.history.backlog import UNKNOWN, Backlog
from dnb.transport.system.private_files import make_private_folder, open_private

# So much is written at once of what waited: a few milliseconds.
PIECE_BYTES = 1 << 20
# What is in the place of a file that was removed, or was put there by somebody else, is kept under this name.
OTHER_SUFFIX = ".other"


class LineFile:
    """Adds lines to one file, and never raises: a disk that fails costs neither a line nor their order.

    Args:
        path: made if it is not there; a torn line at its end is cut off.
        backlog: where lines wait.
    """

    def __init__(self, path: Path, backlog: Backlog) -> None:
        self.path = path
        self.fault: OSError | None = None  # why lines wait
        self._backlog = backlog
        self._descriptor: int | None = None
        self._num_done = 0  # bytes of the backlog that are in the file
        self.was_behind = bool(backlog)  # a hub before has left lines
        try:
            self._open()
        except OSError as error:
            self._fail(error)
        if self.was_behind:
            self.fault = self.fault or _more_waits()
            self.catch_up()

    @property
    def num_waiting(self) -> int:
        """Bytes that are not in the file yet."""
        return len(self._backlog) - self._num_done

    @property
    def is_whole(self) -> bool:
        """True if the file is there and nothing waits for it."""
        return self.fault is None

    @property
    def is_catching_up(self) -> bool:
        """True if the disk took the last write, and more waits."""
        return self.fault is not None and self.fault.errno == errno.EAGAIN

    def append(self, lines: bytes) -> None:
        """Add whole lines."""
        done = 0
        if self.fault is None:
            try:
                done = self._write(lines)
            except OSError as error:
                self._fail(error)
            if done == len(lines):
                return
        if not self._backlog and self._backlog.offset == UNKNOWN:
            self._backlog.begin(self._size())
        self._backlog.append(lines[done:])

    def replace(self) -> None:
        """Forget every line."""
        self._backlog.clear()
        self._num_done = 0
        try:
            if self._descriptor is None:
                self._open()
            assert self._descriptor is not None
            os.ftruncate(self._descriptor, 0)
            self.fault = None
        except OSError as error:
            self._fail(error)
            self._backlog.begin(0)  # from where it is written when it can be

    def catch_up(self, *, limit_bytes: int | None = PIECE_BYTES) -> None:
        """Write what waits, as far as the disk takes it.

        Args:
            limit_bytes: after which it is enough for now; None for all.
        """
        left = limit_bytes
        try:
            if self._descriptor is None:
                self._open()
            self._cut()
            while self.num_waiting and (left is None or left > 0):
                done = self._write(self._next_piece())
                if not done:
                    return  # `_write` has said why
                self._num_done += done
                left = None if left is None else left - done
        except OSError as error:
            self._fail(error)
            return
        if self.num_waiting:
            self.fault = _more_waits()
        else:
            self._backlog.clear()
            self._num_done = 0
            self.fault = None

    def _next_piece(self) -> bytes:
        """Return whole lines that wait."""
        num_bytes = PIECE_BYTES
        while True:
            piece = self._backlog.read(self._num_done, num_bytes)
            end = piece.rfind(b"\n") + 1
            if end or num_bytes >= self.num_waiting:
                return piece[:end]
            num_bytes *= 2

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the file that is written; True also if that cannot be known."""
        if self._descriptor is None:
            return True
        try:
            own = os.fstat(self._descriptor)
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        is_same = (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
        # Some file systems number a file anew from time to time.
        return is_same or (own.st_size, own.st_mtime_ns) == (found.st_size, found.st_mtime_ns)

    def put_back(self) -> None:
        """Write the file anew where somebody has removed it; what is in its place now stays beside it.

        Raises:
            OSError: it cannot be; lines go on into the file that has no name any more.
        """
        assert self._descriptor is not None
        make_private_folder(self.path.parent)
        aside = self.path.with_name(f".{self.path.name}")
        descriptor = open_private(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        try:
            _copy(self._descriptor, descriptor)
            if os.path.lexists(self.path):
                self.path.rename(self.path.with_name(self.path.name + OTHER_SUFFIX))
            aside.rename(self.path)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
        os.close(self._descriptor)
        self._descriptor = descriptor

    def content(self) -> bytes:
        """Return every whole line, also those that wait."""
        written = self._read()
        offset = self._backlog.offset
        if offset != UNKNOWN:
            written = written[: offset + self._num_done]
        written = written[: written.rfind(b"\n") + 1]
        return written + self._backlog.read_from(self._num_done)

    def forget(self) -> None:
        """Drop the lines that wait."""
        self._backlog.clear()

    def close(self) -> None:
        """Close it; what waits is left to the next hub."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._backlog.close()

    def _open(self) -> None:
        make_private_folder(self.path.parent)
        descriptor = open_private(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            _cut_torn_line(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _write(self, lines: bytes) -> int:
        """Write whole lines and return the number of bytes written; all, or this has failed."""
        assert self._descriptor is not None
        done = os.write(self._descriptor, lines)
        if done == len(lines):
            return done
        whole = lines.rfind(b"\n", 0, done) + 1
        with contextlib.suppress(OSError):  # no reader shall see half a line
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - (done - whole))
        self._fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return whole

    def _cut(self) -> None:
        """Cut off what is there of the backlog beyond what counts as written: another hub's, or half a line."""
        assert self._descriptor is not None
        end = self._backlog.offset + self._num_done
        if self._backlog.offset != UNKNOWN and os.fstat(self._descriptor).st_size > end:
            os.ftruncate(self._descriptor, end)
        _cut_torn_line(self._descriptor)
        if self._backlog and self._backlog.offset == UNKNOWN:
            self._backlog.settle(os.fstat(self._descriptor).st_size)

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                return file.read(os.fstat(file.fileno()).st_size)  # not more: it may be a device
        except OSError:
            return b""

    def _size(self) -> int:
        try:
            return os.fstat(self._descriptor).st_size if self._descriptor is not None else UNKNOWN
        except OSError:
            return UNKNOWN

    def _fail(self, error: OSError) -> None:
        self.fault = error
        if error.errno == errno.ESTALE and self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def _more_waits() -> OSError:
    return OSError(errno.EAGAIN, "more waits to be written")


def _cut_torn_line(descriptor: int) -> None:
    """Cut off the torn last line of an earlier hub, which would swallow the next one."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return
    end = found.st_size
    while end > 0:
        begin = max(end - PIECE_BYTES, 0)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        end = begin if newline < 0 else begin + newline + 1
        if newline >= 0:
            break
    if end < found.st_size:
        os.ftruncate(descriptor, end)


def _copy(source: int, target: int) -> None:
    begin = 0
    while piece := os.pread(source, PIECE_BYTES, begin):
        begin += len(piece)
        while piece:
            piece = piece[os.write(target, piece) :]
