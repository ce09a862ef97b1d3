"""torchft under the same kills: its settings are swept, and the best of them is killed as often as we are."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.commits import STEPS_BEFORE, longest_gap, stall, usual_step
from benchmarks.models import Case
from benchmarks.rivals.torchft_gang import Limits, Replicas, open_replicas

# From the lighthouse's defaults to what a step of 0.1 s still allows; a heartbeat comes every 0.1 s.
TRIED = (
    Limits(timeout_seconds=10.0),
    Limits(heartbeat_timeout_milliseconds=1000, join_timeout_milliseconds=1000, timeout_seconds=5.0),
    Limits(
        heartbeat_timeout_milliseconds=500, join_timeout_milliseconds=200, tick_milliseconds=20, timeout_seconds=5.0
    ),
    Limits(
        heartbeat_milliseconds=50,
        heartbeat_timeout_milliseconds=250,
        join_timeout_milliseconds=100,
        tick_milliseconds=10,
        timeout_seconds=1.0,
    ),
)
NUM_TRIALS = 3
NUM_REPLICAS = 3
WATCHER = 0  # lives through all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalKills:
    """What killing a replica and starting it again did, each time."""

    limits: str
    stalls: list[float]
    rejoins: list[float]
    join_gaps: list[float]
    tried: dict[str, list[float]]  # stalls by settings
    failures: dict[str, str]  # settings under which it did not go on


def kill(python: Path, case: Case, *, number: int) -> RivalKills:
    """Sweep, then kill with the best settings."""
    stalls: dict[Limits, list[float]] = {}
    failures: dict[str, str] = {}
    for limits in TRIED:
        try:
            stalls[limits] = _kill(python, case, limits, number=NUM_TRIALS)[0]
        except TimeoutError as error:
            failures[str(limits)] = str(error)
    best = min(stalls, key=lambda limits: statistics.median(stalls[limits]))
    each = _kill(python, case, best, number=number)
    tried = {str(limits): values for limits, values in stalls.items()}
    return RivalKills(
        limits=str(best), stalls=each[0], rejoins=each[1], join_gaps=each[2], tried=tried, failures=failures
    )


def _kill(python: Path, case: Case, limits: Limits, *, number: int) -> tuple[list[float], list[float], list[float]]:
    kills: list[float] = []
    joins: list[tuple[float, float]] = []
    folder = Path.cwd() / f"torchft-{time.time_ns()}"
    with open_replicas(python, case, folder=folder, limits=limits, number=NUM_REPLICAS) as replicas:
        for index in range(number):
            replicas.wait_for(WATCHER, num_commits=STEPS_BEFORE, num_participants=NUM_REPLICAS)
            victim = 1 + index % (NUM_REPLICAS - 1)
            kills.append(time.time())
            replicas.processes[victim].kill()
            replicas.processes[victim].wait()
            replicas.wait_for(WATCHER, num_commits=STEPS_BEFORE // 2)
            joins.append(_rejoin(replicas, victim))
        commits = [commit.time for commit in replicas.commits(WATCHER)]
    return (
        [stall(commits, when) for when in kills],
        [end - begin for begin, end in joins],
        [longest_gap(commits, *window) / usual_step(commits, window[0]) for window in joins],
    )


def _rejoin(replicas: Replicas, victim: int) -> tuple[float, float]:
    began = time.time()
    replicas.start(victim)
    replicas.wait_for(victim, num_commits=1, num_participants=NUM_REPLICAS)
    return began, time.time()
