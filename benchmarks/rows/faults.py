"""What faults cost a run: engines that are killed, stopped, slowed, added, again and again; torchft beside it."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dnb
from benchmarks.commits import (
    STEPS_AFTER,
    STEPS_BEFORE,
    check_ledger,
    commit_times,
    longest_gap,
    stall,
    steps_of,
    usual_step,
    wait_until,
)
from benchmarks.models import CASES, NUM_SAMPLES
from benchmarks.ours import Side, open_side, wait_for_step
from benchmarks.pairs import spread
from benchmarks.rivals.torchft_gang import NOT_INSTALLED, find_python
from benchmarks.rows import faults_rival
from benchmarks.settings import Settings
from benchmarks.table import Row

CASE = CASES["cnn"]
NUM_FAULTS, NUM_FAULTS_QUICK = 20, 3
MANY_STEPS = 1_000_000
SLOWNESS = 4.0
KILL_SECONDS, STOP_SECONDS, RETURN_SECONDS, HUB_SECONDS = 0.25, 1.0, 0.5, 2.0
JOIN_STEPS = 1.5
SLOW_SHARE = 0.9
# After an engine is slowed: it holds fewer shards within 10 steps.
SETTLE_STEPS, SLOW_STEPS = 15, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Kills:
    """What killing an engine and starting another did, each time; in seconds, and gaps in usual steps."""

    stalls: list[float]
    rejoins: list[float]
    join_gaps: list[float]
    undisturbed_gaps: list[float]  # in windows of about the same length, with nobody joining


def rows(settings: Settings) -> Iterator[Row]:
    """A row per kind of fault; seconds are what the run stood still beyond a usual step."""
    number = NUM_FAULTS_QUICK if settings.is_quick else NUM_FAULTS
    with open_side(3) as side:
        yield from _kill_rows(_killed(side, number), _rival(number))
        yield from _stopped(side, number)
        yield _spare_row(side, number)
    with open_side(3) as side:
        yield _hub_row(side, number)
    with open_side(2) as side:
        yield _slowed(side, 3 if settings.is_quick else settings.pairs)


def _rival(number: int) -> faults_rival.RivalKills | None:
    python = find_python()
    return None if python is None else faults_rival.kill(python, CASE, number=number)


def _kill_rows(ours: Kills, rival: faults_rival.RivalKills | None) -> Iterator[Row]:
    note = NOT_INSTALLED if rival is None else f"torchft's best settings of those tried: {rival.limits}"
    tried = {} if rival is None else {"rival_tried": rival.tried, "rival_failures": rival.failures}
    yield _tail_row(
        "SIGKILL 1 of 3: beyond a median step, p95",
        ours.stalls,
        rival=None if rival is None else rival.stalls,
        reach=KILL_SECONDS,
        note=note,
        details=tried,
    )
    yield Row(
        name="from the request until a new engine contributes, median",
        unit="s",
        ours=spread(ours.rejoins),
        rival=None if rival is None else spread(rival.rejoins),
        note="a process that starts from nothing",
    )
    yield Row(
        name="others' longest gap while one joins, median",
        unit="steps",
        ours=spread(ours.join_gaps),
        rival=None if rival is None else spread(rival.join_gaps),
        figure=statistics.median(ours.join_gaps),
        reach=JOIN_STEPS,
        note=f"in usual steps; with nobody joining, the longest in windows as long was "
        f"{statistics.median(ours.undisturbed_gaps):.2f}",
        details={"each": ours.join_gaps, "undisturbed": ours.undisturbed_gaps},
    )


def _killed(side: Side, number: int) -> Kills:
    """SIGKILL one of three, start another; what the survivors feel of both."""
    run = _start(side)
    kills: list[float] = []
    joins: list[tuple[float, float]] = []
    for index in range(number):
        _settle(run)
        engines = side.pool.engines
        kills.append(time.time())
        os.kill(engines[index % len(engines)].pid, signal.SIGKILL)
        wait_for_step(run, run.step + STEPS_BEFORE // 2)
        began = time.time()
        (joiner,) = side.pool.add(1)
        wait_until(lambda joiner=joiner: steps_of(side.pool, run, joiner) > 0, what=f"engine {joiner} works")
        joins.append((began, time.time()))
    quiet = _undisturbed(run, statistics.median(end - begin for begin, end in joins), number=min(number, 5))
    commits = _end(side, run)
    return Kills(
        stalls=[stall(commits, when) for when in kills],
        rejoins=[end - begin for begin, end in joins],
        join_gaps=[longest_gap(commits, *window) / usual_step(commits, window[0]) for window in joins],
        undisturbed_gaps=[longest_gap(commits, *window) / usual_step(commits, window[0]) for window in quiet],
    )


def _undisturbed(run: dnb.Run, seconds: float, *, number: int) -> list[tuple[float, float]]:
    windows = []
    _settle(run)
    for _ in range(number):
        begin = time.time()
        wait_until(lambda begin=begin: time.time() - begin > seconds, what="a window passes")
        windows.append((begin, time.time()))
    return windows


def _stopped(side: Side, number: int) -> Iterator[Row]:
    """SIGSTOP one of three, let it go on, and see when it works again."""
    run = _start(side)
    stops: list[float] = []
    returns: list[float] = []
    for index in range(number):
        _settle(run)
        engine = side.pool.engines[index % 3]
        stops.append(time.time())
        os.kill(engine.pid, signal.SIGSTOP)
        wait_for_step(run, run.step + STEPS_AFTER)
        before = steps_of(side.pool, run, engine.id)
        began = time.time()
        os.kill(engine.pid, signal.SIGCONT)
        wait_until(
            lambda engine=engine, before=before: steps_of(side.pool, run, engine.id) > before,
            what=f"engine {engine.id} works again",
        )
        returns.append(time.time() - began)
    commits = _end(side, run)
    yield _tail_row(
        "SIGSTOP 1 of 3: beyond a median step, p95", [stall(commits, when) for when in stops], reach=STOP_SECONDS
    )
    yield _tail_row("an engine that goes on contributes, p95", returns, reach=RETURN_SECONDS)


def _spare_row(side: Side, number: int) -> Row:
    """SIGKILL one of three that have a warm spare: until that has brought a step."""
    side.pool.spares = 1
    run = _start(side)
    takeovers: list[float] = []
    for _ in range(number):
        wait_until(lambda: _resting(side, run) is not None, what="a spare is warm")
        _settle(run)
        spare = _resting(side, run)
        assert spare is not None
        victim = next(engine for engine in side.pool.engines if engine.id != spare and engine.state != "spare")
        began = time.time()
        side.pool.chaos.kill(victim.id)
        wait_until(lambda spare=spare: steps_of(side.pool, run, spare) > 0, what=f"spare {spare} works")
        takeovers.append(time.time() - began)
    side.pool.spares = 0
    _end(side, run)
    return _tail_row("a warm spare contributes, from the kill, p95", takeovers, reach=RETURN_SECONDS)


def _resting(side: Side, run: dnb.Run) -> int | None:
    """A spare that has loaded the run."""
    warm = {event.engine for event in run.events if event.kind == "spare"}
    spares = [engine.id for engine in side.pool.engines if engine.state == "spare"]
    return next((engine for engine in spares if engine in warm), None)


def _slowed(side: Side, rounds: int) -> Row:
    """One of two engines takes 4 times as long: throughput against the sum of both speeds."""
    shares: list[float] = []
    run = _start(side)
    for _ in range(rounds):
        healthy = _speed(run)
        slow = side.pool.engines[1].id
        side.pool.chaos.slow(slow, SLOWNESS)
        wait_for_step(run, run.step + SETTLE_STEPS)
        shares.append(_speed(run) / (healthy * (1 + 1 / SLOWNESS) / 2))
        side.pool.chaos.slow(slow, 1.0)
        wait_for_step(run, run.step + SETTLE_STEPS)
    _end(side, run)
    return Row(
        name="1 of 2 engines slowed 4 times: sum of speeds / throughput",
        unit="",
        ours=spread([1 / share for share in shares]),
        figure=1 / statistics.median(shares),
        reach=1 / SLOW_SHARE,
        details={"throughput_shares": shares},
    )


def _hub_row(side: Side, number: int) -> Row:
    """SIGKILL the hub: until the next committed step."""
    stalls: list[float] = []
    run = _start(side)
    for _ in range(number):
        _settle(run)
        step = len(commit_times(run))
        killed = time.time()
        os.kill(side.pool.facts.hub.pid, signal.SIGKILL)
        wait_until(lambda step=step: len(commit_times(run)) > step + STEPS_BEFORE, what="steps after the hub's death")
        stalls.append(stall(commit_times(run), killed))
    _end(side, run)
    return _tail_row("the hub killed: beyond a median step, p95", stalls, reach=HUB_SECONDS)


def _start(side: Side) -> dnb.Run:
    run = side.submit(CASE, steps=MANY_STEPS)
    wait_for_step(run, STEPS_BEFORE)
    return run


def _end(side: Side, run: dnb.Run) -> list[float]:
    """Stop; the times of all commits, none of which may be missing or twice."""
    run.stop()
    run.wait()
    check_ledger(run, batch_size=CASE.batch_per_engine * side.num_engines, num_samples=NUM_SAMPLES)
    return commit_times(run)


def _settle(run: dnb.Run) -> None:
    wait_for_step(run, run.step + STEPS_BEFORE)


def _speed(run: dnb.Run) -> float:
    """Steps per second over the next ones, by the hub's own times."""
    first = run.step
    wait_for_step(run, first + SLOW_STEPS)
    commits = commit_times(run)[first : first + SLOW_STEPS]
    return (len(commits) - 1) / (commits[-1] - commits[0])


def _tail_row(
    name: str,
    seconds: Sequence[float],
    *,
    reach: float,
    rival: Sequence[float] | None = None,
    note: str = "",
    details: dict[str, object] | None = None,
) -> Row:
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    theirs = {} if rival is None else {"rival_p95": statistics.quantiles(rival, n=20, method="inclusive")[-1]}
    told = f"p95 {p95:.3g} s" + "".join(f", the rival's {value:.3g} s" for value in theirs.values())
    return Row(
        name=name,
        unit="s",
        ours=spread(seconds),
        rival=None if rival is None else spread(rival),
        figure=p95,
        reach=reach,
        note=f"{told}; {note}" if note else told,
        details={"p95": p95, "each": list(seconds), **theirs, **(details or {})},
    )
