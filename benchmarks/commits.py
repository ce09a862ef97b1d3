"""What a run's folder says about its steps: when each was committed, gaps between them, and whether one is missing."""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import dnb
from dnb.protocol.client_messages import GetRun, RunState

# Steps before a fault that say what a step takes, and after it that may be late.
STEPS_BEFORE, STEPS_AFTER = 20, 4
LOOK_SECONDS, LIMIT_SECONDS = 0.01, 120.0


class LedgerError(Exception):
    """A step or sample is missing, or counted twice."""


def commit_times(run: dnb.Run) -> list[float]:
    """When each step was committed, in seconds since the epoch."""
    return [time for time, _ in _steps(run)]


def usual_step(commits: Sequence[float], when: float) -> float:
    """What a step took just before."""
    place = bisect_right(commits, when)
    window = commits[max(place - STEPS_BEFORE, 0) : place]
    return statistics.median(later - earlier for earlier, later in pairwise(window))


def stall(commits: Sequence[float], when: float) -> float:
    """The longest gap from just before a fault until some steps after it, less a usual step."""
    place = bisect_right(commits, when)
    around = commits[place - 1 : place + STEPS_AFTER]
    return max(later - earlier for earlier, later in pairwise(around)) - usual_step(commits, when)


def longest_gap(commits: Sequence[float], begin: float, end: float) -> float:
    """Between two commits, of those that touch the time from begin to end."""
    inside = commits[bisect_right(commits, begin) - 1 : bisect_right(commits, end) + 1]
    return max(later - earlier for earlier, later in pairwise(inside))


def num_commits(commits: Sequence[float], begin: float, end: float) -> int:
    """How many fall into the time from begin to end."""
    return bisect_left(commits, end) - bisect_left(commits, begin)


def check_ledger(run: dnb.Run, *, batch_size: int, num_samples: int) -> int:
    """Hold a run that has ended against its epochs; how many steps there were.

    Raises:
        LedgerError: steps are not 1, 2, 3, ..., or the engines together did not bring every sample once.
    """
    steps = [step for _, step in _steps(run)]
    if steps != list(range(1, run.step + 1)):
        raise LedgerError(f"run {run.name!r} came to step {run.step}, its history has {len(steps)}")
    epochs, rest = divmod(run.step, -(-num_samples // batch_size))
    wanted = epochs * num_samples + rest * batch_size
    brought = sum(worker.samples for worker in run.workers)
    if brought != wanted:
        raise LedgerError(f"{wanted} samples make {run.step} steps, the engines brought {brought}")
    return len(steps)


def steps_of(pool: dnb.Pool, run: dnb.Run, engine: int) -> int:
    """Steps to which an engine contributed, as the hub knows it now."""
    state, _ = pool.hub.ask(GetRun(run=run.name, seen={"loss": 1 << 60}, seen_events=1 << 30), RunState)
    return next((worker.steps for worker in state.workers if worker.engine == engine), 0)


def wait_until(holds: Callable[[], bool], *, what: str) -> None:
    """Look again and again.

    Raises:
        TimeoutError: it did not come to hold.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {LIMIT_SECONDS:g} s: {what}")
        time.sleep(LOOK_SECONDS)


def _steps(run: dnb.Run) -> list[tuple[float, int]]:
    lines = Path(run.folder / "history.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(float(row["time"]), int(row["step"])) for row in rows if row["kind"] == "step"]
