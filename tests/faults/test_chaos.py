"""Harm done on purpose through the pool, and pools of dead kernels that grow."""

import psutil
import pytest

from dnb.api import pools
from dnb.errors import ArgumentError
from tests.engines.pools import PATIENCE_SECONDS, until, wait_until
from tests.faults.kernels import Kernel
from tests.faults.test_deaths import START_AND_TRAIN
from tests.models import digits, mlp

pytestmark = [pytest.mark.engines, pytest.mark.faults]


@pytest.fixture
def run(pool):
    """A run that goes on until the test is over."""
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000)
    wait_until(run, lambda run: run.step > 3, what="step 3")
    return run


def has(run, kind, engine):
    return any((event.kind, event.engine) == (kind, engine) for event in run.events)


def test_a_killed_engine_is_in_the_history_as_an_act_and_as_a_death(pool, run):
    victim = pool.engines[1].id
    before = pool._members().num_killed
    pool.chaos.kill(victim)
    wait_until(run, lambda run: has(run, "died", victim), what="the death")
    kinds = [event.kind for event in run.events if event.engine == victim and event.kind in ("chaos", "died")]
    assert kinds == ["chaos", "died"]
    assert pool._members().num_killed == before + 1


def test_a_stopped_engine_goes_on_when_its_time_is_over(pool, run):
    victim = pool.engines[1]
    pool.chaos.stop(victim.id, 0.5)
    until(lambda: psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED, what="it stands still")
    until(lambda: psutil.Process(victim.pid).status() != psutil.STATUS_STOPPED, what="it goes on")
    at = run.step
    wait_until(run, lambda run: run.step > at + 5, what="five steps more")
    wait_until(run, lambda run: has(run, "chaos", victim.id), what="the act is told")


def test_a_slowed_engine_computes_longer_than_the_others_and_its_account_says_so(pool, run):
    other, victim = pool.engines
    pool.chaos.slow(victim.id, 20)
    wait_until(run, lambda run: has(run, "chaos", victim.id), what="the act is told")
    at = run.step
    before = {worker.engine: worker.compute_seconds for worker in run._follower.snapshot.totals}
    wait_until(run, lambda run: run.step > at + 100, what="a hundred steps more")
    after = {worker.engine: worker for worker in run._follower.snapshot.totals}

    def seconds_per_sample(engine):
        return after[engine].compute_seconds / after[engine].samples

    assert after[victim.id].compute_seconds > before[victim.id]
    assert seconds_per_sample(victim.id) > 2 * seconds_per_sample(other.id)
    pool.chaos.slow(victim.id, 1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda chaos: chaos.kill(977), "no engine 977: there are "),
        (lambda chaos: chaos.kill("1"), "an engine is named by its id, not '1'"),
        (lambda chaos: chaos.stop(0, -1), "seconds must be a positive number, not -1"),
        (lambda chaos: chaos.slow(0, 0.5), "factor must be at least 1, not 0.5"),
    ],
)
def test_acts_that_make_no_sense_are_refused(pool, act, message):
    with pytest.raises(ArgumentError, match=message):
        act(pool.chaos)


def test_a_pool_that_a_dead_kernel_left_lets_stopped_engines_go_on_and_can_grow_and_shrink(folder):
    kernel = Kernel(
        START_AND_TRAIN
        + """
victim = pool.engines[0]
pool.chaos.stop(victim.id, 3)
say(victim.pid)
""",
        folder=folder,
    )
    pid = int(kernel.wait_until_ready()[0])
    kernel.kill()
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    until(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED, what="it goes on")
    run = pools.attach()
    pool = pools.current_pool()
    (newcomer,) = pool.add(1)
    wait_until(run, lambda run: any(w.engine == newcomer and w.samples for w in run.workers), what="it takes part")
    pool.remove(newcomer)
    assert has(run, "left", newcomer) or run.is_active
    assert newcomer not in [engine.id for engine in pool.engines]


def test_engines_that_are_being_started_when_the_kernel_dies_end_with_the_pool(folder, leftovers):
    kernel = Kernel(
        """
        import threading, time
        pool = pools.start(n=1)
        threading.Thread(target=pool.add, daemon=True).start()
        while len(pool.client.ids) < 2:
            time.sleep(0.01)
        """,
        folder=folder,
    )
    kernel.wait_until_ready()
    kernel.kill()
    leftovers.wait_until_none(timeout_seconds=PATIENCE_SECONDS)
