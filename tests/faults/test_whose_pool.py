"""Whose pool it is: of other containers and hosts, and of other versions of dnb, in a home that they share."""

import json
import subprocess
import time

import msgspec
import pytest

from dnb.api import pools
from dnb.errors import PoolError
from dnb.pool.discovery import clear_doubtful, find_pools
from dnb.pool.startup import profile_folder
from dnb.protocol.pool import Process
from dnb.transport.sockets.channels import listen, url_of
from tests.engines.pools import wait_until
from tests.faults.kernels import Kernel
from tests.leftovers import Leftovers

pytestmark = [pytest.mark.engines, pytest.mark.faults]

TRAIN = """
pool = pools.start(n=1, timeout_seconds=120)
run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000, name="theirs")
"""
CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# A host of its own: its name, and a network of which nothing is seen from here.
HOST = (*CONTAINER, "--uts", "--net", "sh", "-c", 'hostname far-away && ip link set lo up && exec "$@"', "sh")


@pytest.fixture
def kernel_in(folder):
    """Makes another kernel with a pool and a run, in a container of its own that shares this home."""
    kernels = []

    def make(prefix):
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"this user may not make namespaces: {tried.stderr.strip()}")
        kernels.append(Kernel(TRAIN, folder=folder, prefix=prefix))
        kernels[-1].wait_until_ready()
        return kernels[-1]

    yield make
    pools.shutdown()
    for kernel in kernels:
        kernel.kill()  # and with its namespace all that was started in it
    places = {"security_dir": security(), "log_dir": security().with_name("log")}
    clear_doubtful(find_pools(security()), **places)


def security():
    return profile_folder(None) / "security"


def records():
    return list(security().glob("dnb-pool-*.json"))


def attach_in_time():
    begin = time.monotonic()
    with pytest.raises(PoolError) as caught:
        pools.attach()
    assert time.monotonic() - begin < 5
    return str(caught.value)


def test_a_pool_of_another_container_is_found_by_asking_it_and_can_be_taken_over(kernel_in):
    kernel_in(CONTAINER)
    assert find_pools(security()).dead == []  # its pids are none of ours
    run = pools.attach(steer=True)
    wait_until(run, lambda run: run.step > 3, what="3 steps")
    run.stop()
    run.wait(timeout_seconds=60)
    assert (run.name, run.status) == ("theirs", "stopped")


def test_a_living_pool_of_a_host_that_is_out_of_reach_is_told_and_left_alone_beside_one_of_our_own(kernel_in):
    kernel_in(HOST)
    before = [path.read_bytes() for path in records()]
    told = attach_in_time()
    assert told.startswith("nothing to attach to: a pool of host far-away (run 'theirs', started 20")
    assert "of that host alone, where nothing of it answers here" in told
    _, notices = pools.open_pool(pools.PoolRequest(n=1, threads_per_engine=1, timeout_seconds=120, linger_seconds=10))
    assert [notice.partition(" (")[0] for notice in notices] == ["a pool of host far-away"]
    assert pools.shutdown()
    assert [path.read_bytes() for path in records()] == before


@pytest.fixture(scope="module")
def their_folder(nothing_is_left, tmp_path_factory):
    """Where another kernel has a pool and a run."""
    folder = tmp_path_factory.mktemp("theirs")
    leftovers = Leftovers()
    with pytest.MonkeyPatch.context() as patch:
        set_apart(patch, folder)
        kernel = Kernel(TRAIN, folder=folder)
        kernel.wait_until_ready()
        run = pools.attach()
        wait_until(run, lambda run: run.step > 3, what="it trains")  # what tests clear, engines have opened by now
        pools.shutdown()  # which only closes what looked on
    yield folder
    with pytest.MonkeyPatch.context() as patch:
        set_apart(patch, folder)
        pools.attach(steer=True)
        pools.shutdown()
        kernel.end()
    leftovers.wait_until_none()


def set_apart(patch, folder):
    patch.chdir(folder)
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    patch.setattr(pools, "_pool", None)


@pytest.fixture(scope="module")
def left_behind(their_folder):
    """What a pool with a run has in its profile, by file name."""
    return {path.name: path.read_bytes() for path in (their_folder / "ipython/profile_default/security").iterdir()}


@pytest.fixture
def left(folder, left_behind):
    """Puts those files here, with every process of the pool's record changed, and ports at which nobody listens."""

    def put(change):
        security().mkdir(parents=True, exist_ok=True)
        with listen("127.0.0.1") as listener:
            closed = url_of(listener)
        for name, data in left_behind.items():
            record = json.loads(data)
            if "dnb" in record:
                record["dnb"]["address"] |= {"url": closed, "local": ""}
            if name.startswith("dnb-pool-"):
                record["run_status"] = "running"
                _change_processes(record, change)
            (security() / name).write_text(json.dumps(record))

    return put


def _change_processes(value, change):
    if isinstance(value, dict):
        if {"pid", "host", "create_time"} <= value.keys():
            value.update(msgspec.to_builtins(msgspec.structs.replace(Process(**value), **change)))
        for each in value.values():
            _change_processes(each, change)
    elif isinstance(value, list):
        for each in value:
            _change_processes(each, change)


def test_what_an_earlier_boot_has_left_is_cleared_by_whoever_looks(left):
    left({"create_time": 1.0, "boot_id": "of-an-earlier-boot"})
    assert attach_in_time().startswith("nothing to attach to: cleared what 1 dead pool had left. ")
    assert list(security().iterdir()) == []


def test_what_a_container_that_is_gone_has_left_is_cleared_when_that_is_asked_for(left):
    left({"host": "old-container-7f3a"})
    assert "a pool of host old-container-7f3a (run 'theirs', started" in attach_in_time()
    assert len(records()) == 1
    with pytest.raises(PoolError, match="cleared what 1 dead pool had left"):
        pools.attach(clear=True)
    assert list(security().iterdir()) == []


def test_a_pool_whose_record_is_of_a_newer_dnb_is_named_and_goes_on(their_folder, monkeypatch):
    set_apart(monkeypatch, their_folder)
    (path,) = records()
    whole = path.read_bytes()
    path.write_text(json.dumps({**json.loads(whole), "new_field": 1, "version": "9.9.9"}))
    told = attach_in_time()
    assert "was started by dnb 9.9.9 (format 1), and this is dnb 0." in told
    assert "(the field 'new_field' is not known): use it, or end it with %dtrain shutdown, from a kernel with" in told
    path.write_bytes(whole)
    run = pools.attach()
    wait_until(run, lambda run: run.step > 3, what="its run goes on")
    pools.shutdown()  # which only closes what looked on
