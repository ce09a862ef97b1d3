"""Engines, hubs, controllers and kernels that die, on purpose."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import msgspec
import psutil
import pytest

from dnb.api import pools
from dnb.api.runs.run import Run
from dnb.errors import DnbError, HubError, PoolError, RunError, SpaceError
from dnb.pool.discovery import find_pools
from dnb.pool.startup import profile_folder
from dnb.protocol.client_messages import Done, GetPool, PoolState, Shutdown
from dnb.protocol.pool import HubBinding
from dnb.transport.segments import FOLDERS_VARIABLE
from dnb.transport.sockets.channels import HubClient
from tests.engines.pools import PATIENCE_SECONDS, open_small_pool, until, wait, wait_until
from tests.faults.kernels import Kernel
from tests.models import digits, largest_gap, largest_relative_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]

START_AND_TRAIN = """
pool = pools.start(n=1)
run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000, name="orphan")
import threading
moved = threading.Event()
run.add_listener(lambda run: moved.set() if run.step > 3 else None)
assert moved.wait(120)
"""


@pytest.fixture
def own_pool(leftovers, tmp_path, monkeypatch):
    """A pool that the test may break."""
    monkeypatch.chdir(tmp_path)
    pool = open_small_pool(1, profile_dir=tmp_path / "profile")
    yield pool
    pool.shutdown()


@pytest.fixture
def three_engines(shared, tmp_path, monkeypatch):
    """The shared pool, which gets others for those that a test has killed."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(3)
    shared.calm()


def wait_for_step(run, step):
    reached = threading.Event()
    run.add_listener(lambda run: reached.set() if run.step >= step or not run.is_active else None)
    assert reached.wait(PATIENCE_SECONDS), f"step {step} was not reached in {PATIENCE_SECONDS} s: {run}"


def test_an_engine_that_stands_still_is_called_hung(three_engines):
    victim = three_engines.engines[0]
    os.kill(victim.pid, signal.SIGSTOP)
    hung = ["hung", "ready", "ready"]
    until(lambda: [engine.state for engine in three_engines.engines] == hung, what="the hub has noticed")


def test_a_run_goes_on_with_the_same_loss_when_engines_are_killed(three_engines):
    run = three_engines.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=1_000_000)
    for step in (20, 60):
        wait_for_step(run, step)
        os.kill(three_engines.engines[0].pid, signal.SIGKILL)
    wait_until(run, lambda run: [event.kind for event in run.events].count("died") == 2, what="two deaths")
    wait_for_step(run, run.step + 100)
    run.stop()
    wait(run)
    plain = plain_losses(mlp(), digits(), num_steps=run.step, batch_size=64)
    assert run.status == "stopped"
    assert [event.kind for event in run.events].count("died") == 2
    assert largest_gap(run.history["loss"], plain) <= 1e-10
    assert len(three_engines.engines) == 1


def test_a_run_that_lost_its_last_engine_fails_and_says_so(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = shared.of(2)
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000)
    wait_for_step(run, 3)
    for engine in pool.engines:
        os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"no engine is left at step \d+: engine \d+ died"):
        wait(run)


def test_a_killed_guardian_ends_the_pool_and_the_run_says_what_happened(own_pool, leftovers):
    run = own_pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000)
    wait_for_step(run, 3)
    os.kill(own_pool.facts.supervisor.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"the hub was lost at step \d+: the hub has died"):
        wait(run)
    leftovers.wait_until_none()
    with pytest.raises((PoolError, HubError), match="%dtrain start"):
        _ = own_pool.engines


def test_a_hub_that_dies_again_and_again_ends_the_pool(own_pool, leftovers):
    killed = set()

    def kill_the_next():
        with contextlib.suppress(psutil.Error, DnbError):
            hubs = psutil.Process(own_pool._supervisor.pid).children()
            killed.update(hub.pid for hub in hubs)
            for hub in hubs:
                hub.kill()
        return not own_pool.is_open

    until(kill_the_next, what="the supervisor gives up")
    leftovers.wait_until_none()
    assert len(killed) >= 5


CONTROLLER = """
import subprocess, sys
import msgspec
from dnb.protocol.pool import HubConfig
from dnb.transport.system.processes import this_process
config = HubConfig(
    cluster_id="spawned", key="key", security_dir="{folder}", log_dir="{folder}", host="127.0.0.1",
    controller=this_process(), owner=None,
)
guard = "from dnb.hub.process import supervisor as supervisor; supervisor.CAN_FORK = False; supervisor.main()"
supervisor = subprocess.Popen([sys.executable, "-c", guard], stdin=subprocess.PIPE)
supervisor.stdin.write(msgspec.json.encode(config) + b"\\n")
supervisor.stdin.close()
supervisor.wait()
"""


def test_where_processes_cannot_be_forked_a_hub_is_a_process_of_its_own(tmp_path, leftovers):
    script = CONTROLLER.format(folder=tmp_path)
    controller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert controller.stdout is not None
    with controller.stdout as pipe:
        binding = msgspec.json.decode(pipe.readline(), type=HubBinding)
    client = HubClient(binding.client, timeout_seconds=120)
    hubs = [client.ask(GetPool(), PoolState)[0].facts.hub.pid]
    os.kill(hubs[0], signal.SIGKILL)
    hubs.append(client.ask(GetPool(), PoolState)[0].facts.hub.pid)
    client.ask(Shutdown(), Done)
    client.close()
    controller.wait(PATIENCE_SECONDS)
    leftovers.wait_until_none()
    assert hubs[0] != hubs[1]


def test_a_killed_controller_takes_hub_and_engines_with_it(own_pool, leftovers):
    os.kill(own_pool.facts.controller.pid, signal.SIGKILL)
    leftovers.wait_until_none()


def test_a_pool_that_dies_while_it_is_shut_down_is_cleared_up(own_pool, leftovers, monkeypatch):
    facts = own_pool.facts

    def die(_pool):
        for process in (facts.supervisor, facts.hub):
            os.kill(process.pid, signal.SIGKILL)
        raise HubError("the hub has died")

    monkeypatch.setattr(type(own_pool), "is_steered_here", property(die))
    own_pool.shutdown()
    leftovers.wait_until_none()


def test_nothing_outlives_a_killed_kernel_without_a_run(folder, leftovers):
    kernel = Kernel("pools.start(n=1)", folder=folder)
    kernel.wait_until_ready()
    kernel.kill()
    leftovers.wait_until_none()
    assert find_pools(profile_folder(None) / "security").dead == []


def test_nothing_outlives_a_kernel_that_ends_by_itself(folder, leftovers):
    kernel = Kernel("pools.start(n=1)", folder=folder)
    kernel.wait_until_ready()
    kernel.end()
    leftovers.wait_until_none()


def test_a_new_kernel_finds_the_run_that_a_killed_one_left_and_can_end_it(folder, leftovers):
    kernel = Kernel(START_AND_TRAIN, folder=folder)
    kernel.wait_until_ready()
    kernel.kill()
    pool, notices = open_pool()
    assert notices == [
        "found a pool of 1 engines, which a kernel that is gone had started, and took it over: "
        "run 'orphan' is running; %dtrain attach shows it, %dtrain shutdown ends both"
    ]
    run = pools.attach()
    at = run.step
    wait_for_step(run, at + 1)
    assert (run.name, run.status) == ("orphan", "running")
    assert len(run.history["loss"]) >= run.step
    assert pools.shutdown()
    leftovers.wait_until_none()
    assert pool.is_open is False


def test_a_new_kernel_attaches_without_a_start_and_brings_the_weights_home(folder):
    kernel = Kernel(START_AND_TRAIN, folder=folder)
    kernel.wait_until_ready()
    kernel.kill()
    model = mlp(seed=7)
    run = pools.attach("orphan", model=model)
    run.stop()
    wait(run)
    losses = plain_losses(mlp(), digits(), num_steps=min(run.step, 50), batch_size=64)
    assert run.status == "stopped"
    assert largest_gap(run.history["loss"][: len(losses)], losses) < 1e-10
    assert not (model[0].weight == mlp(seed=7)[0].weight).all()


def test_a_run_that_ended_after_its_kernel_still_gives_its_weights_to_the_next(folder, leftovers):
    kernel = Kernel(
        """
        pool = pools.start(n=1)
        run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=300, name="late")
        """,
        folder=folder,
    )
    kernel.wait_until_ready()
    kernel.kill()
    until(lambda: Run.open(folder / ".dnb" / "runs" / "late").status == "finished", what="the run ended")
    model, plain = mlp(seed=7), mlp()
    wait(pools.attach(model=model))
    plain_losses(plain, digits(), num_steps=300, batch_size=64)
    assert largest_relative_gap(model, plain) < 1e-10


def test_an_orphaned_pool_ends_by_itself_when_its_run_has_ended_and_nobody_attaches(folder, leftovers):
    kernel = Kernel(
        """
        pool = pools.start(n=1, linger_seconds=0.5)
        pool.fit(mlp(), digits(), loss="cross_entropy", steps=500, name="short")
        """,
        folder=folder,
    )
    kernel.wait_until_ready()
    kernel.kill()
    leftovers.wait_until_none(timeout_seconds=PATIENCE_SECONDS)
    assert Run.open(folder / ".dnb" / "runs" / "short").status == "finished"


def test_what_a_dead_pool_left_is_cleared_at_the_next_start(folder):
    kernel = Kernel(
        """
        pool = pools.start(n=1)
        say(*[process.pid for process in (pool.facts.supervisor, pool.facts.hub, pool.facts.controller)])
        """,
        folder=folder,
    )
    pids = [int(pid) for pid in kernel.wait_until_ready()[0].split()]
    for pid in reversed(pids):  # the supervisor last: nobody is left to clear up or to start another hub
        os.kill(pid, signal.SIGSTOP)
    kernel.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(find_pools(profile_folder(None) / "security").dead) == 1, what="the pool is dead")
    _, notices = open_pool(n=1)
    assert notices == ["cleared what 1 dead pool had left"]


def test_a_full_memory_folder_is_told_and_the_next_one_is_used(tiny_memory, folder, monkeypatch):
    roomy = folder / "roomy"
    roomy.mkdir()
    monkeypatch.setenv(FOLDERS_VARIABLE, f"{tiny_memory}{os.pathsep}{roomy}")
    pool, _ = open_pool(n=1)
    run = pool.fit(mlp(), digits(), loss="cross_entropy", steps=2)
    wait(run)
    told = [event.text for event in run.events if event.kind == "memory"]
    assert run.status == "finished"
    assert "free (No space left on device)" in told[0]
    assert told[0].endswith(f"using {roomy}")


@pytest.mark.usefixtures("float32")  # of which the figures are
def test_no_folder_with_room_refuses_the_run_with_needed_and_free(tiny_memory, folder, monkeypatch):
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tiny_memory))
    pool, _ = open_pool(n=1)
    with pytest.raises(SpaceError, match=r"needs 0\.5 MB of shared memory, but .* has 0\.\d MB free .*--shm-size"):
        pool.fit(mlp(), digits(), loss="cross_entropy", steps=2)
    assert pool.facts.run is None


def open_pool(n=2):
    return pools.open_pool(
        pools.PoolRequest(n=n, threads_per_engine=1, timeout_seconds=PATIENCE_SECONDS, linger_seconds=60)
    )
