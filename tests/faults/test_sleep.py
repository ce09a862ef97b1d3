"""A laptop that sleeps: everything stands still for longer than the limits that watch over it, and goes on."""

import contextlib
import signal
import time

import psutil
import pytest

from dnb.api import pools
from dnb.hub.history.run_files import read_history
from dnb.pool.startup import profile_folder
from tests.engines.pools import wait, wait_until
from tests.faults.kernels import Kernel
from tests.faults.test_deaths import START_AND_TRAIN
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]

# The hub calls an engine silent after 0.5 s; ipyparallel's controller gives it up after 1 s here instead of 30 s, and
# an engine its controller after 3 s instead of 37 s.
ASLEEP_SECONDS = 5.0
ASLEEP = f"""
from dnb.pool import startup as starting
from dnb.pool.engines import all_processes
starting.HEARTBEAT_MISSES = 4
{START_AND_TRAIN.replace("n=1", "n=2")}
say(*[process.pid for process in all_processes(pool.facts)])
"""


def signal_all(processes, number):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def test_a_pool_and_its_kernel_that_slept_go_on_and_nothing_was_lost(folder):
    profile = profile_folder(None)
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipengine_config.py").write_text("c.IPEngine.max_heartbeat_misses = 4\n")
    kernel = Kernel(ASLEEP, folder=folder)
    pids = [int(pid) for pid in kernel.wait_until_ready()[-1].split()]
    processes = [psutil.Process(pid) for pid in [kernel.process.pid, *pids]]
    processes += [child for process in processes for child in process.children() if child not in processes]
    signal_all(processes, signal.SIGSTOP)
    time.sleep(ASLEEP_SECONDS)  # not a wait for anything: the laptop sleeps
    signal_all(processes, signal.SIGCONT)
    run = pools.attach(steer=True)
    pool = pools.current_pool()
    at = run.step
    wait_until(run, lambda run: run.step > at + 1000, what="1000 more steps")  # longer than those limits, too
    working = [worker.engine for worker in run.workers if worker.state != "dead"]
    assert (run.status, len(working), sorted(pool.client.ids)) == ("running", 2, working)
    assert [event for event in run.events if event.kind in ("died", "left", "paused", "failed")] == []
    run.stop()
    wait(run)
    steps = [row.step for row in read_history(run.folder) if row.kind == "step"]
    assert steps == list(range(1, run.step + 1))
    assert largest_gap(run.history["loss"][:50], plain_losses(mlp(), digits(), num_steps=50, batch_size=64)) <= 1e-10
    kernel.end()
