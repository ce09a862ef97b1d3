"""Handover from a hub to the next one, in the pool's folder: in memory, and gone with the pool.

Three records, each replaced in one move: who belongs to the pool, what was submitted, and the accounts of engines that
are gone from it. How far a run has come is not in them: that is in its folder, and in `dnb.hub.parameters.journal`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from dnb.protocol.base import Record
from dnb.protocol.measurements import WorkerTotals
from dnb.protocol.memory import SegmentRef
from dnb.protocol.pool import EngineFacts, Process
from dnb.transport.system.own_files import read_file, replace_file

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Record)

POOL_FILE = "hub.msgpack"
RUN_FILE = "run.msgpack"
STATS_FILE = "accounts.msgpack"
LOST_FILE = "lost.msgpack"  # in the place of RUN_FILE, a `dnb.hub.server.lost_run.LostRun`


class PoolHandover(Record, frozen=True):
    """The members of the pool, and what was asked of them."""

    owner: Process | None
    kernels: dict[str, Process]  # by the names of their sockets, in hexadecimal
    engines: tuple[EngineFacts, ...]
    spares: tuple[int, ...]
    leaving: tuple[int, ...]
    wanted_spares: int
    restart: Literal["never", "always"]
    dead: tuple[int, ...]
    num_killed: int
    stopped: tuple[tuple[Process, float], ...]  # on purpose; until when on the host's monotonic clock
    helpers: tuple[Process, ...]
    num_owed: int = 0
    kernel_versions: dict[str, str] = msgspec.field(default_factory=dict)  # as `kernels`; as errors name them


class RunHandover(Record, frozen=True):
    """The run that the hub holds."""

    frames: tuple[bytes, ...]  # spec, job, data, signature: as the client signed them
    clip_norm: float | None  # as it is by now
    mended: tuple[bytes, bytes] | None  # pickle and signature
    journal: SegmentRef | None


class StatsHandover(Record, frozen=True):
    """The final statistics of engines that are gone from the hub's run."""

    departed: tuple[WorkerTotals, ...]


def write_handover(folders: Sequence[Path], name: str, handover: Record) -> bool:
    """Replace a record in the first folder that takes it; whether one did. A pool without room goes on without."""
    return write_handover_bytes(folders, name, msgspec.msgpack.encode(handover))


def write_handover_bytes(folders: Sequence[Path], name: str, content: bytes) -> bool:
    """Replace what is kept under a name likewise."""
    for folder in folders:
        try:
            replace_file(folder / name, content, make_folder=True)
        except OSError as error:
            _log_once(f"{name} cannot be kept in {folder}: {error.strerror}")
        else:
            return True
    return False


def read_handover(folders: Sequence[Path], name: str, kind: type[T]) -> T | None:
    """Read a record of the hub before, if it left one."""
    content = read_handover_bytes(folders, name)
    if content is None:
        return None
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except Exception as error:  # noqa: BLE001 - decoding raises more than its own errors, and changes nothing
        log.warning("%s is of no use: %s: %s", name, type(error).__name__, error)
        return None


def read_handover_bytes(folders: Sequence[Path], name: str) -> bytes | None:
    """Return the bytes kept under a name, None if there are none."""
    for folder in folders:
        try:
            return read_file(folder / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            _log_once(f"{folder / name} is of no use: {error.strerror}")
    return None


def remove_handover(folders: Sequence[Path], name: str) -> None:
    """Forget a record."""
    for folder in folders:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


@cache
def _log_once(text: str) -> None:
    log.warning(text)
