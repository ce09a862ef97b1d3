"""The user's objects of a run, as `fit` sent them, made durable once and linked into every checkpoint."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

from dnb.hub.checkpoints.format import CHECKPOINTS_FOLDER, Disk, FileFacts, aside, remove_checkpoint, write_file
from dnb.hub.checkpoints.tensor_files import PIECE_BYTES
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import RunSpec

log = logging.getLogger(__name__)

SOURCES_FOLDER = "sources"
JOB_FILES = ("job.pickle", "job.buffers")
DATA_FILES = ("data.pickle", "data.buffers")
# Step and loss function that took the place of the job's in mid-run; only where some did.
REPLACED_FUNCTIONS_FILE = "mended.pickle"

# What the system says where a file cannot have a second name: another disk, a file system without links.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS})


class Sources:
    """Holds the memory in which model and data came until it is on disk, or the run has ended.

    Args:
        frames: spec, job, data and signature as the client signed them.
        spec: of the run.
    """

    def __init__(self, frames: Sequence[bytes], spec: RunSpec) -> None:
        self._folder = Path(spec.folder) / CHECKPOINTS_FOLDER / SOURCES_FOLDER
        self._pickles = {"job.pickle": frames[1], "data.pickle": frames[2]}
        self._memory = {
            name: memory
            for name, payload in (("job.buffers", spec.job), ("data.buffers", spec.data))
            if (memory := _open(payload)) is not None
        }
        if spec.data.segment is not None and "data.buffers" not in self._memory:
            del self._pickles["data.pickle"]  # the run had ended under a hub before
        self._kept: dict[str, FileFacts] = {}
        self._replaced_functions: bytes | None = None

    def replace_functions(self, pickled: bytes) -> None:
        """Checkpoints from now on hold these functions beside the job that was sent first."""
        self._replaced_functions = pickled

    @property
    def pending_bytes(self) -> int:
        """The bytes that the next checkpoint has to write besides its own."""
        if self._kept:
            return 0
        return sum(map(len, self._pickles.values())) + sum(map(len, self._memory.values()))

    def add_to(self, folder: Path, disk: Disk) -> dict[str, FileFacts]:
        """Put every file into a checkpoint, as a link where that can be.

        Raises:
            OSError: of the first call that failed.
        """
        if not self._kept:
            self._keep(disk)
        files = dict(self._kept)
        for name in self._kept:
            try:
                disk.link(self._folder / name, folder / name)
            except FileNotFoundError:  # somebody removed it
                log.warning("%s is gone: %s is without it", self._folder / name, folder)
                del files[name]
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                files[name] = write_file(folder / name, _pieces_of(self._folder / name), disk)
        if self._replaced_functions is not None:
            files[REPLACED_FUNCTIONS_FILE] = write_file(
                folder / REPLACED_FUNCTIONS_FILE, [memoryview(self._replaced_functions)], disk
            )
        return files

    def forget_data(self) -> None:
        """Forget data that nobody has kept until the end of the run."""
        if not self._kept:
            self._pickles.pop("data.pickle", None)
            self._close("data.buffers")

    def close(self) -> None:
        """Let go of all memory."""
        for name in list(self._memory):
            self._close(name)

    def _keep(self, disk: Disk) -> None:
        if self._folder.exists():  # of an earlier hub; what links to it stays
            remove_checkpoint(self._folder)
        with aside(self._folder, disk) as folder:
            kept = {
                name: write_file(folder / name, self._pieces(name), disk) for name in [*self._pickles, *self._memory]
            }
        self._kept = kept
        self.close()

    def _pieces(self, name: str) -> Iterator[memoryview]:
        return _cut(self._pickles[name] if name in self._pickles else self._memory[name])

    def _close(self, name: str) -> None:
        memory = self._memory.pop(name, None)
        if memory is not None:
            with contextlib.suppress(BufferError):  # a failed write still shows a piece: it goes with that
                memory.close()


def _open(payload: PayloadRef) -> mmap.mmap | None:
    """Map a segment, so that its memory outlives its name; None if there is none any more."""
    if payload.segment is None:
        return None
    try:
        with open(payload.segment.path, "rb") as file:
            return mmap.mmap(file.fileno(), payload.segment.num_bytes, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None


def _cut(whole: bytes | mmap.mmap) -> Iterator[memoryview]:
    with memoryview(whole) as view:
        for begin in range(0, len(view), PIECE_BYTES):
            with view[begin : begin + PIECE_BYTES] as piece:
                yield piece


def _pieces_of(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield memoryview(piece)
