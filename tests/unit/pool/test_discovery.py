"""Pools that lie on disk: which can be used, which are dead, and what is said of those that nobody can tell."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import msgspec
import psutil
import pytest
import zmq

from dnb.hub.pool_files import write_pool_file
from dnb.pool.discovery import clear_doubtful, find_pools, reap_dead
from dnb.protocol.pool import HubPlace, PoolFacts, Process
from dnb.protocol.versions import VERSION
from dnb.transport.sockets.channels import CLIENT_ROLE, RoleKeys, bind_router, listen, start_authenticator, url_of
from dnb.transport.system.processes import this_process

HERE = this_process()
ELSEWHERE = Process(
    host="old-container-7f3a", pid=HERE.pid, create_time=1_700_000_000.0, boot_id="b", pid_namespace="1"
)
GONE = msgspec.structs.replace(HERE, create_time=HERE.create_time - 86400)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux names boots and containers, and has /proc")


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setenv("DNB_SEGMENT_FOLDERS", str(tmp_path / "shm"))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    for name in ("security", "log", "shm"):
        (tmp_path / name).mkdir()
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


def keep(profile, supervisor, *, owner=None, url=None, keys=None, cluster_id="one", **changes):
    """A pool's record and its connection file."""
    fields = {"hub": supervisor, "controller": supervisor, "helpers": (), "engines": (), "run": "digits"}
    facts = PoolFacts(**{"cluster_id": cluster_id, "supervisor": supervisor, "owner": owner, **fields, **changes})
    write_pool_file(profile / "security", facts)
    (profile / "shm" / f"dnb-{cluster_id}").mkdir(exist_ok=True)
    if url is not None:
        place = HubPlace(address=(keys or RoleKeys()).address(CLIENT_ROLE, url), supervisor=supervisor)
        path = profile / "security" / f"ipcontroller-{cluster_id}-client.json"
        path.write_text(json.dumps({"key": "k", "dnb": msgspec.to_builtins(place)}))
    return facts


def look(profile):
    return find_pools(profile / "security")


def places(profile):
    return {"security_dir": profile / "security", "log_dir": profile / "log"}


def files(profile):
    return sorted(path.name for folder in ("security", "shm") for path in (profile / folder).iterdir())


@contextlib.contextmanager
def hub():
    """The port of a hub's clients, and its keys."""
    keys, listener = RoleKeys(), listen("127.0.0.1")
    with zmq.Context() as context, listener:
        authenticator = start_authenticator(context, keys)
        with bind_router(context, keys, role=CLIENT_ROLE, listener=listener):
            yield keys, url_of(listener)
        authenticator.stop()


def free_url():
    with listen("127.0.0.1") as listener:
        return url_of(listener)


# this host's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supervisor", "owner", "kind"),
    [(HERE, HERE, "ours"), (HERE, GONE, "orphans"), (HERE, None, "orphans"), (GONE, HERE, "dead")],
    ids=["ours", "without its kernel", "without a kernel", "dead"],
)
def test_pools_of_this_host_are_sorted_by_pid_and_start_time(profile, supervisor, owner, kind):
    facts = keep(profile, supervisor, owner=owner)
    found = look(profile)
    assert getattr(found, kind) == [facts]
    assert found.doubtful == []


@on_linux
def test_what_an_earlier_boot_has_left_is_dead_although_a_process_has_its_pid(profile):
    facts = keep(profile, msgspec.structs.replace(GONE, boot_id="earlier", create_time=1.0))
    found = look(profile)
    assert found.dead == [facts]
    assert reap_dead(found, **places(profile)) == 1
    assert files(profile) == []


def test_an_innocent_process_that_has_a_dead_guardians_pid_is_not_touched(profile):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        started = psutil.Process(innocent.pid).create_time()
        supervisor = Process(host=socket.gethostname(), pid=innocent.pid, create_time=started - 3600)
        keep(profile, supervisor)
        assert reap_dead(look(profile), **places(profile)) == 1
        assert innocent.poll() is None
        innocent.communicate(b"\n")


# others' --------------------------------------------------------------------------------------------------


def test_a_pool_of_another_host_that_answers_is_there(profile):
    with hub() as (keys, url):
        facts = keep(profile, ELSEWHERE, owner=GONE, url=url, keys=keys)
        found = look(profile)
    assert (found.orphans, found.silent, found.doubtful) == ([facts], [], [])


@on_linux
def test_a_pool_of_another_container_that_has_this_hosts_name_is_asked_not_looked_up(profile):
    with hub() as (keys, url):
        supervisor = msgspec.structs.replace(GONE, pid_namespace="1")
        facts = keep(profile, supervisor, url=url, keys=keys)
        assert look(profile).orphans == [facts]


def test_a_pool_of_another_host_that_does_not_answer_is_told_and_left_alone(profile):
    url = free_url()
    keep(profile, ELSEWHERE, url=url)
    before = files(profile)
    found = look(profile)
    reap_dead(found, **places(profile))
    assert found.doubtful == [
        "a pool of host old-container-7f3a (run 'digits', started 2023-11-14 22:13) is gone, or out of reach: its hub "
        f"listens at {url} of that host alone, where nothing of it answers here; attach there if it lives, else "
        "%dtrain attach --clear or dnb.attach(clear=True) removes its record"
    ]
    assert files(profile) == before


def test_a_port_that_another_hub_has_by_now_is_not_taken_for_the_pools(profile):
    with hub() as (_, url):
        keep(profile, ELSEWHERE, url=url)
        assert [facts.cluster_id for facts, _ in look(profile).silent] == ["one"]


@on_linux
def test_another_container_of_this_hosts_name_is_told_as_such(profile):
    keep(profile, msgspec.structs.replace(HERE, pid_namespace="1"), url=free_url())
    (told,) = look(profile).doubtful
    assert f"a pool of another container or another host that is called {socket.gethostname()}, too, (run" in told


def test_a_hub_that_spans_hosts_and_does_not_answer_is_told_with_its_address(profile):
    keep(profile, ELSEWHERE, url="tcp://192.0.2.1:5555")  # of a network that is for documents only
    (told,) = look(profile).doubtful
    assert "is gone, or out of reach: its hub does not answer at tcp://192.0.2.1:5555; attach there" in told


def test_many_pools_that_do_not_answer_take_no_longer_than_one(profile):
    for number in range(20):
        keep(profile, ELSEWHERE, url=f"tcp://192.0.2.{number + 1}:5555", cluster_id=f"pool-{number}")
    begin = time.monotonic()
    found = look(profile)
    assert time.monotonic() - begin < 5
    assert (len(found.silent), len(found.doubtful), found.doubtful[-1]) == (20, 4, "and 17 more such pools")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[]", b'{"dnb": 3}', b"[" * 100_000], ids=repr)
def test_a_connection_file_that_is_none_is_told(profile, text):
    keep(profile, ELSEWHERE)
    (profile / "security" / "ipcontroller-one-client.json").write_bytes(text)
    (told,) = look(profile).doubtful
    assert "is gone, or out of reach: no connection file says where it listens; attach" in told


def test_what_does_not_answer_is_forgotten_when_that_is_asked_for(profile):
    keep(profile, ELSEWHERE, url=free_url())
    keep(profile, HERE, owner=HERE, cluster_id="two")
    found = look(profile)
    assert clear_doubtful(found, **places(profile)) == 1
    assert found.doubtful == []
    assert files(profile) == ["dnb-pool-two.json", "dnb-two"]


# other versions' ------------------------------------------------------------------------------------------


def make_strange(profile, **changes):
    path = profile / "security" / "dnb-pool-one.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pool_of_a_newer_dnb_is_seen_named_and_not_reaped(profile):
    keep(profile, HERE, owner=HERE)
    make_strange(profile, new_field=1, version="9.9.9")
    before = files(profile)
    found = look(profile)
    assert reap_dead(found, **places(profile)) + clear_doubtful(found, **places(profile)) == 0
    assert found.doubtful == [
        f"the pool one was started by dnb 9.9.9 (format 1), and this is dnb {VERSION} (format 1), which cannot read "
        "its record (the field 'new_field' is not known): use it, or end it with %dtrain shutdown, from a kernel with "
        "that version"
    ]
    assert files(profile) == before


def test_a_dead_pool_of_a_newer_dnb_is_cleared_only_when_that_is_asked_for(profile):
    keep(profile, GONE)
    make_strange(profile, format=2, version="9.9.9")
    found = look(profile)
    assert reap_dead(found, **places(profile)) == 0
    assert "(it is of another format): its processes are gone, and %dtrain attach --clear removes" in found.doubtful[0]
    assert clear_doubtful(found, **places(profile)) == 1
    assert files(profile) == []


@on_linux
def test_looking_at_pools_leaves_no_file_open(profile):
    keep(profile, ELSEWHERE, url=free_url())
    look(profile)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        look(profile)
    assert len(os.listdir("/proc/self/fd")) == before
