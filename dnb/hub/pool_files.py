"""What a pool leaves on disk while it lives: one record beside ipyparallel's connection files."""

from __future__ import annotations

import glob
import logging
from pathlib import Path

import msgspec

from dnb.records import HubConfig, PoolFacts
from dnb.transport.own_files import read_file, replace_file

log = logging.getLogger(__name__)

PREFIX = "dnb-pool-"


def write_pool_file(security_dir: Path, facts: PoolFacts) -> None:
    """Replace the pool's record in one move, readable by its user only.

    Raises:
        OSError: the disk does not take it; the record before stays.
    """
    # The folder is IPython's: in a container it may be a volume of another user.
    replace_file(security_dir / f"{PREFIX}{facts.cluster_id}.json", msgspec.json.encode(facts), in_any_folder=True)


def read_pool_files(security_dir: Path) -> list[PoolFacts]:
    """The records of all pools of a profile, live or not; what is not a record is skipped and logged."""
    found: list[PoolFacts] = []
    for path in sorted(security_dir.glob(f"{PREFIX}*.json")):
        try:
            found.append(msgspec.json.decode(read_file(path, in_any_folder=True), type=PoolFacts))
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s is not a pool's record: %s", path, error)
    return found


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
