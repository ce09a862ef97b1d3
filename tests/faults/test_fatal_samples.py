"""Samples that end whichever engine computes them, on purpose; in real pools."""

import ctypes
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional

from dnb.errors import RunError
from tests.engines.pools import until, wait, wait_until
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]

BATCH_SIZE = 32
# In the fourth batch.
FATAL = 100
NUM_STEPS = 6


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Two engines, whose places others have taken when the test is over."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(2)
    shared.calm()


def crash():
    ctypes.string_at(0)


def leave():
    os._exit(3)


def run_out_of_memory():
    os.kill(os.getpid(), signal.SIGKILL)


def abort():
    os.abort()


class Fatal:
    """Ends every process but the notebook's that computes a certain sample."""

    def __init__(self, act, sample=FATAL):
        self.act = act
        self.pixels = digits()[0][sample]
        self.here = os.getpid()

    def look(self, inputs):
        if os.getpid() != self.here and bool((inputs == self.pixels).all(dim=1).any()):
            self.act()


class Step(Fatal):
    def __call__(self, model, batch):
        inputs, targets = batch
        self.look(inputs)
        return functional.cross_entropy(model(inputs), targets)


class Stage(nn.Module):
    def __init__(self, fatal):
        super().__init__()
        self.fatal = fatal

    def forward(self, x):
        self.fatal.look(x)
        return x


def harmless(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(pool, **options):
    options = {"lr": 1e-3, "steps": NUM_STEPS, "batch_size": BATCH_SIZE, "shuffle": False, **options}
    return pool.fit(mlp(), digits(), **options)


def losses():
    model, (X, y) = mlp(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(NUM_STEPS):
        part = slice(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X[part]), y[part])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def filled(pool, number, *, but):
    """Wait until the pool has so many engines, and none of those."""
    until(
        lambda: len(pool.engines) == number and not {engine.id for engine in pool.engines} & set(but),
        what="the pool is filled up again",
    )


@pytest.mark.parametrize(
    ("act", "words", "options"),
    [
        (crash, "died by SIGSEGV", {}),
        (leave, r"died \(exit code 3\)", {"transport": "socket"}),
        (run_out_of_memory, "died by SIGKILL, as by the system when memory runs out", {"exact": True}),
        (abort, "died by SIGABRT", {"transport": "socket", "exact": True}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_sample_that_ends_engines_pauses_the_run_after_the_second_and_others_take_their_place(
    pool, act, words, options
):
    dead = [engine.id for engine in pool.engines]
    run = train(pool, step=Step(act), shards=4, **options)
    with pytest.raises(
        RunError,
        match=rf"paused at step 4: engines {dead[0]}, {dead[1]} {words} while both had shards? .*: "
        rf"samples? [^;]*\b(96 to (10[3-9]|11\d|12\d)|100\b).*; nothing of this step was applied",
    ):
        wait(run)
    assert (run.status, run.step) == ("paused", 3)
    assert [event.engine for event in run.events if event.kind == "died"].sort() == dead.sort()
    filled(pool, 2, but=dead)
    run.resume(step=harmless)
    wait(run)
    assert largest_gap(run.history["loss"], losses()) <= 1e-10
    assert {worker.engine for worker in run.workers if worker.state == "ready"}.isdisjoint(dead)


def test_the_only_engine_that_crashes_leaves_a_run_that_goes_on_with_another(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = shared.of(1)
    (dead,) = pool.engines
    run = train(pool, step=Step(crash))
    with pytest.raises(
        RunError, match=r"paused at step 4: engine \d+ died by SIGSEGV while it had shards? .*: samples 96"
    ):
        wait(run)
    run.resume(step=harmless)  # before or after the next one is there
    wait(run)
    assert largest_gap(run.history["loss"], losses()) <= 1e-10
    assert [engine.cores for engine in pool.engines] == [dead.cores]
    until(lambda: pool._members().num_owed == 0, what="nothing is owed any more")


def test_a_pool_that_replaces_the_dead_does_not_go_on_killing(pool):
    pool.restart = "always"
    run = train(pool, step=Step(crash))
    with pytest.raises(RunError, match="while both had"):
        wait(run)
    dead = [event.engine for event in run.events if event.kind == "died"]
    filled(pool, 2, but=dead)
    assert len(dead) == 2
    run.stop()
    wait_until(run, lambda run: run.status == "stopped", what="it has stopped")
    assert wait(train(pool, step=harmless)).status == "finished"
    assert len(pool.engines) == 2


def test_an_evaluation_that_ends_engines_pauses_the_run(pool):
    dead = [engine.id for engine in pool.engines]
    X, y = digits()
    run = train(pool, step=Step(crash, sample=1500), val=(X[1450:1550], y[1450:1550]))
    with pytest.raises(
        RunError, match=r"paused at the evaluation after step 6: .* died by SIGSEGV .*50.* of the validation data;"
    ):
        wait(run)
    filled(pool, 2, but=dead)
    run.stop()
    wait_until(run, lambda run: run.status == "stopped", what="it has stopped")


def test_a_pipeline_that_loses_a_stage_at_the_same_step_twice_pauses_the_run(pool):
    dead = [engine.id for engine in pool.engines]
    model = nn.Sequential(Stage(Fatal(crash)), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    options = {"steps": NUM_STEPS, "batch_size": BATCH_SIZE, "shuffle": False, "strategy": "pipeline"}
    run = pool.fit(model, digits(), loss="cross_entropy", **options)
    with pytest.raises(
        RunError, match=r"paused at step 4: .* died by SIGSEGV while both had shard 0: samples 96 to 127"
    ):
        wait(run)
    filled(pool, 2, but=dead)
    run.stop()
    wait_until(run, lambda run: run.status == "stopped", what="it has stopped")


def test_engines_that_an_operator_kills_together_pause_nothing(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = shared.of(3)
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=600)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    for engine in pool.engines[:2]:
        os.kill(engine.pid, signal.SIGKILL)
    wait(run)
    assert [event.text.split(",")[0][-15:] for event in run.events if event.kind == "died"] == ["died by SIGKILL"] * 2
    plain = plain_losses(mlp(), digits(), num_steps=50, batch_size=64)
    assert largest_gap(run.history["loss"][:50], plain) <= 1e-10
