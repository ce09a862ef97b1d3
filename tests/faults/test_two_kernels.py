"""Several kernels look at one pool: all see, one steers."""

import contextlib
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dnb.api import pools, training
from dnb.errors import ArgumentError, PoolError
from dnb.notebook.commands.magics import DtrainMagics
from dnb.pool.discovery import find_pools
from dnb.pool.startup import profile_folder
from tests.engines.pools import wait, wait_until
from tests.faults.kernels import Kernel
from tests.leftovers import Leftovers
from tests.models import digits, mlp

pytestmark = [pytest.mark.engines, pytest.mark.faults]

START_AND_TRAIN = """
pool = pools.start(n=1)
run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000, name="shared")
"""


class Others:
    """Another kernel with a pool and a run; started anew when a test has ended the one before, or its pool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kernel: Kernel | None = None

    def kernel(self) -> Kernel:
        if self._kernel is None or not self._steers(self._kernel):
            self.end()
            self._kernel = Kernel(START_AND_TRAIN, folder=self.folder)
            self._kernel.wait_until_ready()
        return self._kernel

    def end(self) -> None:
        if self._kernel is None:
            return
        with contextlib.suppress(PoolError):  # it was ended
            pools.attach(steer=True)  # its run would go on without it
        pools.shutdown()
        if self._kernel.process.poll() is None:
            self._kernel.end()
        self._kernel = None

    def _steers(self, kernel: Kernel) -> bool:
        owners = [facts.owner.pid for facts in find_pools(profile_folder(None) / "security").foreign]
        return owners == [kernel.process.pid]


@pytest.fixture(scope="module")
def others(nothing_is_left, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    leftovers, others = Leftovers(), Others(folder)
    yield others
    with pytest.MonkeyPatch.context() as patch:
        set_apart(patch, folder)
        others.end()
    leftovers.wait_until_none()


@pytest.fixture
def other_kernel(others, monkeypatch):
    """Another kernel, with a pool and a run; this one has no pool yet."""
    set_apart(monkeypatch, others.folder)
    yield others.kernel()
    pools.shutdown()  # ends the other's pool only if the test has taken it over


def set_apart(patch, folder):
    patch.chdir(folder)
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    patch.setattr(pools, "_pool", None)  # the tests' shared one is back afterwards


def test_a_second_kernel_sees_the_run_and_is_told_who_steers(other_kernel, caplog):
    run = pools.attach()
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
    run = pools.attach()
    with pytest.raises(ArgumentError, match=r"only watches: .*--steer takes over|is active"):
        change(run)
    wait_until(run, lambda run: run.status == "running", what="it goes on")


def test_a_kernel_that_watches_leaves_the_pool_as_it_is_when_it_goes(other_kernel):
    pools.attach()
    pools.shutdown()
    run = pools.attach()
    before = run.step
    wait_until(run, lambda run: run.step > before + 3, what="3 more steps")


@pytest.mark.parametrize("line", ["wait", "dashboard", "stop", "add 1"])
def test_a_kernel_without_a_pool_is_told_of_the_one_that_goes_on(other_kernel, line):
    said = "this kernel has no pool, but a pool of 1 engine of another kernel holds run 'shared' "
    with pytest.raises(PoolError, match=rf"{said}\(\w+\): %dtrain attach"):
        DtrainMagics(SimpleNamespace(user_ns={})).dtrain(line)


def test_a_pool_whose_kernel_was_restarted_is_told_by_status(other_kernel, capsys):
    other_kernel.kill()
    DtrainMagics(SimpleNamespace(user_ns={})).dtrain("status")
    told = capsys.readouterr().out
    assert re.match(r"this kernel has no pool, but a pool of 1 engine holds run 'shared' \(\w+\): %dtrain attach", told)


def test_who_attaches_without_a_model_is_told_how_to_get_the_weights(other_kernel, capsys):
    DtrainMagics(SimpleNamespace(user_ns={})).dtrain("attach --display none")
    assert (
        "run.model is the model with the weights of now, run.state_dict() these alone; --model model"
        in capsys.readouterr().out
    )


def test_another_kernel_s_pool_is_told_and_left_alone(other_kernel):
    _, notices = pools.open_pool(pools.PoolRequest(n=1, threads_per_engine=1, timeout_seconds=60, linger_seconds=60))
    assert notices == ["another kernel runs 1 engines on this host, which share its cores"]
    pools.shutdown()
    assert len(find_pools(profile_folder(None) / "security").foreign) == 1


def test_a_kernel_may_take_over_and_end_the_pool(other_kernel):
    run = pools.attach(steer=True)
    pool = pools.current_pool()
    assert pool.facts.owner.pid == os.getpid()
    run.stop()
    wait(run)
    assert run.status == "stopped"


def test_a_watcher_steers_once_the_other_kernel_is_gone(other_kernel):
    run = pools.attach()
    other_kernel.kill()
    run.stop()
    wait(run)
    assert (run.status, pools.current_pool().facts.owner.pid) == ("stopped", os.getpid())
