"""Shared memory: files in a memory-backed folder, one folder per pool, reserved before use.

A pool's folders have names that nobody can guess, and are made by whoever needs them first. Other users of the host may
write where they lie: so it is checked, whenever one is used, that this user has made the folder and the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dnb.errors import SpaceError
from dnb.protocol.memory import SegmentRef
from dnb.transport.system.own_files import create_file, open_file, open_folder, remove_folder

# Tests and containers name other folders here, separated like a PATH.
FOLDERS_VARIABLE = "DNB_SEGMENT_FOLDERS"

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS})


def segment_roots() -> list[Path]:
    """Return the folders where pools may put segments, the best first."""
    named = os.environ.get(FOLDERS_VARIABLE)
    if named:
        return [Path(folder) for folder in named.split(os.pathsep)]
    roots = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    return [root for root in roots if root.is_dir()]


def pool_folders(name: str) -> list[Path]:
    """Return the folders for the segments of one pool, whether they exist or not."""
    return [root / f"dnb-{name}" for root in segment_roots()]


def draw_pool_folders() -> list[Path]:
    """Draw folders for the segments of a new pool: names that nobody can guess, one of its own in every root."""
    return [root / f"dnb-{secrets.token_hex(16)}" for root in segment_roots()]


def named_folders(folders: Iterable[str], cluster_id: str) -> list[Path]:
    """Return the folders that a record names; in an older dnb's, which names none, they bear the cluster's name."""
    return [Path(folder) for folder in folders] or pool_folders(cluster_id)


def remove_folders(folders: Iterable[Path]) -> None:
    """Remove every segment of a pool; processes that have one mapped keep it until they end."""
    for folder in folders:
        remove_folder(folder)


def remove_pool_folders(name: str) -> None:
    """Remove every segment of the pool whose folders bear this name."""
    remove_folders(pool_folders(name))


class Segment:
    """A mapped piece of shared memory. The file lives until `unlink`, the memory until the last view."""

    def __init__(self, path: Path, memory: mmap.mmap, *, note: str = "") -> None:
        self.path = path
        self.memory = memory
        self.note = note  # why this folder was chosen, if it was not the first

    @property
    def ref(self) -> SegmentRef:
        """The path and size by which another process maps the same memory."""
        return SegmentRef(path=str(self.path), num_bytes=len(self.memory))

    def unlink(self) -> None:
        """Remove the name; what is mapped stays usable."""
        self.path.unlink(missing_ok=True)


def create_segment(name: str, num_bytes: int, *, folders: Sequence[Path]) -> Segment:
    """Reserve `num_bytes` of zeros in the first folder that has room.

    Args:
        name: begins the file's name; its end is random, so that no two segments are ever taken for each other.
        num_bytes: at least 1 is reserved.
        folders: candidates, see `pool_folders`.

    Raises:
        SpaceError: no folder has room; says what each lacked.
    """
    lacks: list[str] = []
    file_name = f"{name}-{secrets.token_hex(4)}"
    for folder in folders:
        try:
            memory = _reserve(folder, file_name, max(num_bytes, 1))
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            lacks.append(f"{folder.parent} has {_free(folder.parent)} free ({error.strerror})")
            continue
        note = f"{name} needs {megabytes(num_bytes)}: {'; '.join(lacks)}; using {folder.parent}" if lacks else ""
        return Segment(folder / file_name, memory, note=note)
    raise SpaceError(
        f"{name} needs {megabytes(num_bytes)} of shared memory, but {'; '.join(lacks)}: "
        f"free some, start the container with a larger --shm-size, or set {FOLDERS_VARIABLE} to a folder with room"
    )


def open_segment(ref: SegmentRef, *, private: bool = False) -> Segment:
    """Map a segment that another process made.

    Args:
        ref: as `Segment.ref` gave it.
        private: writes stay in this process (copy on write).

    Raises:
        PermissionError: another user has made it, or could write into it.
    """
    access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
    descriptor = open_file(Path(ref.path), writable=True)
    try:
        memory = mmap.mmap(descriptor, ref.num_bytes, access=access)
    finally:
        os.close(descriptor)
    return Segment(Path(ref.path), memory)


def megabytes(num_bytes: int) -> str:
    """Format bytes for messages: 1 MB = 10^6 bytes."""
    return f"{num_bytes / 1e6:,.1f} MB"


def _reserve(folder: Path, name: str, num_bytes: int) -> mmap.mmap:
    with open_folder(folder, make=True) as place:
        descriptor = create_file(name, folder=place)
        try:
            # Writing past a full tmpfs is SIGBUS, not an exception: the space must be there before it is mapped.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                _write_zeros(descriptor, num_bytes)
            return mmap.mmap(descriptor, num_bytes)
        except OSError:
            os.unlink(name, dir_fd=place)
            raise
        finally:
            os.close(descriptor)


def _write_zeros(descriptor: int, num_bytes: int) -> None:
    block = bytes(1 << 20)
    written = 0
    while written < num_bytes:
        written += os.write(descriptor, block[: num_bytes - written])


def _free(folder: Path) -> str:
    try:
        return megabytes(shutil.disk_usage(folder).free)
    except OSError as error:
        return f"unknown space ({error.strerror})"
