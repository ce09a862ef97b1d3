"""A run in which parameters were thawed goes on with them when an engine or the hub dies."""

import os
import signal

import pytest
import torch
from torch import nn

from tests.engines.pools import until, wait, wait_until
from tests.engines.test_thawing import (
    FreezesOnce,
    Partly,
    Whole,
    alone,
    marked_digits,
    momentum,
    thaw_at_marks,
    thaw_event,
)
from tests.models import largest_gap, largest_relative_gap

pytestmark = [pytest.mark.engines, pytest.mark.faults]


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Three engines and a healthy hub."""
    monkeypatch.chdir(tmp_path)
    pool = shared.of(3)
    yield pool
    shared.calm()


def kill_hub(pool):
    """SIGKILL; the next hub answers when this returns."""
    before = pool.facts.hub
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: pool.facts.hub.pid != before.pid, what="another hub answers")


def thawed(pool, *, make=None, **options):
    """A run in which everything trains by now, and its model."""
    model = Partly()
    options |= {"lr": 1e-2} if make is None else {"optimizer": make(model)}
    run = pool.fit(model, marked_digits(), step=thaw_at_marks, steps=1_000_000, **options)
    wait_until(run, lambda run: len(thaw_event(run)) == 2 and run.step > 30, what="both layers are thawed")
    return run, model


def end(run, *, after):
    reached = run.step + after
    wait_until(run, lambda run: run.step >= reached, what=f"{after} steps more")
    run.stop()
    wait(run)


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_an_engine_that_is_killed_after_a_thaw_changes_nothing(pool, transport):
    run, model = thawed(pool, transport=transport)
    os.kill(pool.engines[0].pid, signal.SIGKILL)
    end(run, after=40)
    plain, losses = alone(num_steps=run.step)
    assert largest_gap(run.history["loss"], losses) < 1e-8
    assert largest_relative_gap(model, plain) < 1e-6


@pytest.mark.parametrize("make", [None, momentum])
def test_a_hub_that_is_killed_after_a_thaw_changes_nothing(pool, make):
    run, model = thawed(pool, make=make)
    kill_hub(pool)
    end(run, after=40)
    plain, losses = alone(num_steps=run.step, make=make)
    assert "recovered" in [event.kind for event in run.events]
    assert largest_gap(run.history["loss"], losses) < 1e-8
    assert largest_relative_gap(model, plain) < 1e-6


def test_an_exact_run_keeps_its_bits_when_the_hub_dies_after_a_thaw(pool):
    run, killed = thawed(pool, exact=True, shards=4)
    kill_hub(pool)
    end(run, after=40)
    model = Partly()
    wait(pool.fit(model, marked_digits(), step=thaw_at_marks, lr=1e-2, steps=run.step, exact=True, shards=4))
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in killed.state_dict().items())


class ThawsOnce:
    """In the hub, after the fourth update."""

    def __init__(self) -> None:
        self.num_steps = 0

    def __call__(self, model) -> None:
        self.num_steps += 1
        if self.num_steps == 4:
            model.first.requires_grad_(True)
        if self.num_steps == 8:
            model.third.bias.requires_grad_(False)


def plain_step(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_what_after_step_has_thawed_and_frozen_stays_so_when_the_hub_is_killed(pool):
    killed = Partly()
    options = {"step": plain_step, "lr": 1e-2}
    run = pool.fit(killed, marked_digits(), after_step=ThawsOnce(), steps=1_000_000, **options)
    wait_until(run, lambda run: run.step > 20, what="step 20")
    kill_hub(pool)
    end(run, after=40)
    model = Partly()
    wait(pool.fit(model, marked_digits(), after_step=ThawsOnce(), steps=run.step, **options))
    assert largest_relative_gap(killed, model) < 1e-6
    assert not torch.equal(model.first.weight, Partly().first.weight)
    assert not model.third.bias.requires_grad


def test_what_engines_have_frozen_stays_so_when_the_hub_is_killed(pool):
    killed = Whole()
    run = pool.fit(killed, marked_digits(), step=FreezesOnce(), lr=1e-2, steps=1_000_000)
    wait_until(run, lambda run: run.step > 10, what="step 10")
    kill_hub(pool)
    until(lambda: run.step > 15, what="the run goes on")
    run.stop()
    wait(run)
    plain, losses = alone(num_steps=run.step, model=Whole(), step=FreezesOnce())
    assert largest_gap(run.history["loss"], losses) < 1e-8
    assert largest_relative_gap(killed, plain) < 1e-6
