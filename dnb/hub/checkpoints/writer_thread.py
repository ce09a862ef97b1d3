"""The thread that writes checkpoints: it touches only what was copied."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from dnb.hub.checkpoints.format import Disk, Manifest, write_checkpoint
from dnb.hub.checkpoints.signing import Signer
from dnb.hub.checkpoints.tensor_files import TensorBuffer
from dnb.hub.checkpoints.user_objects import Sources
from dnb.transport.segments import megabytes


@dataclass(frozen=True, slots=True)
class PendingCheckpoint:
    """One checkpoint that is being written, or waits for its turn."""

    target: Path
    manifest: Manifest
    buffers: dict[str, TensorBuffer]
    tickets: tuple[int, ...]
    is_of_policy: bool
    needed_bytes: int
    extra: bytes = b""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of writing a checkpoint."""

    checkpoint: PendingCheckpoint
    error: BaseException | None
    num_bytes: int = 0
    seconds: float = 0.0


class CheckpointThread:
    """Writes one checkpoint after the other, aside from the run.

    Args:
        sources: the user's objects, which belong to every checkpoint.
        disk: where they are written.
        signer: signs them for this user.
    """

    def __init__(self, sources: Sources, *, disk: Disk, signer: Signer) -> None:
        self.sources = sources
        self.disk = disk
        self._signer = signer
        self._thread: threading.Thread | None = None
        self._results: SimpleQueue[WriteResult] = SimpleQueue()

    @property
    def is_busy(self) -> bool:
        """True while one is being written, or its result was not collected yet."""
        return self._thread is not None

    @property
    def signer_fault(self) -> str:
        """The reason why checkpoints are not signed; empty if they are."""
        return self._signer.fault

    def start(self, checkpoint: PendingCheckpoint) -> None:
        """Let a checkpoint be written; none may be being written."""
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="dnb-checkpoint", daemon=True)
        self._thread.start()

    def collect(self) -> WriteResult | None:
        """Return the result of the one that was being written; None if it still is."""
        try:
            result = self._results.get_nowait()
        except Empty:
            return None
        self.join()
        self._thread = None
        return result

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait for the one that is being written, but no longer than so."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def free_space(self, target: Path) -> str:
        """Return how much room there is, for people."""
        try:
            return megabytes(self.disk.free_bytes(target.parent))
        except OSError:
            return "unknown"

    def _write(self, checkpoint: PendingCheckpoint) -> None:
        began = time.monotonic()
        try:
            free = self.disk.free_bytes(checkpoint.target.parent)
            if free < checkpoint.needed_bytes:  # the history needs the little there is
                raise OSError(errno.ENOSPC, "No space left on device")
            num_bytes = write_checkpoint(
                checkpoint.target,
                checkpoint.manifest,
                checkpoint.buffers,
                add_sources=lambda folder: self.sources.add_to(folder, self.disk),
                disk=self.disk,
                sign=self._signer.sign,
                extra=checkpoint.extra,
            )
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run goes on, and says what it was
            self._results.put(WriteResult(checkpoint, error))
        else:
            self._results.put(WriteResult(checkpoint, None, num_bytes, time.monotonic() - began))
