"""Pools that lie on disk: whose they are, whether they live, and how the dead are reaped."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from dnb.hub.pool_files import NOT_READ, StrangeRecord, client_file, read_pool_files, remove_cluster_files
from dnb.pool.engines import all_processes
from dnb.protocol.pool import Address, HubPlace, PoolFacts
from dnb.protocol.versions import name_this_dnb
from dnb.transport.segments import named_folders, remove_folders
from dnb.transport.sockets.admission_calls import find_answering
from dnb.transport.system.processes import end_processes, is_alive, is_here, is_this_process

log = logging.getLogger(__name__)

# How long pools whose processes cannot be looked up are asked whether they are there, all of them together.
LOOK_SECONDS = 2.0
LOOPBACK = ("127.", "localhost", "::1")
# More sentences would not be read.
NUM_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PoolsOnDisk:
    """Pools as they lie on disk, sorted by what can be done with them."""

    ours: list[PoolFacts]  # of this very kernel
    orphans: list[PoolFacts]  # alive, and their kernel is gone
    foreign: list[PoolFacts]  # alive, and steered by another living kernel
    dead: list[PoolFacts]  # the hub is gone, and its supervisor
    # Of another host or container, and do not answer from here: gone, or out of reach. By where their hub listens.
    silent: list[tuple[PoolFacts, str]] = field(default_factory=list)
    strange: list[StrangeRecord] = field(default_factory=list)  # of other versions of dnb

    @property
    def doubtful(self) -> list[str]:
        """A sentence for each pool that can be neither used nor cleared without being asked to."""
        sentences = [_describe_silent(facts, url) for facts, url in self.silent] + [
            _describe_strange(each) for each in self.strange
        ]
        more = len(sentences) - NUM_SHOWN
        return [*sentences[:NUM_SHOWN], *([f"and {more} more such pools"] if more > 0 else [])]


def find_pools(security_dir: Path) -> PoolsOnDisk:
    """Look at every pool of a profile: by pid and start time, or, if it is not of this host, by asking it."""
    found = PoolsOnDisk([], [], [], [])
    elsewhere: list[PoolFacts] = []
    for record in read_pool_files(security_dir):
        if isinstance(record, StrangeRecord):
            found.strange.append(record)
        elif not is_alive(record.supervisor):
            found.dead.append(record)
        elif not is_here(record.supervisor):
            elsewhere.append(record)
        else:
            _sort_living(record, found)
    places = [_read_address(facts.cluster_id, security_dir) for facts in elsewhere]
    for facts, address, is_there in zip(elsewhere, places, _ask(places), strict=True):
        if is_there:
            _sort_living(facts, found)
        else:
            found.silent.append((facts, "" if address is None else address.url))
    return found


def _sort_living(facts: PoolFacts, found: PoolsOnDisk) -> None:
    if facts.owner is not None and is_this_process(facts.owner):
        found.ours.append(facts)
    elif facts.owner is not None and is_alive(facts.owner):
        found.foreign.append(facts)
    else:
        found.orphans.append(facts)


def _ask(places: Iterable[Address | None]) -> list[bool]:
    places = list(places)
    known = [place for place in places if place is not None]
    answers = iter(find_answering(known, limit_seconds=LOOK_SECONDS) if known else [])
    return [place is not None and next(answers) for place in places]


def _read_address(cluster_id: str, security_dir: Path) -> Address | None:
    """Return where the hub of a pool listens for clients; None if no file says so."""

    class Connection(msgspec.Struct):
        dnb: HubPlace

    path = client_file(cluster_id, security_dir)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Connection).dnb.address
    except NOT_READ as error:
        log.info("%s does not say where the hub listens: %s", path, error)
        return None


def _describe_silent(facts: PoolFacts, url: str) -> str:
    supervisor = facts.supervisor
    where = f"host {supervisor.host}"
    if supervisor.host == socket.gethostname():
        where = f"another container or another host that is called {supervisor.host}, too,"
    run = "" if facts.run is None else f"run {facts.run!r}, "
    host = urlsplit(url).hostname or ""
    if not url:
        reason = "no connection file says where it listens"
    elif host.startswith(LOOPBACK):
        reason = f"its hub listens at {url} of that host alone, where nothing of it answers here"
    else:
        reason = f"its hub does not answer at {url}"
    return (
        f"a pool of {where} ({run}started {_moment(supervisor.create_time)}) is gone, or out of reach: {reason}; "
        "attach there if it lives, else %dtrain attach --clear or dnb.attach(clear=True) removes its record"
    )


def _describe_strange(record: StrangeRecord) -> str:
    subject = (
        f"the pool {record.cluster_id} was started by {record.writer}, and this is {name_this_dnb()}, "
        f"which cannot read its record ({record.reason})"
    )
    if _is_gone(record):
        return f"{subject}: its processes are gone, and %dtrain attach --clear removes what is left of it"
    return f"{subject}: use it, or end it with %dtrain shutdown, from a kernel with that version"


def _is_gone(record: StrangeRecord) -> bool:
    """Tell whether nothing lives of a pool for certain."""
    return record.supervisor is not None and not is_alive(record.supervisor)


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def reap(facts: PoolFacts, *, security_dir: Path, log_dir: Path) -> None:
    """Kill what is left of a pool and remove its files; touches only processes whose start time fits."""
    end_processes(all_processes(facts), patience_seconds=0.0)
    remove_folders(named_folders(facts.folders, facts.cluster_id))
    remove_cluster_files(facts.cluster_id, security_dir=security_dir, log_dir=log_dir)


def reap_dead(found: PoolsOnDisk, *, security_dir: Path, log_dir: Path) -> int:
    """Reap every pool whose hub is gone; how many there were."""
    for facts in found.dead:
        reap(facts, security_dir=security_dir, log_dir=log_dir)
    return len(found.dead)


def clear_doubtful(found: PoolsOnDisk, *, security_dir: Path, log_dir: Path) -> int:
    """Forget pools that do not answer, and those of other versions whose processes are gone; how many there were."""
    for facts, _ in found.silent:
        reap(facts, security_dir=security_dir, log_dir=log_dir)
    gone = [record for record in found.strange if _is_gone(record)]
    for record in gone:
        remove_folders(named_folders(record.folders, record.cluster_id))
        remove_cluster_files(record.cluster_id, security_dir=security_dir, log_dir=log_dir)
    num_cleared = len(found.silent) + len(gone)
    found.silent.clear()
    found.strange[:] = [record for record in found.strange if record not in gone]
    return num_cleared
