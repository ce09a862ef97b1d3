"""A hub that is killed is started again, and nothing that counted is lost."""

import os
import signal

import psutil
import pytest
import torch

from dnb.api import pools
from dnb.hub.checkpoints.format import step_folder
from dnb.hub.checkpoints.reader import find_checkpoint
from dnb.hub.history.run_files import read_history, read_summary
from tests.engines.pools import until, wait, wait_until
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]

# More than any machine does before a run is stopped.
MANY_STEPS = 1_000_000


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Three engines and a healthy hub."""
    monkeypatch.chdir(tmp_path)
    pool = shared.of(3)
    pids = {engine.pid for engine in pool.engines}
    yield pool
    until(lambda: are_back(pool, pids), what="all that live are back")
    shared.calm()


def are_back(pool, pids):
    return {pid for pid in pids if psutil.pid_exists(pid)} <= {engine.pid for engine in pool.engines}


def kill_hub(pool):
    """SIGKILL; the next hub answers when this returns."""
    before = pool.facts.hub
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: pool.facts.hub.pid != before.pid, what="another hub answers")


def wait_for_step(run, step):
    wait_until(run, lambda run: run.step >= step, what=f"step {step}")
    assert run.step >= step, run


def fit(pool, **options):
    return pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, **options)


def test_a_run_goes_on_with_the_same_loss_when_the_hub_is_killed(pool):
    run = fit(pool, steps=MANY_STEPS)
    for step in (20, 100, 200):
        wait_for_step(run, step)
        kill_hub(pool)
    wait_for_step(run, run.step + 20)
    run.stop()
    wait(run)
    plain = plain_losses(mlp(), digits(), num_steps=run.step, batch_size=64)
    assert run.status == "stopped"
    assert largest_gap(run.history["loss"], plain) <= 1e-10


@pytest.mark.parametrize("verb", ["finished", "stopped"])
def test_a_hub_that_is_killed_while_it_writes_the_last_checkpoint_leaves_that_to_the_next(pool, verb):
    steps = 3 if verb == "finished" else 100_000
    model = torch.nn.Sequential(torch.nn.Linear(64, 100_000, bias=False), torch.nn.Linear(100_000, 10))
    run = pool.fit(model, digits(64), loss="cross_entropy", lr=1e-4, steps=steps, checkpoint_every=1)
    if verb == "stopped":
        wait_for_step(run, 2)
        run.stop()
    until(lambda: read_summary(run.folder).ending is not None, what="the last checkpoint is being written")
    assert read_summary(run.folder).status == "running"
    kill_hub(pool)
    wait(run)
    assert (run.status, read_summary(run.folder).status, read_summary(run.folder).ending) == (verb, verb, None)
    told = [(event.kind, event.step) for event in run.events if event.kind != "checkpoint" or " is in " in event.text]
    assert told[-3:] == [("recovered", run.step), ("checkpoint", run.step), (verb, run.step)]
    found, _ = find_checkpoint(
        step_folder(run.folder, run.step), wants=lambda _: ["job.pickle", "data.pickle", "data.buffers"]
    )
    assert found.manifest.step == run.step


def test_an_idle_pool_keeps_its_engines_and_trains(pool):
    engines = [(engine.id, engine.pid) for engine in pool.engines]
    kill_hub(pool)
    until(lambda: len(pool.engines) == len(engines), what="all engines are back")
    assert [(engine.id, engine.pid) for engine in pool.engines] == engines
    assert wait(fit(pool, steps=20)).status == "finished"


def test_a_paused_run_stays_paused_and_can_be_resumed(pool):
    run = fit(pool, steps=MANY_STEPS)
    wait_for_step(run, 10)
    run.pause()
    wait_until(run, lambda run: run.status == "paused", what="the pause")
    at = run.step
    kill_hub(pool)
    until(lambda: len(pool.engines) == 3, what="all engines are back")
    assert (run.status, run.step) == ("paused", at)
    run.resume()
    wait_for_step(run, at + 10)
    run.stop()
    wait(run)


def test_a_run_that_has_ended_still_gives_its_weights(pool):
    run = wait(fit(pool, steps=40))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    kill_hub(pool)
    fresh = mlp(seed=9)
    attached = wait(pools.attach(model=fresh))
    assert attached.status == "finished"
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_engine_that_dies_with_the_hub_is_done_without(pool):
    run = fit(pool, steps=MANY_STEPS)
    wait_for_step(run, 20)
    victim = pool.engines[0]
    hub = pool.facts.hub.pid
    os.kill(victim.pid, signal.SIGKILL)
    os.kill(hub, signal.SIGKILL)
    wait_for_step(run, run.step + 50)
    run.stop()
    wait(run)
    plain = plain_losses(mlp(), digits(), num_steps=run.step, batch_size=64)
    assert (run.status, victim.id in [engine.id for engine in pool.engines]) == ("stopped", False)
    assert largest_gap(run.history["loss"], plain) <= 1e-10


def test_another_hub_takes_its_place_when_the_user_kills_it_on_purpose(pool):
    run = fit(pool, steps=MANY_STEPS)
    wait_for_step(run, 10)
    pool.chaos.hub()
    wait_until(run, lambda run: "recovered" in [event.kind for event in run.events], what="another hub")
    run.stop()
    wait(run)
    kinds = [event.kind for event in run.events]
    assert kinds.index("chaos") < kinds.index("recovered")


def test_an_engine_that_was_stopped_on_purpose_goes_on_although_the_hub_has_died(pool):
    victim = pool.engines[1]
    pool.chaos.stop(victim.id, 1.0)
    kill_hub(pool)
    until(lambda: psutil.Process(victim.pid).status() != psutil.STATUS_STOPPED, what="it goes on")
    until(lambda: len(pool.engines) == 3, what="it has joined again")


def test_spares_rest_on_and_are_kept(pool):
    pool.keep_spares(1)
    spare = next(engine.id for engine in pool.engines if engine.state == "spare")
    kill_hub(pool)
    until(lambda: len(pool.engines) == 4, what="all engines are back")
    assert [engine.id for engine in pool.engines if engine.state == "spare"] == [spare]
    pool.keep_spares(0)


def test_no_committed_step_is_lost_or_done_twice(pool):
    run = fit(pool, steps=MANY_STEPS)
    wait_for_step(run, 50)
    at = run.step
    kill_hub(pool)
    wait_for_step(run, at + 50)
    run.stop()
    wait(run)
    steps = [row.step for row in read_history(run.folder) if row.kind == "step"]
    told = next(event for event in run.events if event.kind == "recovered")
    assert steps == list(range(1, run.step + 1))
    assert told.step >= at
    assert "the hub died and was started again: the run goes on after step" in told.text


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_the_engines_accounts_go_on_and_come_to_every_sample_once(pool, transport):
    run = fit(pool, epochs=40, transport=transport)
    wait_for_step(run, 40)
    victim = pool.engines[0]
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(run, lambda run: "died" in [event.kind for event in run.events], what="an engine died")
    kill_hub(pool)
    wait_for_step(run, run.step + 40)
    kill_hub(pool)
    wait(run)
    dead = next(worker for worker in run.workers if worker.engine == victim.id)
    assert sum(worker.samples for worker in run.workers) == 40 * 1797
    assert sum(sum(row.samples.values()) for row in read_history(run.folder)) == 40 * 1797
    assert (dead.pid, dead.state) == (victim.pid, "dead")
    assert dead.samples > 0
    assert all(worker.steps > 40 for worker in run.workers if worker.engine != victim.id)


def test_an_exact_run_comes_to_the_same_bits(pool):
    run = fit(pool, steps=MANY_STEPS, exact=True, shards=4)
    for step in (30, 80):
        wait_for_step(run, step)
        kill_hub(pool)
    wait_for_step(run, run.step + 20)
    run.stop()
    wait(run)
    undisturbed = wait(fit(pool, steps=run.step, exact=True, shards=4))
    expected, found = undisturbed.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert run.history["loss"] == undisturbed.history["loss"]


def test_what_was_set_while_the_run_went_on_stays_set(pool):
    run = fit(pool, steps=MANY_STEPS)
    wait_for_step(run, 10)
    run.set(lr=5e-4, clip_norm=0.5)
    at = run.step
    wait_for_step(run, at + 5)
    kill_hub(pool)
    wait_for_step(run, at + 60)
    run.stop()
    rates = wait(run).history["lr"]
    assert rates[-1] == 5e-4
    assert set(rates[at + 5 :]) == {5e-4}
