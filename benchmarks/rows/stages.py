"""What the death of a stage costs a pipeline: one of three engines killed, another added, again and again."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator

from benchmarks.commits import STEPS_BEFORE, check_ledger, commit_times, stall, steps_of, wait_until
from benchmarks.models import CASES, NUM_SAMPLES
from benchmarks.ours import Side, open_side, wait_for_step
from benchmarks.pairs import spread
from benchmarks.settings import Settings
from benchmarks.table import Row

CASE = CASES["cnn"]
NUM_FAULTS, NUM_FAULTS_QUICK = 20, 3
MANY_STEPS = 1_000_000
REACH_SECONDS = 3.0


def rows(settings: Settings) -> Iterator[Row]:
    """What the two that are left take until the next committed step, and the one that comes until its first."""
    with open_side(3) as side:
        yield from _killed(side, NUM_FAULTS_QUICK if settings.is_quick else NUM_FAULTS)


def _killed(side: Side, number: int) -> Iterator[Row]:
    batch_size = CASE.batch_per_engine
    run = side.submit(CASE, steps=MANY_STEPS, batch_size=batch_size, strategy="pipeline")
    wait_for_step(run, STEPS_BEFORE)
    kills: list[float] = []
    rejoins: list[float] = []
    for index in range(number):
        wait_for_step(run, run.step + STEPS_BEFORE)
        kills.append(time.time())
        os.kill(side.pool.engines[index % 3].pid, signal.SIGKILL)
        wait_for_step(run, run.step + STEPS_BEFORE)
        began = time.time()
        (joiner,) = side.pool.add(1)
        wait_until(lambda joiner=joiner: steps_of(side.pool, run, joiner) > 0, what=f"engine {joiner} works")
        rejoins.append(time.time() - began)
    run.stop()
    run.wait()
    num_steps = check_ledger(run, batch_size=batch_size, num_samples=NUM_SAMPLES)
    commits = commit_times(run)
    stalls = [stall(commits, when) for when in kills]
    yield Row(
        name="SIGKILL 1 of 3 stages: beyond a median step, the longest",
        unit="s",
        ours=spread(stalls),
        figure=max(stalls),
        reach=REACH_SECONDS,
        note=f"{number} kills; each of {num_steps} steps is in the history once",
        details={"each": stalls},
    )
    yield Row(
        name="from the request until a new engine is a stage, median",
        unit="s",
        ours=spread(rejoins),
        note=f"median {statistics.median(rejoins):.2g} s: a process that starts from nothing",
        details={"each": rejoins},
    )
