"""A pool's files on disk while it lives: one record beside ipyparallel's connection files."""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dnb.protocol.pool import HubConfig, PoolFacts, Process
from dnb.protocol.versions import POOL_FORMAT, RecordHeader, explain_unreadable, name_dnb
from dnb.transport.system.own_files import read_file, replace_file

log = logging.getLogger(__name__)

PREFIX = "dnb-pool-"
# What reading a file that may hold anything raises; bytes that are no text are no MsgspecError.
NOT_READ = (OSError, msgspec.MsgspecError, ValueError, RecursionError)


def write_pool_file(security_dir: Path, facts: PoolFacts) -> None:
    """Replace the pool's record in one move, readable by its user only.

    Raises:
        OSError: the disk does not take it; the record before stays.
    """
    # The folder is IPython's: in a container it may be a volume of another user.
    replace_file(security_dir / f"{PREFIX}{facts.cluster_id}.json", msgspec.json.encode(facts), in_any_folder=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrangeRecord:
    """A pool's record of another dnb: what of it every version can read."""

    cluster_id: str
    writer: str  # "dnb 0.2.0 (format 2)"
    supervisor: Process | None
    reason: str  # why the rest cannot be read
    folders: tuple[str, ...] = ()  # of its shared memory


def read_pool_files(security_dir: Path) -> list[PoolFacts | StrangeRecord]:
    """Return the records of all pools of a profile, live or not; what is no record is skipped and logged."""
    found: list[PoolFacts | StrangeRecord] = []
    for path in sorted(security_dir.glob(f"{PREFIX}*.json")):
        try:
            text = read_file(path, in_any_folder=True)
            record = _read(text) or _read_strange(text)
            if path.name != f"{PREFIX}{record.cluster_id}.json":
                raise ValueError(f"it names pool {record.cluster_id!r}")
            found.append(record)
        except NOT_READ as error:
            log.warning("%s is not a pool's record: %s", path, error or type(error).__name__)
    return found


class _ProcessPlace(msgspec.Struct):
    """A `Process`, of whatever version."""

    host: str
    pid: int
    create_time: float
    boot_id: str = ""
    pid_namespace: str = ""


class _Strange(RecordHeader, frozen=True):
    cluster_id: str
    supervisor: _ProcessPlace | None = msgspec.field(default=None, name="guardian")
    folders: tuple[str, ...] = ()


def _read(text: bytes) -> PoolFacts | None:
    if msgspec.json.decode(text, type=RecordHeader).format != POOL_FORMAT:
        return None
    try:
        return msgspec.json.decode(text, type=PoolFacts)
    except msgspec.ValidationError:
        return None


def _read_strange(text: bytes) -> StrangeRecord:
    try:
        known = msgspec.json.decode(text, type=_Strange)
    except msgspec.ValidationError:  # the supervisor is described otherwise
        known = _Strange(**msgspec.structs.asdict(msgspec.json.decode(text, type=_Named)))
    try:
        msgspec.json.decode(text, type=PoolFacts)
        reason = "it is of another format"
    except msgspec.ValidationError as error:
        reason = explain_unreadable(error)
    place = known.supervisor
    return StrangeRecord(
        cluster_id=known.cluster_id,
        writer=name_dnb(known.version, known.format),
        supervisor=None if place is None else Process(**msgspec.structs.asdict(place)),
        reason=reason,
        folders=known.folders,
    )


class _Named(RecordHeader, frozen=True):
    cluster_id: str


def client_file(cluster_id: str, security_dir: Path) -> Path:
    """Return the path at which ipyparallel writes what a client needs to reach a cluster."""
    return security_dir / f"ipcontroller-{cluster_id}-client.json"


def remove_pool_files(config: HubConfig) -> None:
    """Remove all that ipyparallel and dnb wrote for one cluster."""
    remove_cluster_files(config.cluster_id, security_dir=Path(config.security_dir), log_dir=Path(config.log_dir))


def remove_cluster_files(cluster_id: str, *, security_dir: Path, log_dir: Path) -> None:
    """Remove connection files, cluster file, logs and the pool's record of one cluster."""
    name = glob.escape(cluster_id)
    patterns = [
        security_dir / f"ipcontroller-{name}-*.json",
        security_dir / f"cluster-{name}.json",
        security_dir / f"{PREFIX}{name}.*",
        log_dir / f"ip*-{name}-*.log",
        log_dir / f"engines*{name}.json",
    ]
    for pattern in patterns:
        for path in glob.glob(str(pattern)):
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:  # a disk that cannot be written holds nobody up who ends a pool
                log.warning("%s stays: %s", path, error.strerror)
