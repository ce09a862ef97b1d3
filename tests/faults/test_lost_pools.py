"""Everything dies, or the disk is full: what was durable is there, and the run goes on from it."""

import contextlib
import os
import signal
import time

import psutil
import pytest

from dnb.api.resuming import resume
from dnb.errors import RunError
from dnb.hub.checkpoints.reader import find_checkpoint
from dnb.pool.discovery import find_pools, reap_dead
from dnb.pool.startup import profile_folder
from tests import disks
from tests.engines.pools import open_small_pool, wait, wait_until
from tests.faults.kernels import Kernel
from tests.models import digits, largest_gap, mlp, plain_run

pytestmark = [pytest.mark.engines, pytest.mark.faults]

TRAIN = """
pool = pools.start(n=1)
run = pool.fit(
    mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=100_000, name="lost", checkpoint_every=5, checkpoint_keep=3
)
import threading
moved = threading.Event()
run.add_listener(lambda run: moved.set() if len([e for e in run.events if e.kind == "checkpoint"]) > 3 else None)
assert moved.wait(120)
from dnb.pool.engines import all_processes
say(*[process.pid for process in all_processes(pool.facts)])
"""


@pytest.fixture
def folder(folder):
    """The folder, from which dead pools are cleared afterwards."""
    yield folder
    profile = profile_folder(None)
    reap_dead(find_pools(profile / "security"), security_dir=profile / "security", log_dir=profile / "log")


def kill_all(pids):
    """At once: nobody may clear up after another."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    psutil.wait_procs(processes, timeout=30)


def test_when_everything_is_killed_a_new_pool_goes_on_with_the_same_losses(folder):
    kernel = Kernel(TRAIN, folder=folder)
    pids = [int(pid) for pid in kernel.wait_until_ready()[-1].split()]
    kill_all([*pids, kernel.process.pid])
    kernel.kill()
    found, _ = find_checkpoint(folder / ".dnb" / "runs" / "lost", wants=lambda _: ["job.pickle", "data.pickle"])
    num_steps = found.manifest.step + 20
    run = wait(resume("lost", steps=num_steps))
    losses = plain_run(mlp(), digits(), num_steps=min(num_steps, 200)).losses
    assert (run.first_step, run.step) == (found.manifest.step, num_steps)
    assert largest_gap(run.history["loss"][: len(losses)], losses) < 1e-10
    hidden = [path.name for path in (folder / ".dnb" / "runs" / "lost" / "checkpoints").glob(".*")]
    assert hidden == []


@pytest.fixture
def small_disk(tmp_path):
    """A real tmpfs of 2 MB."""
    with disks.small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


def checkpoints_of(run):
    return [event for event in run.events if event.kind == "checkpoint" and "is in" in event.text]


@pytest.mark.usefixtures("float32")  # of which the figures are
def test_a_full_disk_pauses_nothing_loses_nothing_and_is_told_once(shared, small_disk, monkeypatch, tmp_path):
    monkeypatch.chdir(small_disk)
    pool = shared.of(1)
    run = pool.fit(mlp(), digits(200), loss="cross_entropy", epochs=100_000, checkpoint_every=20, checkpoint_keep=1)
    monkeypatch.chdir(tmp_path)
    wait_until(run, lambda run: checkpoints_of(run), what="one is durable")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1 << 20))
    wait_until(run, lambda run: any(event.kind == "disk" for event in run.events), what="the disk is full")
    told = [event.text for event in run.events if event.kind == "disk"]
    step = run.step
    wait_until(run, lambda run: run.step > step + 100, what="100 more steps")
    kept, damages = find_checkpoint(run.folder, wants=lambda _: ["job.pickle", "job.buffers", "data.buffers"])
    assert (run.status, damages) == ("running", [])
    assert kept.manifest.step <= step
    assert "(No space left on device): 0.4 MB needed, 0." in told[0]
    assert [event.text for event in run.events if event.kind == "disk"] == told
    filler.unlink()
    wait_until(run, lambda run: checkpoints_of(run)[-1].step > step, what="one more is durable")
    run.stop()
    wait(run)


def test_a_hub_that_is_killed_while_it_writes_leaves_the_checkpoint_before(folder):
    """Killed at many moments: whatever lies there, the newest that bears its name is whole."""
    kernel = Kernel(TRAIN.replace("checkpoint_every=5", "checkpoint_every=1"), folder=folder)
    pids = [int(pid) for pid in kernel.wait_until_ready()[-1].split()]
    time.sleep(0.05)  # not a wait for anything: any moment is as good as another
    kill_all([*pids, kernel.process.pid])
    kernel.kill()
    run = folder / ".dnb" / "runs" / "lost"
    found, damages = find_checkpoint(run, wants=lambda _: ["job.pickle", "job.buffers", "data.pickle", "data.buffers"])
    newest = max((run / "checkpoints").glob("step-*"))
    assert (found.folder, damages) == (newest, [])


@pytest.mark.parametrize("who", ["supervisor", "controller"])
@pytest.mark.parametrize("every", [5, None], ids=["with checkpoints", "without"])
def test_a_run_whose_pool_is_gone_names_its_last_checkpoint_and_the_line_that_resumes_it(folder, who, every):
    with open_small_pool(1) as pool:
        run = pool.fit(
            mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=100_000, name="lost", checkpoint_every=every
        )
        wait_until(run, lambda run: run.step > 30 and (every is None or checkpoints_of(run)), what="it is durable")
        os.kill(getattr(pool.facts, who).pid, signal.SIGKILL)
        with pytest.raises(RunError, match="the hub was lost at step") as caught:
            wait(run)
    if every is None:
        assert "it has no checkpoint to resume from: fit(..., checkpoint_every=N)" in str(caught.value)
        return
    found, _ = find_checkpoint(run.folder, wants=lambda _: ())
    assert (
        f"its last checkpoint is of step {found.manifest.step}: dnb.resume('.dnb/runs/lost'), or %dtrain resume lost, "
        "goes on from there in a new pool"
    ) in str(caught.value)
    resumed = wait(resume(".dnb/runs/lost", steps=found.manifest.step + 2))
    assert resumed.step == found.manifest.step + 2
