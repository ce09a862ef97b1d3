"""What other users of the host, and holders of a pool's keys who do not keep to the rules, can do to it: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from dnb.engine.process.worker import engine_facts
from dnb.pool.engines import all_processes
from dnb.pool.startup import profile_folder
from dnb.protocol.base import Message
from dnb.protocol.client_messages import GetMembers
from dnb.protocol.engine_messages import Attach, Heartbeat, HubMessage, Join, Load, WorkReport
from dnb.protocol.pool import Address
from dnb.transport.sockets.channels import connect_dealer, encode
from dnb.transport.sockets.wire_connections import connect_wire
from dnb.transport.system.processes import this_process
from tests import stranger_frames
from tests.engines.pools import open_small_pool, wait_until
from tests.models import digits, mlp
from tests.stranger_frames import HEADER, wire_frame
from tests.strangers import ask_stranger, need_another_user, start_stranger

pytestmark = [pytest.mark.engines, pytest.mark.faults]

FRAMES = Path(stranger_frames.__file__).read_text()
# `make fuzz` sends more of them.
NUM_FRAMES = int(os.environ.get("DNB_FUZZ_FRAMES", "1500"))
MOST_FILES = 1024  # as many systems allow a process
MOST_GROWTH = 20_000_000  # bytes, of the memory of each process
SILENT = 5000
SECONDS = 2.0  # for which they call


@pytest.fixture(scope="module")
def quiet_pool(tmp_path_factory, nothing_is_left) -> Iterator[Any]:
    """A pool of two engines whose processes may open no more than 1,024 files."""
    need_another_user()
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("strangers"))
    try:
        with open_small_pool(2) as pool:
            for process in (pool.facts.supervisor, pool.facts.hub):
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
            yield pool
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def quiet_losses(quiet_pool) -> list[float]:
    """The losses of 300 steps to which nobody does anything."""
    return list(fit(quiet_pool, steps=300).wait(timeout_seconds=120).history["loss"])


@pytest.fixture
def run(quiet_pool, quiet_losses) -> Iterator[Any]:
    """A run that goes on, with more steps than a test needs; its first losses are those of the quiet one."""
    run = fit(quiet_pool, steps=1_000_000)
    wait_for_step(run, 10)
    yield run
    wait_for_step(run, 300)
    assert run.history["loss"][:300] == quiet_losses
    run.stop()
    wait_until(run, lambda run: not run.is_active, what="the run has ended")


def fit(pool, *, steps):
    return pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, exact=True, steps=steps)


def wait_for_step(run, step):
    wait_until(run, lambda run: run.step >= step, what=f"step {step}")
    assert run.is_active, run.error


def connection(pool, role: str) -> dict[str, Any]:
    file = profile_folder(None) / "security" / f"ipcontroller-{pool.cluster_id}-{role}.json"
    return json.loads(file.read_text())["dnb"]


def address(pool, role: str) -> Address:
    return msgspec.convert(connection(pool, role)["address"], Address)


def places(pool) -> dict[str, str]:
    """Every socket of the pool's hub and supervisor at which a stranger can knock."""
    hub = psutil.Process(pool.facts.hub.pid)
    known = {role: address(pool, role).url.rpartition(":")[2] for role in ("engine", "client")}
    ports = {str(each.laddr.port) for each in hub.net_connections("tcp") if each.status == "LISTEN"}
    local = {each.laddr for each in hub.net_connections("unix") if each.laddr.startswith("@dnb-")}
    (wire_port,) = ports - set(known.values())
    (wire,) = local
    return {
        "wire": wire,
        "wire port": wire_port,
        "engine port": known["engine"],
        "client port": known["client"],
        "engine door": "@" + address(pool, "engine").local.removeprefix("ipc://@"),
        "nursery": "@" + connection(pool, "engine")["nursery"],
    }


PLACES = ("wire", "wire port", "engine port", "client port", "engine door", "nursery")


def memory(pool) -> dict[int, int]:
    """Resident memory of every process of the pool."""
    sizes = {}
    for process in all_processes(pool.facts):
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes[process.pid] = psutil.Process(process.pid).memory_info().rss
    return sizes


@contextlib.contextmanager
def without_effect(pool) -> Iterator[None]:
    """Hub, supervisor and engines are the same afterwards, and hold no more memory and files than before."""
    hub, engines, before = pool.facts.hub, [engine.pid for engine in pool.engines], memory(pool)
    num_files = psutil.Process(hub.pid).num_fds()
    yield
    assert pool.facts.hub == hub, "the hub died"
    assert [engine.pid for engine in pool.engines] == engines
    until(lambda: psutil.Process(hub.pid).num_fds() <= num_files + 16, what="the hub has given back its files")
    grown = {pid: (size - before.get(pid, size)) for pid, size in memory(pool).items()}
    assert all(size < MOST_GROWTH for size in grown.values()), grown


def until(holds, *, what, limit_seconds=30):
    deadline = time.monotonic() + limit_seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_seconds} s: {what}"
        time.sleep(0.02)


# silent callers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_callers(place: str) -> Iterator[None]:
    """5,000 connections of another user that say nothing, and come again when they are closed."""
    with start_stranger(FRAMES, "silent", place, str(SILENT), "0") as stranger:
        assert stranger.stdout is not None
        assert stranger.stdin is not None
        assert stranger.stdout.readline() == "calling\n"
        yield
        stranger.stdin.close()
        num_calls, _ = map(int, stranger.stdout.readline().split())
    assert num_calls >= 64, "nobody has called"


@pytest.mark.parametrize("where", PLACES)
def test_thousands_who_call_and_say_nothing_take_no_files_no_memory_and_no_steps(quiet_pool, run, where):
    with without_effect(quiet_pool):
        with silent_callers(places(quiet_pool)[where]):
            step, end, most = run.step, time.monotonic() + SECONDS, 0
            hub = psutil.Process(quiet_pool.facts.hub.pid)
            while time.monotonic() < end:
                most = max(most, hub.num_fds())
                time.sleep(0.02)
            wait_for_step(run, step + 20)
        assert most < MOST_FILES // 2


@pytest.mark.parametrize("where", PLACES)
def test_engines_join_checkpoints_are_written_and_kernels_are_answered_while_thousands_call(quiet_pool, run, where):
    with silent_callers(places(quiet_pool)[where]):
        (newcomer,) = quiet_pool.add(1, timeout_seconds=60)
        assert run.checkpoint().exists()
        quiet_pool.remove(newcomer)


def test_a_run_goes_on_while_thousands_call_at_the_ports_of_ipyparallel(quiet_pool, run):
    controller = psutil.Process(quiet_pool.facts.controller.pid)
    resource.prlimit(controller.pid, resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
    ports = sorted({each.laddr.port for each in controller.net_connections("tcp") if each.status == "LISTEN"})
    with without_effect(quiet_pool), silent_callers(str(ports[0])), silent_callers(str(ports[-1])):
        wait_for_step(run, run.step + 200)
        assert run.checkpoint().exists()
    assert controller.is_running()
    until(lambda: controller.num_fds() < MOST_FILES // 2, what="the controller has given back its files")
    (newcomer,) = quiet_pool.add(1)
    quiet_pool.remove(newcomer)


def test_a_hub_that_is_killed_is_started_again_while_thousands_call(quiet_pool, run):
    hub = quiet_pool.facts.hub
    with silent_callers(places(quiet_pool)["wire"]), silent_callers(places(quiet_pool)["engine port"]):
        os.kill(hub.pid, 9)
        until(lambda: quiet_pool.facts.hub != hub, what="another hub answers")
        wait_for_step(run, run.step + 20)


# what is to be seen ------------------------------------------------------------------------------------


LOOK = """
import glob, os, socket, sys

def try_to(what, act):
    try:
        act()
    except (OSError, EOFError):
        return
    print("this was possible:", what)

def order_engine():
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(10)
    line.connect(sys.argv[1].replace("@", "\\0"))
    socket.send_fds(line, [b"\\n"], [os.open(os.devnull, os.O_WRONLY)])
    line.sendall(b"\\x83\\xa9arguments\\x90\\xabenvironment\\x80\\xa6folder\\xa4/tmp")
    line.shutdown(socket.SHUT_WR)
    if not line.recv(32):
        raise EOFError

try_to("to order an engine", order_engine)
for pid in sys.argv[2].split(","):
    for name in ("environ", "mem", "maps"):
        try_to(f"to read {name} of a process", lambda: open(f"/proc/{pid}/{name}", "rb").read(1))
    try_to("to see its files", lambda: os.listdir(f"/proc/{pid}/fd"))
    try_to("to signal it", lambda: os.kill(int(pid), 0))
for path in sys.argv[3:]:
    try_to(f"to list {path}", lambda: os.listdir(path))
    try_to(f"to read {path}", lambda: open(path, "rb").read(1))
    try_to(f"to write {path}", lambda: open(path, "r+b"))
    try_to(f"to make a file in {path}", lambda: os.close(os.open(path + "/theirs", os.O_CREAT | os.O_WRONLY)))
"""


def test_another_user_sees_no_memory_no_keys_and_no_processes_and_orders_no_engine(quiet_pool, run):
    folders = [folder for folder in quiet_pool.segment_folders if folder.exists()]
    files = [file for folder in folders for file in folder.iterdir()]
    keys = list((profile_folder(None) / "security").glob(f"*{quiet_pool.cluster_id}*"))
    assert files
    assert keys
    pids = ",".join(str(process.pid) for process in all_processes(quiet_pool.facts))
    paths = map(str, [*folders, *files, *keys])
    assert ask_stranger(LOOK, places(quiet_pool)["nursery"], pids, *paths) == ""


def test_no_socket_s_name_tells_where_the_memory_of_a_pool_lies_or_which_pool_it_is(quiet_pool, run):
    names = Path("/proc/net/unix").read_text()
    secrets = [quiet_pool.cluster_id, *(folder.name for folder in quiet_pool.segment_folders)]
    assert not [secret for secret in secrets if secret in names or secret.removeprefix("dnb-") in names]


def test_all_that_lies_in_the_memory_of_a_pool_is_for_its_user_only(quiet_pool, run):
    folders = [folder for folder in quiet_pool.segment_folders if folder.exists()]
    modes = {path.name: path.stat().st_mode & 0o777 for folder in folders for path in folder.iterdir()}
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert set(modes.values()) == {0o600}, modes


# noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["wire", "wire port", "nursery", "engine door"])
def test_whatever_another_user_sends_to_a_local_socket_or_wire_has_no_effect(quiet_pool, run, where):
    with without_effect(quiet_pool):
        ask_stranger(FRAMES, "wire", places(quiet_pool)[where], str(NUM_FRAMES), "1", timeout_seconds=600)


@pytest.mark.parametrize("where", ["engine port", "client port"])
def test_whatever_another_user_sends_to_a_port_has_no_effect(quiet_pool, run, where):
    with without_effect(quiet_pool):
        ask_stranger(FRAMES, "zmq", places(quiet_pool)[where], str(NUM_FRAMES // 10), "2", timeout_seconds=3600)


def test_a_wire_that_this_user_s_own_process_opens_without_a_token_has_no_effect(quiet_pool, run):
    with without_effect(quiet_pool):
        stranger_frames.send(wire_frame, places(quiet_pool)["wire"], NUM_FRAMES, random.Random(3))


VALUES = (None, True, 0, 1, -1, 2**63 - 1, -(2**63), 1.5, float("nan"), "", "x" * 300, b"\0" * 100, [], {}, [[]] * 50)
KINDS = sorted(Message.__subclasses__(), key=lambda kind: kind.__name__)
# What a holder of the client's key may well ask for.
MIGHTY = {"Shutdown", "KillHub", "InjectFault", "Retire", "Hello", "Control", "SetOptions", "KeepSpares", "KeepRestart"}


def random_record(chance: random.Random) -> bytes:
    """A record whose fields have values of any type."""
    kind = chance.choice([kind for kind in KINDS if kind.__name__ not in MIGHTY])
    fields = {field.name: chance.choice(VALUES) for field in msgspec.structs.fields(kind) if chance.random() < 0.9}
    return msgspec.msgpack.encode({"type": kind.__name__, **fields})


def random_parts(chance: random.Random) -> list[bytes]:
    """A message that may be anything."""
    return chance.choice(
        (
            [random_record(chance)],
            [random_record(chance), *(chance.randbytes(50) for _ in range(chance.randrange(5)))],
            [chance.randbytes(chance.randrange(400))],
            [b"\x91" * chance.randrange(1, 100_000)],
            [b"\x81\xa4type\xa2\xff\xfe"],
            [b""],
        )
    )


@contextlib.contextmanager
def key_holder(pool, role: str, *, name: bytes = b"fuzz") -> Iterator[zmq.Socket[bytes]]:
    """A connection to the hub with the key of a role."""
    with zmq.Context() as context, connect_dealer(context, address(pool, role), identity=name) as dealer:
        yield dealer


@pytest.mark.parametrize("role", ["engine", "client"])
def test_whatever_a_holder_of_a_key_sends_has_no_effect(quiet_pool, run, role):
    chance = random.Random(4)
    with without_effect(quiet_pool), key_holder(quiet_pool, role) as dealer:
        for number in range(NUM_FRAMES):
            dealer.send_multipart(([b"%d" % number] if role == "client" else []) + random_parts(chance))
            while dealer.poll(0):
                dealer.recv_multipart()
        assert is_served(dealer, role)


def is_served(dealer, role: str) -> bool:
    """Whether the hub has read all that was sent: it answers what was asked last."""
    if role == "engine":
        return True  # it is answered nothing; the run's next steps show that the hub goes on
    dealer.send_multipart([b"last", *encode(GetMembers())])
    while dealer.poll(30_000):
        number, *_ = dealer.recv_multipart()
        if number == b"last":
            return True
    return False


def test_what_engines_say_of_others_or_of_no_run_has_no_effect(quiet_pool, run):
    me = this_process()
    with without_effect(quiet_pool), key_holder(quiet_pool, "engine") as dealer:
        for number in range(NUM_FRAMES // 3):
            dealer.send_multipart(encode(Heartbeat(engine=(0, 1, 77, -1, 2**40)[number % 5], process=me)))
            dealer.send_multipart(encode(report("none", number)))
            dealer.send_multipart(encode(Attach(engine=0, proof="")))


def report(name: str, number: int, chance: random.Random | None = None) -> WorkReport:
    """A well-formed account of work that nobody has ordered."""
    shards = (0,) if chance is None else tuple(chance.randrange(-1, 9) for _ in range(chance.randrange(3)))
    return WorkReport(
        run=name,
        lease=number,
        kind="step",
        step=number,
        shards=shards,
        parts=(),
        is_sum=False,
        unused=(),
        telemetry=None,
    )


def test_an_engine_that_breaks_all_rules_on_its_wire_loses_its_wire_and_nothing_else(quiet_pool, run):
    chance = random.Random(5)
    num_wires = max(NUM_FRAMES // 300, 2)
    with without_effect(quiet_pool):
        for number in range(num_wires):
            break_rules(quiet_pool, number, chance)
            until(lambda: all(engine.id != 77 for engine in quiet_pool.engines), what="the intruder is gone")


def break_rules(pool, number: int, chance: random.Random) -> None:
    """Join as engine 77, get a wire, and send a hundred records and some noise on it."""
    with key_holder(pool, "engine", name=b"engine-77") as dealer:
        facts = engine_facts(77, num_threads=1)
        dealer.send_multipart(encode(Join(facts=facts, num_wires=number + 1)))
        load = next_load(dealer)
        wire = connect_wire(load.wire, engine=77, timeout_seconds=10)
        wire._sock.settimeout(5)
        with contextlib.suppress(OSError):  # the hub closes it as soon as it sees what this is
            for _ in range(100):
                known = msgspec.msgpack.encode(report(load.run, chance.randrange(5000), chance))
                body = chance.choice((random_record(chance), chance.randbytes(60), known))
                wire._sock.sendall(HEADER.pack(1, 0, len(body), len(body)) + body)
            wire._sock.sendall(HEADER.pack(1, 0, 1 << 30, 5) + wire_frame(chance))
        wire.close()


def next_load(dealer) -> Load:
    while dealer.poll(30_000):
        message = msgspec.msgpack.decode(dealer.recv_multipart()[0], type=HubMessage)
        if isinstance(message, Load):
            return message
    raise AssertionError("the hub sends no run")


# logs ------------------------------------------------------------------------------------------------------


def test_no_noise_makes_a_log_grow_for_long(quiet_pool, run):
    logs = list((profile_folder(None) / "log").glob(f"*{quiet_pool.cluster_id}*"))
    assert logs
    places_ = places(quiet_pool)
    for where in ("wire", "wire port"):
        ask_stranger(FRAMES, "wire", places_[where], "500", "6")
    before = sum(log.stat().st_size for log in logs)
    for where in ("wire", "wire port"):
        ask_stranger(FRAMES, "wire", places_[where], str(NUM_FRAMES), "7", timeout_seconds=600)
    assert sum(log.stat().st_size for log in logs) - before < 100_000
