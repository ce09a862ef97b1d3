"""Pools that lie on disk: whose they are, whether they live, and how the dead are reaped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dnb.hub.pool_files import read_pool_files, remove_cluster_files
from dnb.pool.engine_pool import all_processes
from dnb.records import PoolFacts
from dnb.transport.lives import end_processes, is_alive, is_this_process
from dnb.transport.segments import named_folders, remove_folders


@dataclass(frozen=True, slots=True)
class Found:
    """What lies on disk, sorted by what can be done with it."""

    ours: list[PoolFacts]  # of this very kernel
    orphans: list[PoolFacts]  # alive, and their kernel is gone
    foreign: list[PoolFacts]  # alive, and steered by another living kernel
    dead: list[PoolFacts]  # the hub is gone, and its guardian


def find_pools(security_dir: Path) -> Found:
    """Look at every pool of a profile, by pid and start time."""
    found = Found([], [], [], [])
    for facts in read_pool_files(security_dir):
        if not is_alive(facts.guardian):
            found.dead.append(facts)
        elif facts.owner is not None and is_this_process(facts.owner):
            found.ours.append(facts)
        elif facts.owner is not None and is_alive(facts.owner):
            found.foreign.append(facts)
        else:
            found.orphans.append(facts)
    return found


def reap(facts: PoolFacts, *, security_dir: Path, log_dir: Path) -> None:
    """Kill what is left of a pool and remove its files; touches only processes whose start time fits."""
    end_processes(all_processes(facts), patience_seconds=0.0)
    remove_folders(named_folders(facts.folders, facts.cluster_id))
    remove_cluster_files(facts.cluster_id, security_dir=security_dir, log_dir=log_dir)


def reap_dead(found: Found, *, security_dir: Path, log_dir: Path) -> int:
    """Reap every pool whose hub is gone; how many there were."""
    for facts in found.dead:
        reap(facts, security_dir=security_dir, log_dir=log_dir)
    return len(found.dead)
