"""Local engines are forks of the hub's supervisor, and like engines that a command has started."""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

import psutil
import pytest

from dnb.api.launching import Pool
from dnb.errors import PoolError
from dnb.hub.process import fork_server
from dnb.pool import fork_launcher
from dnb.pool.startup import profile_folder, start_pool
from tests.engines.pools import open_small_pool, until

pytestmark = [pytest.mark.engines, pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux")]


def on_each(pool, function):
    return pool.client[:].apply_sync(function)


def test_an_engine_is_a_child_of_the_guardian_that_imported_torch_for_it(pool):
    (newcomer,) = pool.add(1)
    pid = next(engine.pid for engine in pool.engines if engine.id == newcomer)
    assert psutil.Process(pid).ppid() == pool.facts.supervisor.pid


def test_engines_draw_different_random_numbers_outside_torch(pool):
    def draw():
        import random

        import numpy as np

        return random.random(), np.random.random()

    one, other = on_each(pool, draw)
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_an_engine_works_in_the_kernels_folder_and_environment(pool, monkeypatch, tmp_path):
    def look():
        import os

        return os.getcwd(), os.environ.get("TOLD_BY_THE_KERNEL")

    monkeypatch.setenv("TOLD_BY_THE_KERNEL", "yes")
    (newcomer,) = pool.add(1)
    assert pool.client[newcomer].apply_sync(look) == (str(tmp_path), "yes")


def test_an_engine_holds_no_port_of_the_hub(pool):
    ports = listening(pool.facts.supervisor.pid)
    assert ports
    assert not any(ports & listening(engine.pid) for engine in pool.engines)


def listening(pid):
    return {each.laddr.port for each in psutil.Process(pid).net_connections() if each.status == "LISTEN"}


def test_numpy_takes_as_many_threads_as_torch(pool):
    def count_threads():
        import numpy as np  # noqa: F401
        import threadpoolctl
        import torch

        return torch.get_num_threads(), {each["num_threads"] for each in threadpoolctl.threadpool_info()}

    for threads, found in on_each(pool, count_threads):
        assert found == {threads}


def test_a_cell_on_an_engine_can_be_interrupted(pool):
    def wait_long():
        import time

        time.sleep(600)

    view = pool.client[pool.engines[0].id]
    call = view.apply_async(wait_long)
    until(lambda: call.metadata.started or not call.ready(), what="it was sent")
    until(lambda: _interrupt(pool, call), what="the call ended")
    with pytest.raises(Exception, match="KeyboardInterrupt"):
        call.get(timeout=60)


def _interrupt(pool, call):
    pool.client.send_signal(signal.SIGINT, pool.engines[0].id).result(timeout=60)
    call.wait(1)
    return call.ready()


def test_an_engine_that_was_killed_leaves_no_zombie(pool):
    victim = pool.engines[1]
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(victim.pid), what="the supervisor has buried it")


def test_a_guardian_that_stands_still_is_waited_for_as_long_as_was_said_and_starts_nothing_later(pool):
    supervisor = psutil.Process(pool.facts.supervisor.pid)
    before = {child.pid for child in supervisor.children()}
    supervisor.suspend()
    try:
        with pytest.raises(
            PoolError, match=r"1 of 1 engines did not come up, .*: the limit of 0\.5 s is over\. %dtrain"
        ):
            pool.add(1, timeout_seconds=0.5)
    finally:
        supervisor.resume()
    assert len(pool.add(1)) == 1  # taken after the order that nobody waits for
    assert len({child.pid for child in supervisor.children()} - before) == 1


def let_one_be_born(monkeypatch, *, then):
    """From the second engine on the supervisor fails so; the list of those that were born."""
    born = []

    def fork_once(*args, **kinds):
        if born:
            raise then
        born.append(fork_server.fork_engine(*args, **kinds))
        return born[0]

    monkeypatch.setattr(fork_launcher, "fork_engine", fork_once)
    return born


def test_of_two_engines_the_first_is_ended_if_there_will_be_no_second(pool, monkeypatch):
    supervisor = psutil.Process(pool.facts.supervisor.pid)
    before = {child.pid for child in supervisor.children()}
    born = let_one_be_born(monkeypatch, then=PoolError("the supervisor is gone"))
    with pytest.raises(PoolError, match="2 of 2 engines did not come up, and were ended: the supervisor is gone"):
        pool.add(2)
    until(lambda: {child.pid for child in supervisor.children()} <= before, what="the first has ended")
    assert (len(born), len(pool.engines)) == (1, 2)


def test_a_start_whose_guardian_is_too_slow_leaves_nothing_and_says_how_to_wait_longer(
    leftovers, tmp_path, monkeypatch
):
    born = let_one_be_born(monkeypatch, then=TimeoutError("the supervisor did not answer"))
    with pytest.raises(
        PoolError, match=r"2 engines did not come up: the supervisor .*-n 2 --timeout-seconds 240 waits"
    ):
        open_small_pool(2, profile_dir=tmp_path / "profile")
    assert len(born) == 1
    leftovers.wait_until_none()


def nursery_of(pool):
    file = profile_folder(None) / "security" / f"ipcontroller-{pool.cluster_id}-engine.json"
    return json.loads(file.read_text())["dnb"]["nursery"]


@pytest.mark.parametrize("words", [b"", b"\n", b"no order at all"], ids=str)
def test_nonsense_on_the_guardians_socket_starts_nothing_and_ends_nothing(pool, words):
    supervisor = psutil.Process(pool.facts.supervisor.pid)
    before = {child.pid for child in supervisor.children()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(f"\0{nursery_of(pool)}")
        line.sendall(words)
        line.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(32) == b""
    assert {child.pid for child in supervisor.children()} <= before
    assert len(pool.add(1)) == 1


def test_an_engine_may_open_as_many_files_as_its_kernel(pool):
    def count_files():
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    own, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (own - 7, limit))
    try:
        (newcomer,) = pool.add(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (own, limit))
    assert pool.client[newcomer].apply_sync(count_files) == own - 7


def test_an_engine_with_two_threads_computes_in_parallel_after_the_fork(tmp_path, monkeypatch):
    def multiply():
        import torch

        a = torch.ones(600, 600)
        return torch.get_num_threads(), float((a @ a).sum())

    monkeypatch.chdir(tmp_path)
    with start_pool(
        Pool,
        n=1,
        profile_dir=tmp_path / "profile",
        launcher="local",
        threads_per_engine=2,
        timeout_seconds=120,
    ) as pool:
        assert pool.client[:].apply_async(multiply).get(timeout=60) == [(2, 600.0**3)]
