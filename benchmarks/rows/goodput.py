"""What a run under steady fire still commits, whether it is the same run, and what being ready for it costs."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import dnb
from benchmarks.commits import check_ledger, commit_times, num_commits, wait_until
from benchmarks.models import CASES, NUM_SAMPLES
from benchmarks.ours import Side, open_side, wait_for_step
from benchmarks.pairs import spread
from benchmarks.settings import Settings
from benchmarks.table import Row

CASE, SMALL = CASES["cnn"], CASES["tiny"]
NUM_ENGINES = 4
FIRE_SECONDS, FIRE_SECONDS_QUICK, KILL_EVERY_SECONDS = 300.0, 30.0, 5.0
GOODPUT = 0.9
MANY_STEPS = 1_000_000
RATE_STEPS = 60
NUM_ROUNDS, NUM_ROUNDS_QUICK = 20, 3
ROUND_SECONDS = 0.5
BITS_STEPS = 200
LEAST_ALIVE = 2  # the last engine is not killed: without engines there is no run


@dataclass(frozen=True, slots=True, kw_only=True)
class Fire:
    """A time under fire."""

    begin: float
    end: float
    num_killed: int
    num_spared: int  # kills that fell due when only one engine was at work
    alive: list[tuple[float, int]]  # from when on so many engines were at work


def rows(settings: Settings) -> Iterator[Row]:
    """Goodput, then the ledger of a run that was treated worse."""
    seconds = FIRE_SECONDS_QUICK if settings.is_quick else FIRE_SECONDS
    with open_side(NUM_ENGINES) as side:
        rates = _rates(side)
        yield _rate_row(rates)
        yield _goodput_row(side, rates, seconds=seconds)
    with open_side(3) as side:
        yield _ledger_row(side, NUM_ROUNDS_QUICK if settings.is_quick else NUM_ROUNDS)


def _rates(side: Side) -> dict[int, float]:
    """Steps per second of the same global batch, without a fault, by the number of engines at work."""
    rates: dict[int, float] = {}
    run = _start(side)
    for number in range(NUM_ENGINES, 0, -1):
        wait_for_step(run, run.step + RATE_STEPS // 4)
        first = run.step
        wait_for_step(run, first + RATE_STEPS)
        commits = commit_times(run)[first : first + RATE_STEPS]
        rates[number] = (len(commits) - 1) / (commits[-1] - commits[0])
        if number > 1:
            side.pool.remove(side.pool.engines[-1].id)
    _end(side, run)
    side.pool.add(NUM_ENGINES - 1)
    return rates


def _rate_row(rates: dict[int, float]) -> Row:
    text = ", ".join(f"{number}: {rate:.2f}" for number, rate in sorted(rates.items()))
    return Row(
        name=f"steps per second without a fault, {NUM_ENGINES} engines",
        unit="1/s",
        ours=spread([rates[NUM_ENGINES]]),
        note=f"of the same global batch, by engines: {text}",
        details={"rates": {str(number): rate for number, rate in rates.items()}},
    )


def _goodput_row(side: Side, rates: dict[int, float], *, seconds: float) -> Row:
    run = _start(side)
    side.pool.restart = "always"
    fire = _fire_at(side, run, seconds=seconds)
    side.pool.restart = "never"
    commits = _end(side, run)
    committed = num_commits(commits, fire.begin, fire.end)
    possible = _integral(fire, rates)
    goodput = committed / possible
    mean_alive = _integral(fire, {number: float(number) for number in range(NUM_ENGINES + 2)}) / seconds
    of_all = committed / (rates[NUM_ENGINES] * seconds)
    return Row(
        name=f"goodput, {seconds:.0f} s, {NUM_ENGINES} engines, a SIGKILL every {KILL_EVERY_SECONDS:.0f} s: 1 / share",
        unit="",
        ours=spread([1 / goodput]),
        figure=1 / goodput,
        reach=1 / GOODPUT,
        note=f"{goodput:.1%} of the fault-free rate of the engines at work, {of_all:.1%} of that of {NUM_ENGINES}; "
        f"{fire.num_killed} killed and replaced, {mean_alive:.1f} at work in the mean, {fire.num_spared} kills left "
        "out as one engine was at work",
        details={"goodput": goodput, "of_all": of_all, "committed": committed, "alive": fire.alive},
    )


def _fire_at(side: Side, run: dnb.Run, *, seconds: float) -> Fire:
    """Kill the engine that has been at work for longest, again and again."""
    begin = time.time()
    killed: dict[int, float] = {}
    num_spared = 0
    for index in range(1, int(seconds / KILL_EVERY_SECONDS) + 1):
        wait_until(lambda due=begin + index * KILL_EVERY_SECONDS: time.time() >= due, what="the next kill is due")
        at_work = [engine for engine in _loaded(run) if engine not in killed]
        if len(at_work) < LEAST_ALIVE:
            num_spared += 1
            continue
        killed[at_work[0]] = time.time()
        side.pool.chaos.kill(at_work[0])
    end = time.time()
    return Fire(
        begin=begin, end=end, num_killed=len(killed), num_spared=num_spared, alive=_alive(run, killed, begin=begin)
    )


def _loaded(run: dnb.Run) -> dict[int, float]:
    """Engines that have taken part, and since when; those of the start since ever."""
    joined = {worker.engine: 0.0 for worker in run.workers}
    for path in [Path(run.folder / "events.jsonl")]:
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["kind"] == "joined" and event["engine"] is not None:
                joined[event["engine"]] = event["time"]
    loaded = {event.engine for event in run.events if event.kind == "joined"}
    return {engine: when for engine, when in sorted(joined.items()) if engine in loaded}


def _alive(run: dnb.Run, killed: dict[int, float], *, begin: float) -> list[tuple[float, int]]:
    changes = [(max(when, begin), 1) for when in _loaded(run).values()] + [(when, -1) for when in killed.values()]
    changes.sort()
    counts = itertools.accumulate(change for _, change in changes)
    return [(when, count) for (when, _), count in zip(changes, counts, strict=True)]


def _integral(fire: Fire, rates: dict[int, float]) -> float:
    """What the engines at work would have done without a fault; more than were measured count as the most."""
    most = max(rates)
    ends = [*[when for when, _ in fire.alive[1:]], fire.end]
    return sum(
        max(min(end, fire.end) - max(when, fire.begin), 0.0) * rates.get(count, rates[most] if count > most else 0.0)
        for (when, count), end in zip(fire.alive, ends, strict=True)
    )


def _ledger_row(side: Side, rounds: int) -> Row:
    """An exact run whose engines are killed, stopped, slowed and added; then the same run left in peace."""
    run = side.submit(SMALL, steps=MANY_STEPS, exact=True)
    wait_for_step(run, BITS_STEPS)
    side.pool.restart = "always"
    for index in range(rounds):
        _inject_fault(side, run, index)
    side.pool.restart = "never"
    steps = _finish(side, run, SMALL.batch_per_engine)
    losses, weights = run.history["loss"], _weights(run)
    peaceful = side.submit(SMALL, steps=steps, exact=True)
    peaceful.wait()
    differing = sum(one != other for one, other in zip(losses, peaceful.history["loss"], strict=True))
    differing += sum(not torch.equal(one, other) for one, other in zip(weights, _weights(peaceful), strict=True))
    return Row(
        name=f"ledger of {steps} exact steps, {rounds} kills, stops and slow engines",
        unit="differ",
        ours=spread([float(differing)]),
        figure=float(differing),
        reach=0.0,
        note="losses and final parameters that are not bit-equal to the undisturbed run's; steps are 1 to n and the "
        "engines brought every sample once, as in all runs of these groups",
    )


def _inject_fault(side: Side, run: dnb.Run, index: int) -> None:
    engines = [engine.id for engine in side.pool.engines]
    begin = time.time()
    victim = engines[index % len(engines)]
    if index % 3 == 0 and len(engines) >= LEAST_ALIVE:
        side.pool.chaos.kill(victim)
    elif index % 3 == 1:
        side.pool.chaos.stop(victim, ROUND_SECONDS)
    else:
        side.pool.chaos.slow(victim, 4.0)
    wait_until(lambda: time.time() - begin > ROUND_SECONDS, what="half a second passes")
    wait_for_step(run, run.step + BITS_STEPS)


def _weights(run: dnb.Run) -> list[torch.Tensor]:
    return [value.clone() for value in run.model.state_dict().values()]


def _start(side: Side) -> dnb.Run:
    run = side.submit(CASE, steps=MANY_STEPS)
    wait_for_step(run, RATE_STEPS // 2)
    return run


def _end(side: Side, run: dnb.Run) -> list[float]:
    _finish(side, run, CASE.batch_per_engine)
    return commit_times(run)


def _finish(side: Side, run: dnb.Run, batch_per_engine: int) -> int:
    run.stop()
    run.wait()
    return check_ledger(run, batch_size=batch_per_engine * side.num_engines, num_samples=NUM_SAMPLES)
