"""Starting, looking at and ending pools."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import zmq

from dnb.api import pools
from dnb.api.launching import Pool
from dnb.errors import ArgumentError, PoolError
from dnb.pool import fork_launcher, startup
from dnb.pool.engines import all_processes, describe_engines
from dnb.pool.startup import profile_folder, start_pool
from dnb.protocol.pool import Process
from dnb.transport.system.processes import is_alive
from tests.engines.pools import until
from tests.models import digits, mlp

pytestmark = pytest.mark.engines


def fresh_pool(**options):
    return start_pool(
        Pool,
        **{
            "n": 1,
            "profile_dir": profile_folder(None),
            "launcher": "local",
            "threads_per_engine": None,
            "timeout_seconds": 60,
            **options,
        },
    )


def test_engines_are_living_processes_of_this_host(pool):
    assert [(engine.host, psutil.pid_exists(engine.pid)) for engine in pool.engines] == [
        (socket.gethostname(), True)
    ] * 2


def test_engines_share_the_cores_of_the_host(pool):
    assert [engine.cores for engine in pool.engines] == [max(1, os.cpu_count() // 2)] * 2


def test_torch_is_imported_and_keeps_to_its_threads_when_a_pool_is_ready(pool):
    def look():
        import sys

        return "torch" in sys.modules and sys.modules["torch"].get_num_threads()

    assert pool.client[:].apply_sync(look) == [engine.cores for engine in pool.engines]


def test_the_table_has_one_line_per_engine_with_its_pid(pool):
    lines = describe_engines(pool.engines).splitlines()
    assert [str(engine.pid) in line for engine, line in zip(pool.engines, lines[1:], strict=True)] == [True, True]


def test_a_second_start_returns_the_running_pool_and_says_so(pool, caplog):
    with caplog.at_level(logging.WARNING):
        assert pools.start(n=3) is pool
    assert "using the running pool of 2 engines; %dtrain add 1 makes them 3" in caplog.text


def test_status_is_answered_while_the_engines_are_busy(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=200)
    states = set()
    while run.is_active and "busy" not in states:
        states |= {engine.state for engine in pool.engines}
    assert "busy" in states


@pytest.mark.parametrize("n", [0, -1, 2.5, "two", True])
def test_a_number_of_engines_that_is_none_is_refused(n):
    with pytest.raises(ArgumentError, match="n must be an integer of at least 1"):
        fresh_pool(n=n)


def test_more_engines_than_memory_allows_are_refused_with_the_estimate():
    with pytest.raises(
        ArgumentError, match=r"100000 engines need about 30000\.3 GB .* GB is free: %dtrain start -n \d+"
    ):
        fresh_pool(n=100_000)


def test_an_unknown_launcher_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match="no engine launcher 'slrum': did you mean 'slurm'"):
        fresh_pool(launcher="slrum")


def test_a_profile_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "security").write_text("a file where a folder should be")
    with pytest.raises(PoolError, match=r"security, which cannot be written .*--profile NAME"):
        fresh_pool(profile_dir=tmp_path)


def test_a_library_without_encryption_is_named_before_anything_is_started(monkeypatch, leftovers):
    monkeypatch.setattr("zmq.has", lambda capability: capability != "curve")
    with pytest.raises(
        PoolError, match=r"encrypts its sockets with CurveZMQ, which this libzmq 4\S+ was built without"
    ):
        fresh_pool()
    assert leftovers.find() == []


# The first port of all is bound before the connection files are written, the third one for clients after it.
@pytest.mark.parametrize(("trait", "num_before"), [("ports", 0), ("client_ports", 2)])
def test_a_taken_port_is_told_and_leaves_no_process(leftovers, tmp_path, trait, num_before):
    before = set(leftovers.find())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [*free_ports(num_before), taken.getsockname()[1]]
        (tmp_path / "ipcontroller_config.py").write_text(f"c.IPController.{trait} = {ports}\n")
        with pytest.raises(PoolError, match=r"(?s)did not come up.*[Aa]ddress already in use"):
            fresh_pool(profile_dir=tmp_path)
    until(lambda: set(leftovers.find()) <= before, what="all of it has ended")


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_controller_that_ends_while_engines_start_is_told_with_its_last_words(
    leftovers, tmp_path, monkeypatch, number
):
    before = set(leftovers.find())

    fork_engine = fork_launcher.fork_engine

    def fork_and_lose_the_controller(*args, **kinds):
        pid = fork_engine(*args, **kinds)
        supervisor = psutil.Process(pid).parent()
        controller = supervisor.parent()
        controller.send_signal(number)
        until(lambda: not controller.is_running(), what="the controller has ended")
        return pid

    monkeypatch.setattr(fork_launcher, "fork_engine", fork_and_lose_the_controller)
    with pytest.raises(PoolError, match=r"(?s)1 engines did not come up: its controller has ended\n.*heartbeat::"):
        fresh_pool(profile_dir=tmp_path)
    until(lambda: set(leftovers.find()) <= before, what="all of it has ended")


class Closed(NamedTuple):
    """A pool that was shut down, and what it had while it was open."""

    pool: Pool
    profile: Path
    processes: list[Process]
    folders: list[Path]


@pytest.fixture(scope="module")
def closed(nothing_is_left, tmp_path_factory):
    profile = tmp_path_factory.mktemp("closed")
    with fresh_pool(profile_dir=profile) as pool:
        processes, folders = all_processes(pool.facts), pool.segment_folders
    return Closed(pool, profile, processes, folders)


def test_shutdown_ends_every_process_and_removes_every_file(closed):
    assert [process for process in closed.processes if is_alive(process)] == []
    assert list((closed.profile / "security").iterdir()) == []
    assert list((closed.profile / "log").iterdir()) == []
    assert [folder.exists() for folder in closed.folders] == [False] * len(closed.folders)


def test_keys_on_disk_are_for_their_user_only_and_in_no_command_line(pool):
    folder = profile_folder(None) / "security"
    files = [path for path in folder.iterdir() if pool.cluster_id in path.name and "cluster-" not in path.name]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    secret = pool.key.decode()
    lines = [" ".join(psutil.Process(process.pid).cmdline()) for process in all_processes(pool.facts)]
    assert not any(secret in line for line in lines)


def test_a_pool_that_was_shut_down_says_how_to_open_another(closed):
    closed.pool.shutdown()
    with pytest.raises(PoolError, match="%dtrain start opens a new one"):
        _ = closed.pool.engines


class Deaf:
    """Lets a pool's client miss every notification from the moment on at which it is connected."""

    def __init__(self, monkeypatch) -> None:
        connect = startup._Controller.connect

        def connect_deaf(controller):
            client = connect(controller)
            done = threading.Event()

            def unsubscribe():
                client._notification_socket.setsockopt(zmq.UNSUBSCRIBE, b"")
                done.set()

            client._io_loop.add_callback(unsubscribe)
            assert done.wait(10)
            return client

        monkeypatch.setattr(startup._Controller, "connect", connect_deaf)


def test_a_pool_starts_and_grows_although_its_client_hears_of_no_engine(monkeypatch, leftovers):
    Deaf(monkeypatch)
    with fresh_pool(n=2) as pool:
        assert len(pool.engines) == 2
        assert len(pool.add(1)) == 1
        assert sorted(pool.client.ids) == [engine.id for engine in pool.engines]
        assert len(set(pool.client[:].apply_sync(os.getpid))) == 3
    leftovers.wait_until_none()


def test_a_block_does_not_end_a_pool_that_was_running_before_it(pool):
    with pools.start(n=2) as same:
        assert same is pool
    assert pool.is_open
