"""Checkpoints that are read: opened, held against their digests, and found in the folder of a run."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from io import FileIO
from pathlib import Path

import msgspec
import torch

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.format import (
    CHECKPOINTS_FOLDER,
    FORMAT,
    MANIFEST_FILE,
    NO_DIGEST,
    SIGNATURE_FILE,
    STEP_FOLDER,
    TENSOR_FILES,
    FileFacts,
    Manifest,
)
from dnb.hub.checkpoints.tensor_files import tensors_in
from dnb.transport.layout import dtype_name
from dnb.transport.system.failures import MESSAGE_LENGTH, clean_text

READ_BYTES = 4 << 20
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,40}")
# Of checkpoint.json: a hundred thousand parameters need some 30 MB.
MAX_MANIFEST_BYTES = 1 << 30
MAX_SIGNATURE_BYTES = 1 << 10
# Beyond this no number in a checkpoint means anything: steps, samples, bytes.
LARGEST_NUMBER = 1 << 53
# The year 5138: what is later is no time that a chart could show.
LATEST_SECONDS = 1e11


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
        """Return the bytes of a file: those that have the digest, however the file changes meanwhile.

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
        """Read a file as `load` does, into memory of its size.

        Args:
            target: may hold anything if this fails.
            name: of the file.
            report: told how many bytes there are, now and then.
        """
        with self._open(name) as file:
            self._fill(target, name, file, report=report)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a file, as `load` found it.

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
        """Name the first tensor in which a model differs from this checkpoint, with both shapes; "" if none does."""
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
    """Find the checkpoint at a path, or the newest whole one in a run's folder.

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
    """Return the step of a run's newest checkpoint, by the manifests; None if it has none."""
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
    """List the checkpoints at a path, the newest first."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise ArgumentError(f"no checkpoint at {path}: it {what}")
    if (path / MANIFEST_FILE).exists() or (STEP_FOLDER.fullmatch(path.name) and any(path.iterdir())):
        found = STEP_FOLDER.fullmatch(path.name)
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
    found = [path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_digest(text: bytes, found: re.Match[bytes]) -> bool:
    blank = text[: found.start(1)] + NO_DIGEST + text[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


@dataclass(frozen=True, slots=True)
class _Origin:
    """The version of dnb that wrote a checkpoint, as far as it is stated."""

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
