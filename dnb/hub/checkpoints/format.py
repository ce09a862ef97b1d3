"""Checkpoints on disk: their format, their writer and their reader.

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
import errno
import hashlib
import hmac
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.tensor_files import TensorBuffer, tensors_in
from dnb.protocol.base import Record
from dnb.protocol.run import RunSpec
from dnb.transport.layout import dtype_name
from dnb.transport.system.failures import MESSAGE_LENGTH, clean_text
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
READ_BYTES = 4 << 20

_STEP_FOLDER = re.compile(r"step-(\d+)")
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_NO_DIGEST = b"0" * 64
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,40}")
# Of checkpoint.json: a hundred thousand parameters need some 30 MB.
MAX_MANIFEST_BYTES = 1 << 30
MAX_SIGNATURE_BYTES = 1 << 10
# Beyond this no number in a checkpoint means anything: steps, samples, bytes.
LARGEST_NUMBER = 1 << 53
# The year 5138: what is later is no time that a chart could show.
LATEST_SECONDS = 1e11


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
    """What checkpoint.json says."""

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
    """Where a run keeps the checkpoint of a step, if no other place is named."""
    return run_folder / CHECKPOINTS_FOLDER / f"step-{step:06d}"


# Writing -------------------------------------------------------------------------------------


class Disk:
    """The calls of the file system that may fail, one method each."""

    def make(self, folder: Path) -> None:
        """A new folder; those above it too."""
        if not folder.parent.exists():
            make_private_folder(folder.parent)
        folder.mkdir(mode=FOLDER_MODE)
        close_to_others(folder, FOLDER_MODE)  # also where the umask took more away

    def create(self, path: Path) -> int:
        """A new file, open for writing."""
        return open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(self, descriptor: int, piece: memoryview) -> int:
        """As much of a piece as the disk takes at once."""
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
        """A second name for a file."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """In one move; an empty folder may stand in its place."""
        source.rename(target)

    def free_bytes(self, folder: Path) -> int:
        """Room for files of this user where the folder is, or will be."""
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
    """A hidden folder that takes the target's place if the block ends well, and is gone if not."""
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
    """checkpoint.json, with its own digest in it."""
    blank = msgspec.structs.replace(manifest, digest=_NO_DIGEST.decode())
    text = msgspec.json.format(msgspec.json.encode(blank), indent=2) + b"\n"
    return text.replace(_NO_DIGEST, hashlib.sha256(text).hexdigest().encode(), 1)


# Reading -------------------------------------------------------------------------------------


class DamagedError(Exception):
    """A checkpoint is not as it was written.

    Args:
        file: of the checkpoint.
        reason: what is wrong with it.
    """

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file} {reason}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was opened; its files are as they were written only after `verify`, and what `load` gives always is."""

    folder: Path
    manifest: Manifest
    text: bytes = b""  # of checkpoint.json, from which the manifest was read
    signature: bytes = b""  # empty if there is none

    def verify(self, names: Iterable[str]) -> None:
        """Hold files against their digests.

        Raises:
            DamagedError: one is missing, or differs in a byte.
        """
        for name in names:
            with self._open(name) as file, _naming(self.folder / name):
                self._check(name, hashlib.file_digest(file, "sha256").hexdigest())

    def load(self, name: str) -> bytearray:
        """The bytes of a file: those that have the digest, however the file changes meanwhile.

        Raises:
            DamagedError: it is missing, or differs in a byte.
        """
        num_bytes = self._facts(name).num_bytes
        with self._open(name) as file:  # before memory is taken: it has the size that the manifest names
            try:
                data = bytearray(num_bytes)
            except (MemoryError, OverflowError) as error:
                raise DamagedError(self.folder / name, f"has {num_bytes:,} bytes, more than fit into memory") from error
            self._fill(memoryview(data), name, file, report=lambda _: None)
        return data

    def load_into(self, target: memoryview, name: str, *, report: Callable[[int], object]) -> None:
        """As `load`, into memory of the file's size.

        Args:
            target: may hold anything if this fails.
            name: of the file.
            report: told how many bytes there are, now and then.
        """
        with self._open(name) as file:
            self._fill(target, name, file, report=report)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file, as `load` found it.

        Raises:
            DamagedError: it is missing, differs in a byte, or holds no tensors.
        """
        try:
            return tensors_in(self.load(name))
        except ValueError as error:
            raise DamagedError(self.folder / name, f"is not a whole safetensors file: {error}") from error

    def _facts(self, name: str) -> FileFacts:
        facts = self.manifest.files.get(name)
        if facts is None:
            raise DamagedError(self.folder / name, "is not in this checkpoint")
        return facts

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[FileIO]:
        facts = self._facts(name)
        with open_plain(self.folder / name) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != facts.num_bytes:
                raise DamagedError(self.folder / name, f"has {num_bytes:,} bytes instead of {facts.num_bytes:,}")
            yield file

    def _fill(self, target: memoryview, name: str, file: FileIO, *, report: Callable[[int], object]) -> None:
        digest = hashlib.sha256()
        filled = 0
        with _naming(self.folder / name):
            while filled < len(target):
                piece = target[filled : filled + READ_BYTES]
                num_bytes = file.readinto(piece)
                if not num_bytes:
                    break
                digest.update(piece[:num_bytes])
                filled += num_bytes
                report(filled)
        self._check(name, digest.hexdigest())

    def _check(self, name: str, digest: str) -> None:
        if not hmac.compare_digest(digest.encode(), self._facts(name).sha256.encode()):
            raise DamagedError(self.folder / name, "does not have the digest with which it was written")

    def difference(self, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> str:
        """Where a model is not the one of this checkpoint: the first name, with both shapes; "" if nowhere."""
        for kind, theirs, ours in (
            ("parameter", self.manifest.parameters, parameters),
            ("buffer", self.manifest.buffers, buffers),
        ):
            for facts in theirs:
                if facts.name in self.manifest.loose:
                    continue
                tensor = ours.get(facts.name)
                if tensor is None:
                    return f"{kind} {facts.name!r} of shape {facts.shape} is in the checkpoint and not in the model"
                if tuple(tensor.shape) != facts.shape or dtype_name(tensor.dtype) != facts.dtype:
                    return (
                        f"{kind} {facts.name!r} is {facts.dtype} of shape {facts.shape} in the checkpoint, and "
                        f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)} in the model"
                    )
            known = {facts.name for facts in theirs}
            for name, tensor in ours.items():
                if name not in known and name not in self.manifest.loose:
                    return f"{kind} {name!r} of shape {tuple(tensor.shape)} is in the model and not in the checkpoint"
        return ""


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[FileIO]:
    """Open a file that is one: no link, which may lead anywhere, and no pipe, which may keep a reader waiting.

    Raises:
        DamagedError: it is something else, or cannot be read.
    """
    with _naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedError(path, "is not a file")
        yield file


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise DamagedError(path, reason) from error


def _read_small(path: Path, *, limit: int) -> bytes:
    with open_plain(path) as file, _naming(path):
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > limit:
            raise DamagedError(path, f"has {num_bytes:,} bytes, more than {limit:,}")
        pieces = []
        while piece := file.read(READ_BYTES):
            pieces.append(piece)
        return b"".join(pieces)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read checkpoint.json.

    Raises:
        DamagedError: it is missing or was changed.
        ArgumentError: a newer dnb wrote it.
    """
    path = folder / MANIFEST_FILE
    text = _read_small(path, limit=MAX_MANIFEST_BYTES)
    origin = _read_origin(text)
    newer = origin.newer
    found = _DIGEST.search(text)
    is_as_written = found is not None and _is_digest(text, found)
    if newer and (is_as_written or found is None):
        raise ArgumentError(f"{folder} was {newer}: update dnb")
    if not is_as_written:
        raise DamagedError(path, f"does not have its own digest{f', and says it was {newer}' if newer else ''}")
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
        _check_manifest(manifest)
    except _UNREADABLE as error:
        reason = f"is not a checkpoint's: {clean_text(str(error), length=MESSAGE_LENGTH)}"
        if origin.dnb != version("dnb"):
            reason += f" (dnb {origin.dnb} wrote it, this is dnb {version('dnb')})"
        raise DamagedError(path, reason) from error
    return Checkpoint(folder, manifest, text, _read_signature(folder))


# Whatever a decoder raises that reads what somebody else wrote; UnicodeDecodeError is a ValueError.
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


def _read_signature(folder: Path) -> bytes:
    try:
        return _read_small(folder / SIGNATURE_FILE, limit=MAX_SIGNATURE_BYTES)
    except DamagedError:
        return b""  # as that of a dnb that did not sign


def _check_manifest(manifest: Manifest) -> None:
    """Refuse what no dnb has written.

    Raises:
        ValueError: says what.
    """
    for name, facts in manifest.files.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"it names the file {name!r}, which is not in its folder")
        _check_range("num_bytes", facts.num_bytes)
    _check_range("step", manifest.step)
    _check_range("evaluated", manifest.evaluated, last=manifest.step)
    _check_range("num_steps", manifest.num_steps)
    _check_range("elapsed_seconds", manifest.elapsed_seconds, last=LATEST_SECONDS)
    _check_range("time", manifest.time, last=LATEST_SECONDS)


def _check_range(name: str, value: float, *, last: float = LARGEST_NUMBER) -> None:
    if not 0 <= value <= last:
        raise ValueError(f"its {name} is {value}, not within 0 and {last}")


def find_checkpoint(path: Path, *, wants: Callable[[Manifest], Iterable[str]]) -> tuple[Checkpoint, list[str]]:
    """The checkpoint at a path, or the newest in a run's folder; the one before it in its run, if it is damaged.

    Args:
        path: a checkpoint, or a run's folder.
        wants: files that are needed besides the tensors.

    Returns:
        The first whole one, verified, and a sentence for each after it that was passed over.

    Raises:
        ArgumentError: there is none, or none is whole.
    """
    damages: list[tuple[Path, str]] = []
    for folder in _candidates(path):
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.verify([*TENSOR_FILES, *wants(checkpoint.manifest)])
        except DamagedError as error:
            damages.append((folder, str(error)))
            continue
        step = checkpoint.manifest.step
        return checkpoint, [f"{text}: step {step} is used, not step {_step_of(folder)}" for folder, text in damages]
    raise ArgumentError(f"no checkpoint at {path} is whole: {'; '.join(text for _, text in damages)}")


def newest_step(run_folder: Path) -> int | None:
    """The step of a run's newest checkpoint, by what their manifests say; None if it has none."""
    try:
        folders = _step_folders(run_folder / CHECKPOINTS_FOLDER)
    except OSError:
        return None
    for folder in folders:
        try:
            return open_checkpoint(folder).manifest.step
        except (DamagedError, ArgumentError):
            continue
    return None


def _candidates(path: Path) -> list[Path]:
    """The newest first."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise ArgumentError(f"no checkpoint at {path}: it {what}")
    if (path / MANIFEST_FILE).exists() or (_STEP_FOLDER.fullmatch(path.name) and any(path.iterdir())):
        found = _STEP_FOLDER.fullmatch(path.name)
        before = [] if found is None else [f for f in _step_folders(path.parent) if _step_of(f) < int(found[1])]
        return [path, *before]
    inner = path / CHECKPOINTS_FOLDER
    folders = _step_folders(inner if inner.is_dir() else path)
    if not folders:
        raise ArgumentError(
            f"{path} is not a checkpoint, as it has no {MANIFEST_FILE}, and not the folder of a run with checkpoints: "
            "%dtrain fit --checkpoint-every N and %dtrain checkpoint write some"
        )
    return folders


def _step_folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_digest(text: bytes, found: re.Match[bytes]) -> bool:
    blank = text[: found.start(1)] + _NO_DIGEST + text[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which dnb wrote a checkpoint, as far as it says so."""

    format: int
    dnb: str

    @property
    def newer(self) -> str:
        """In words that it is a newer one; empty if not."""
        if self.format <= FORMAT:
            return ""
        here = f"this is dnb {version('dnb')} and reads up to {FORMAT}"
        return f"written by a newer dnb ({self.dnb}, format {self.format}; {here})"


def _read_origin(text: bytes) -> _Origin:
    class Head(msgspec.Struct):
        format: int = 0
        versions: dict[str, str] = {}

    try:
        head = msgspec.json.decode(text, type=Head)
    except _UNREADABLE:
        return _Origin(0, "?")
    named = head.versions.get("dnb", "")
    return _Origin(head.format, named if _VERSION.fullmatch(named) else "?")
