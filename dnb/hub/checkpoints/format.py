"""Checkpoints on disk: their format, and their writer. `dnb.hub.checkpoints.reader` reads them.

    <run>/checkpoints/step-000120/
        model.safetensors      parameters and buffers by their names in state_dict, tied ones once
        optimizer.safetensors  tensors of optimizer and scheduler, and buffers that no state_dict has
        history.safetensors    what was measured until then, float64
        extra_state.pt         what get_extra_state of modules gave, by its names in state_dict, for torch.load
        checkpoint.json        everything else, with a digest of every file and of itself
        checkpoint.sig         that this user's hub wrote checkpoint.json: see `dnb.hub.checkpoints.signing`
        job.*, data.*          the user's objects as `fit` sent them: hard links to <run>/checkpoints/sources
        mended.pickle          step and loss function that took the place of the job's in mid-run

A checkpoint is whole or not there: it is written aside, synced and renamed. No file but job.*, data.* and mended.pickle
needs pickle, and nothing here opens those. Whoever reads one must not rely on what it says: it may come from anybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from dnb.hub.checkpoints.tensor_files import TensorBuffer
from dnb.protocol.base import Record
from dnb.protocol.run import RunSpec
from dnb.transport.layout import dtype_name
from dnb.transport.system.own_files import FOLDER_MODE
from dnb.transport.system.private_files import close_to_others, make_private_folder, open_private

FORMAT = 1
MANIFEST_FILE = "checkpoint.json"
SIGNATURE_FILE = "checkpoint.sig"
MODEL_FILE = "model.safetensors"
EXTRA_FILE = "extra_state.pt"
OPTIMIZER_FILE = "optimizer.safetensors"
HISTORY_FILE = "history.safetensors"
TENSOR_FILES = (MODEL_FILE, OPTIMIZER_FILE, HISTORY_FILE)
CHECKPOINTS_FOLDER = "checkpoints"

STEP_FOLDER = re.compile(r"step-(\d+)")
NO_DIGEST = b"0" * 64


# What is written -----------------------------------------------------------------------------


class FileFacts(Record, frozen=True):
    """One file of a checkpoint."""

    num_bytes: int
    sha256: str


class TensorFacts(Record, frozen=True):
    """One parameter or buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class StateFacts(Record, frozen=True):
    """The state of an optimizer or scheduler, its tensors left out: see `dnb.transport.state_trees`."""

    kind: str  # name of its class
    tree: Any


class Manifest(Record, frozen=True):
    """The contents of checkpoint.json."""

    digest: str  # SHA-256 of the file with zeros in this place
    format: int
    name: str  # of the run
    step: int  # committed; the order of samples follows from it and the seed
    num_steps: int
    evaluated: int  # the last step after which an evaluation was committed
    num_history_rows: int
    time: float  # seconds since the epoch
    elapsed_seconds: float  # of the run
    versions: dict[str, str]
    metrics: dict[str, float | str]  # at that step; NaN and infinity are words
    parameters: tuple[TensorFacts, ...]
    buffers: tuple[TensorFacts, ...]
    tied: dict[str, str]  # name that is left out -> name under which the tensor lies
    optimizer: StateFacts
    scheduler: StateFacts | None
    left_out: tuple[str, ...]  # of the scheduler's state: functions, which the user's code makes anew
    spec: RunSpec
    files: dict[str, FileFacts]
    kept: Any = None  # tree of what functions of the user's keep, its tensors left out
    extra: Any = None  # states that modules give by get_extra_state, as `StateFacts.tree`; None: there are none
    loose: tuple[str, ...] = ()  # buffers that were added by forward, or have got another shape
    empty: tuple[str, ...] = ()  # those among them that hold nothing
    transient: tuple[str, ...] = ()  # those that no state_dict has
    toggled: tuple[str, ...] = ()  # parameters that user code has thawed or frozen since the run began
    frozen_on_engines: tuple[str, ...] = ()  # those that user code has frozen on engines


def facts_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorFacts, ...]:
    """Names, shapes and dtypes."""
    return tuple(
        TensorFacts(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
        for name, tensor in tensors.items()
    )


def step_folder(run_folder: Path, step: int) -> Path:
    """Return a run's folder for the checkpoint of a step, if no other place is named."""
    return run_folder / CHECKPOINTS_FOLDER / f"step-{step:06d}"


# Writing -------------------------------------------------------------------------------------


class Disk:
    """The calls of the file system that may fail, one method each."""

    def make(self, folder: Path) -> None:
        """Make a new folder; those above it too."""
        if not folder.parent.exists():
            make_private_folder(folder.parent)
        folder.mkdir(mode=FOLDER_MODE)
        close_to_others(folder, FOLDER_MODE)  # also where the umask took more away

    def create(self, path: Path) -> int:
        """Create a new file, open for writing."""
        return open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(self, descriptor: int, piece: memoryview) -> int:
        """Write as much of a piece as the disk takes at once."""
        return os.write(descriptor, piece)

    def sync(self, descriptor: int) -> None:
        """Wait until it is durable."""
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Wait until its names are durable."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Make a second name for a file."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one move; an empty folder may stand in the new place."""
        source.rename(target)

    def free_bytes(self, folder: Path) -> int:
        """Return the room for files of this user where the folder is, or will be."""
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def write_file(path: Path, pieces: Iterable[memoryview], disk: Disk) -> FileFacts:
    """Write and sync a new file, hashing on the way."""
    digest = hashlib.sha256()
    num_bytes = 0
    descriptor = disk.create(path)
    try:
        for piece in pieces:
            digest.update(piece)
            num_bytes += len(piece)
            while len(piece):
                piece = piece[disk.write(descriptor, piece) :]
        disk.sync(descriptor)
    finally:
        os.close(descriptor)
    return FileFacts(num_bytes=num_bytes, sha256=digest.hexdigest())


def write_checkpoint(
    target: Path,
    manifest: Manifest,
    buffers: Mapping[str, TensorBuffer],
    *,
    add_sources: Callable[[Path], dict[str, FileFacts]],
    disk: Disk,
    sign: Callable[[bytes], bytes] = lambda _: b"",
    extra: bytes = b"",
) -> int:
    """Make a checkpoint durable; if anything fails, nothing of it is left, and what was there before still is.

    Args:
        target: its folder; a checkpoint that is there is replaced.
        manifest: its files and digest are filled in.
        buffers: the tensor files.
        add_sources: puts the user's objects into a folder.
        disk: where it is written.
        sign: makes the signature of checkpoint.json; an empty one is left out.
        extra: likewise, extra_state.pt.

    Returns:
        Bytes of the tensor files.

    Raises:
        OSError: of the first call that failed.
    """
    with aside(target, disk) as folder:
        files = {name: write_file(folder / name, buffer.pieces(), disk) for name, buffer in buffers.items()}
        num_bytes = sum(facts.num_bytes for facts in files.values())
        if extra:
            files[EXTRA_FILE] = write_file(folder / EXTRA_FILE, [memoryview(extra)], disk)
        files |= add_sources(folder)
        sealed = seal(msgspec.structs.replace(manifest, files=files))
        signature = sign(sealed)
        if signature:
            write_file(folder / SIGNATURE_FILE, [memoryview(signature)], disk)
        write_file(folder / MANIFEST_FILE, [memoryview(sealed)], disk)
    return num_bytes


@contextlib.contextmanager
def aside(target: Path, disk: Disk) -> Iterator[Path]:
    """Yield a hidden folder that takes the target's place if the block ends well, and is gone if not."""
    folder = target.with_name(f".{target.name}.{_mark()}")
    try:
        disk.make(folder)
        yield folder
        disk.sync_folder(folder)
        _move(folder, target, disk)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    disk.sync_folder(target.parent)


def _move(folder: Path, target: Path, disk: Disk) -> None:
    if not (target / MANIFEST_FILE).exists():
        disk.rename(folder, target)
        return
    before = target.with_name(f".{target.name}.before.{_mark()}")
    disk.rename(target, before)
    try:
        disk.rename(folder, target)
    except BaseException:
        before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove one in a way that never leaves half of it under its name."""
    hidden = folder.with_name(f".{folder.name}.{_mark()}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _mark() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def remove_torn(folder: Path) -> None:
    """Remove what a process of this user that is gone had begun to write."""
    ours = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d{{1,9}})-[0-9a-f]{{6}}")
    for path in folder.glob(".*"):
        found = ours.fullmatch(path.name)
        if found is not None and not psutil.pid_exists(int(found[1])) and path.lstat().st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)


def seal(manifest: Manifest) -> bytes:
    """Return checkpoint.json with its own digest in it."""
    blank = msgspec.structs.replace(manifest, digest=NO_DIGEST.decode())
    text = msgspec.json.format(msgspec.json.encode(blank), indent=2) + b"\n"
    return text.replace(NO_DIGEST, hashlib.sha256(text).hexdigest().encode(), 1)
