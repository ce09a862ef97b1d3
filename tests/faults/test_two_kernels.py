"""Several kernels look at one pool: all see, one steers."""

import os

import pytest

from dnb import training
from dnb.errors import ArgumentError
from tests.engines.pools import wait_until
from tests.faults.kernels import Kernel
from tests.models import digits, mlp

pytestmark = [pytest.mark.engines, pytest.mark.faults]

START_AND_TRAIN = """
pool = training.start(n=1)
run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000, name="shared")
"""


@pytest.fixture
def other_kernel(tmp_path, monkeypatch, leftovers):
    """Another kernel, with a pool and a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    kernel = Kernel(START_AND_TRAIN, folder=tmp_path)
    kernel.wait_until_ready()
    yield kernel
    training.attach(steer=True)  # its run would go on without it
    training.shutdown()
    if kernel.process.poll() is None:
        kernel.end()
    leftovers.wait_until_none()


def test_a_second_kernel_sees_the_run_and_is_told_who_steers(other_kernel, caplog):
    run = training.attach()
    wait_until(run, lambda run: run.step > 3, what="3 steps")
    assert f"steered by the kernel with pid {other_kernel.process.pid}" in caplog.text
    assert run.history["loss"]


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.pause(),
        lambda run: run.stop(),
        lambda run: run.set(lr=0.1),
        lambda _run: training.fit(mlp(), digits(), loss="cross_entropy", steps=1),
    ],
    ids=["pause", "stop", "set", "fit"],
)
def test_a_kernel_that_watches_changes_nothing(other_kernel, change):
    run = training.attach()
    with pytest.raises(ArgumentError, match=r"only watches: .*--steer takes over|is active"):
        change(run)
    wait_until(run, lambda run: run.status == "running", what="it goes on")


def test_a_kernel_that_watches_leaves_the_pool_as_it_is_when_it_goes(other_kernel):
    training.attach()
    training.shutdown()
    run = training.attach()
    before = run.step
    wait_until(run, lambda run: run.step > before + 3, what="3 more steps")


def test_a_kernel_may_take_over_and_end_the_pool(other_kernel):
    run = training.attach(steer=True)
    pool = training.current_pool()
    assert pool.facts.owner.pid == os.getpid()
    run.stop()
    run.wait(timeout_seconds=60)
    assert run.status == "stopped"


def test_a_watcher_steers_once_the_other_kernel_is_gone(other_kernel):
    run = training.attach()
    other_kernel.kill()
    run.stop()
    run.wait(timeout_seconds=60)
    assert (run.status, training.current_pool().facts.owner.pid) == ("stopped", os.getpid())
