"""Engines that hang, are slow, or whose user code fails, on purpose; in real pools."""

import os
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dnb.errors import RunError
from tests.engines.pools import wait, wait_until
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Three engines that all go on when the test is over."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(3)
    shared.calm()


@pytest.fixture
def small_pool(shared, tmp_path, monkeypatch):
    """One engine that goes on when the test is over."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(1)
    shared.calm()


def kinds(run, engine):
    return [event.kind for event in run.events if event.engine == engine]


def plain(num_steps):
    return plain_losses(mlp(), digits(), num_steps=num_steps, batch_size=64)


class Pausing:
    """A loss that lets the engines with these pids sleep before they compute."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds

    def __call__(self, output, target):
        time.sleep(self.seconds.get(os.getpid(), 0.0))
        return functional.cross_entropy(output, target)


# Engines that hang


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"transport": "socket"}], ids=str)
def test_a_stopped_engine_costs_no_step_and_takes_part_again_when_it_goes_on(pool, options):
    victim = pool.engines[1]
    loss = Pausing(dict.fromkeys((engine.pid for engine in pool.engines), 0.002))
    run = pool.fit(mlp(), digits(), loss=loss, lr=1e-3, steps=5000, **options)
    wait_until(run, lambda run: run.step >= 10, what="step 10")
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(run, lambda run: "hung" in kinds(run, victim.id), what="the engine is called hung")
    assert [engine.state == "hung" for engine in pool.engines] == [False, True, False]
    at = run.step
    wait_until(run, lambda run: run.step > at + 20, what="20 steps without it")
    os.kill(victim.pid, signal.SIGCONT)
    wait_until(run, lambda run: "recovered" in kinds(run, victim.id), what="the engine is heard again")
    steps = {worker.engine: worker.steps for worker in run.workers}[victim.id]
    wait_until(
        run,
        lambda run: {worker.engine: worker.steps for worker in run.workers}[victim.id] > steps + 5,
        what="it works again",
    )
    run.stop()
    wait(run)
    assert len(run.history["loss"]) == run.step
    assert largest_gap(run.history["loss"], plain(run.step)) <= 1e-10


def test_an_engine_that_is_stopped_when_a_run_is_submitted_does_not_hold_it_up(pool):
    victim = pool.engines[0]
    os.kill(victim.pid, signal.SIGSTOP)
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=60))
    assert run.status == "finished"
    assert largest_gap(run.history["loss"][:50], plain(50)) <= 1e-10


# Engines that are slow


class Samples:
    """The loss of a model, by engines that need their own time for every sample."""

    def __init__(self, seconds: float, slow: int, factor: float) -> None:
        self.seconds = seconds
        self.slow = slow
        self.factor = factor

    def __call__(self, output, target):
        time.sleep(len(target) * self.seconds * (self.factor if os.getpid() == self.slow else 1.0))
        return functional.cross_entropy(output, target)


def test_an_engine_four_times_slower_holds_fewer_samples_after_10_steps(pool):
    slow = pool.engines[0]
    loss = Samples(0.002, slow.pid, 4.0)  # so long that what else the cores do counts little
    run = pool.fit(mlp(), digits(), loss=loss, lr=1e-3, epochs=100)

    def samples(run):
        return {worker.engine: worker.samples for worker in run.workers}

    wait_until(run, lambda run: run.step >= 10, what="step 10")
    before, at = samples(run), run.step
    wait_until(run, lambda run: run.step >= at + 20, what="20 steps more")
    gained = {engine: count - before[engine] for engine, count in samples(run).items()}
    run.stop()
    wait(run)
    fast = [gained[engine.id] for engine in pool.engines if engine.id != slow.id]
    assert gained[slow.id] < 0.5 * statistics.fmean(fast)
    assert largest_gap(run.history["loss"], plain(run.step)) <= 1e-10


class Sticking:
    """In one process sticks in one step until there is a file, as if it had to wait for a disk."""

    def __init__(self, pid: int, at: int, until: Path) -> None:
        self.pid = pid
        self.at = at
        self.until = until
        self.count = 0

    def __call__(self, output, target):
        self.count += torch.is_grad_enabled()
        time.sleep(0.002)
        while os.getpid() == self.pid and self.count == self.at and not self.until.exists():
            time.sleep(0.01)
        return functional.cross_entropy(output, target)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"transport": "socket"}], ids=str)
def test_a_late_lease_is_redone_by_an_idle_engine_and_counts_once(pool, options, tmp_path):
    victim = pool.engines[1]
    disk = tmp_path / "disk-is-there"
    # so early that no engine can be held for a slow one yet, and be left without shards
    run = pool.fit(mlp(), digits(), loss=Sticking(victim.pid, 6, disk), lr=1e-3, steps=300, **options)
    try:
        wait(run)  # although one engine still sticks
    finally:
        disk.touch()
    late = f"shards of engine {victim.id} are late: engine "  # another may be late, too, on a busy machine
    told = [event.text for event in run.events if event.kind == "reassigned" and late in event.text]
    assert len(told) == 1, [event.text for event in run.events]
    assert told[0].endswith(" computes them too")
    assert largest_gap(run.history["loss"], plain(300)) <= 1e-10


# User code that fails


class Failing:
    """Raises in these processes, in a certain call."""

    def __init__(self, pids: list[int], at: int) -> None:
        self.pids = pids
        self.at = at
        self.count = 0

    def __call__(self, output, target):
        self.count += torch.is_grad_enabled()
        if os.getpid() in self.pids and self.count == self.at:
            raise ValueError("bad sample")
        return functional.cross_entropy(output, target)


def test_a_failing_loss_pauses_with_one_cause_and_the_same_step_is_tried_again(pool):
    victims = [pool.engines[0], pool.engines[2]]
    run = pool.fit(mlp(), digits(), loss=Failing([engine.pid for engine in victims], 8), lr=1e-3, steps=60)
    places = "; ".join(rf"engine {engine.id}: one of shards \d+ to \d+" for engine in victims)
    with pytest.raises(RunError, match=rf"(?s)paused at step 8: ValueError: bad sample \({places}\); .*Traceback"):
        wait(run)
    assert (run.status, run.step) == ("paused", 7)
    run.resume()
    assert wait(run).status == "finished"
    assert largest_gap(run.history["loss"][:50], plain(50)) <= 1e-10


def test_the_pool_trains_after_a_run_that_failed_in_mid_step_was_stopped(pool):
    run = pool.fit(mlp(), digits(), loss=Failing([pool.engines[1].pid], 3), lr=1e-3, steps=60)
    with pytest.raises(
        RunError, match=rf"paused at step 3: ValueError: bad sample \(engine {pool.engines[1].id}: one of shards"
    ):
        wait(run)
    run.stop()
    wait_until(run, lambda run: run.status == "stopped", what="the run has stopped")
    again = wait(pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=20))
    assert largest_gap(again.history["loss"], plain(20)) <= 1e-10


# Last, as they leave the shared pool with fewer engines


def test_a_stopped_engine_that_is_killed_is_not_missed(pool):
    victim = pool.engines[1]
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=1000)
    wait_until(run, lambda run: run.step >= 3, what="step 3")
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(run, lambda run: "hung" in kinds(run, victim.id), what="the engine is called hung")
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(run, lambda run: "died" in kinds(run, victim.id), what="the engine is called dead")
    at = run.step
    wait_until(run, lambda run: run.step > at + 20, what="20 steps more")
    assert len(pool.engines) == 2


def test_the_only_engine_is_waited_for_while_it_is_stopped(small_pool):
    (victim,) = small_pool.engines
    run = small_pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=1000)
    wait_until(run, lambda run: run.step >= 10, what="step 10")
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(run, lambda run: "hung" in kinds(run, victim.id), what="the engine is called hung")
    at = run.step
    assert run.status == "running"
    os.kill(victim.pid, signal.SIGCONT)
    wait_until(run, lambda run: run.step > at + 20, what="20 steps more")
    run.stop()
    wait(run)
    num_steps = min(run.step, 200)
    assert largest_gap(run.history["loss"][:num_steps], plain(num_steps)) <= 1e-10


def test_a_run_whose_only_engine_is_stopped_can_be_stopped(small_pool):
    (victim,) = small_pool.engines
    run = small_pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=1000)
    wait_until(run, lambda run: run.step >= 3, what="step 3")
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(run, lambda run: "hung" in kinds(run, victim.id), what="the engine is called hung")
    run.stop()
    assert wait(run).status == "stopped"
