from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from dnb.transport.sockets import listeners
from dnb.transport.sockets.channels import ENGINE_ROLE, RoleKeys, bind_router, connect_dealer, start_authenticator
from dnb.transport.sockets.listeners import (
    HANDSHAKE_SECONDS,
    MOST_CALLERS,
    PortWatcher,
    Turnstile,
    is_near,
    listen,
    listen_locally,
    url_of,
)
from tests.strangers import ask_stranger, need_another_user

linux = pytest.mark.skipif(sys.platform != "linux", reason="local doors and filters are Linux's")


# counting ------------------------------------------------------------------------------------------------


class Port:
    """A turnstile, a clock that a test sets, and what the port was told."""

    def __init__(self) -> None:
        self.now = 50.0
        self.told: list[bool] = []
        self.turnstile = Turnstile(self.told.append, clock=lambda: self.now)

    def call(self, number: int) -> None:
        for file in range(number):
            self.turnstile.call(file)


@pytest.fixture
def port() -> Port:
    return Port()


def test_a_port_stays_open_for_some_dozens(port: Port):
    port.call(MOST_CALLERS - 1)
    assert port.told == []


def test_a_port_is_blocked_when_too_many_have_not_shown_a_key(port: Port):
    port.call(MOST_CALLERS + 100)
    assert port.told == [True]


def test_who_comes_in_counts_no_more(port: Port):
    for file in range(1000):
        port.turnstile.call(file)
        port.turnstile.come_in()
    assert port.told == []


def test_who_leaves_counts_no_more(port: Port):
    for file in range(1000):
        port.turnstile.call(file)
        port.turnstile.leave(file)
    assert port.told == []


def test_a_file_number_that_comes_again_is_one_caller(port: Port):
    for _ in range(1000):
        port.turnstile.call(7)
    assert port.told == []


def test_a_port_is_open_again_when_those_who_said_nothing_are_sent_away(port: Port):
    port.call(MOST_CALLERS)
    port.now += HANDSHAKE_SECONDS + 0.1
    port.turnstile.expire()
    assert port.told == [True, False]


def test_a_port_does_not_open_and_shut_for_each_caller(port: Port):
    port.call(MOST_CALLERS)
    for file in range(MOST_CALLERS // 2):
        port.turnstile.leave(file)
    assert port.told == [True]
    port.turnstile.leave(MOST_CALLERS // 2)
    assert port.told == [True, False]


def test_who_leaves_or_comes_in_without_having_called_is_no_trouble(port: Port):
    port.turnstile.leave(3)
    port.turnstile.come_in()
    assert port.told == []


# real sockets ----------------------------------------------------------------------------------------------


class Hub:
    """A ROUTER with a port and, on Linux, a local door, and its doorkeeper."""

    def __init__(self) -> None:
        self.keys = RoleKeys()
        self.context: zmq.Context[Any] = zmq.Context()
        self.authenticator = start_authenticator(self.context, self.keys)
        self.port = listen("127.0.0.1")
        self.local = listen_locally() if listeners.HAS_LOCAL_SOCKETS else None
        self.router = bind_router(self.context, self.keys, role=ENGINE_ROLE, listener=self.port, local=self.local)
        self.doorkeeper = PortWatcher({self.router: self.port})
        self.doorkeeper.start()
        self.peers: list[zmq.Socket[Any]] = []

    def connect(self, name: bytes, *, local: bool) -> zmq.Socket[Any]:
        place = url_of(self.local) if local and self.local is not None else ""
        address = self.keys.address(ENGINE_ROLE, url_of(self.port), local=place)
        self.peers.append(connect_dealer(self.context, address, identity=name))
        return self.peers[-1]

    def hears(self, name: bytes, *, local: bool, timeout_seconds: float = 10) -> bool:
        """Whether what a new peer says arrives in time."""
        self.connect(name, local=local).send(b"hello")
        if not self.router.poll(1000 * timeout_seconds):
            return False
        while self.router.poll(0):
            if self.router.recv_multipart() == [name, b"hello"]:
                return True
        return False

    def close(self) -> None:
        self.doorkeeper.stop()
        for peer in self.peers:
            peer.close(linger=0)
        self.router.close()
        self.authenticator.stop()
        self.context.term()
        for listener in filter(None, (self.port, self.local)):
            listener.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def silent(hub: Hub) -> Iterator[list[socket.socket]]:
    """So many silent connections to the hub's port that it is blocked."""
    callers = []
    for _ in range(4 * MOST_CALLERS):
        caller = socket.socket()
        caller.setblocking(False)
        caller.connect_ex(hub.port.getsockname())
        callers.append(caller)
    until(lambda: is_blocked(hub))
    yield callers
    for caller in callers:
        caller.close()


def is_blocked(hub: Hub) -> bool:
    return any(turnstile.is_blocked for turnstile in hub.doorkeeper._turnstiles.values())


def until(holds: Any, *, limit_seconds: float = 30) -> None:
    deadline = time.monotonic() + limit_seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_seconds} s"
        time.sleep(0.01)


def count_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("local", [False, pytest.param(True, marks=linux)], ids=["port", "local"])
def test_a_peer_with_the_key_is_heard_at_every_door(hub: Hub, local: bool):
    assert hub.hears(b"engine-1", local=local)


@linux
def test_a_peer_on_this_host_uses_the_local_door(hub: Hub):
    before = len(doors_used(hub.port))
    assert hub.hears(b"engine-1", local=True)
    assert len(doors_used(hub.port)) == before


def doors_used(port: socket.socket) -> list[Any]:
    """Connections to a port of this host."""
    import psutil

    name = port.getsockname()
    return [each for each in psutil.Process().net_connections("tcp") if each.raddr == name]


@linux
def test_a_local_door_of_another_host_is_not_near():
    assert not is_near("ipc://@hub-that-is-elsewhere")


def test_no_local_door_is_not_near():
    assert not is_near("")


@linux
def test_many_who_call_and_say_nothing_get_no_more_than_some_files(hub: Hub, silent: list[socket.socket]):
    # Of 256 that called, those stay that came in before the port was blocked: for as long as they may be silent.
    until(lambda: count_files() - len(silent) < 4 * MOST_CALLERS)


@linux
def test_a_peer_on_this_host_comes_in_while_its_port_is_blocked(hub: Hub, silent: list[socket.socket]):
    assert hub.hears(b"engine-1", local=True)
    assert is_blocked(hub)


@linux
def test_a_peer_that_was_connected_before_is_heard_while_the_port_is_blocked(hub: Hub):
    assert hub.hears(b"engine-1", local=False)
    callers = [socket.create_connection(hub.port.getsockname()) for _ in range(MOST_CALLERS)]
    until(lambda: is_blocked(hub))
    hub.peers[0].send(b"again")
    assert hub.router.poll(10_000)
    assert hub.router.recv_multipart() == [b"engine-1", b"again"]
    for caller in callers:
        caller.close()


@linux
def test_a_port_that_was_blocked_is_open_again_when_the_callers_have_left(hub: Hub, silent: list[socket.socket]):
    for caller in silent:
        caller.close()
    until(lambda: not is_blocked(hub))
    assert hub.hears(b"engine-1", local=False)


@linux
def test_a_port_that_a_hub_has_blocked_and_died_is_open_at_the_next_one(hub: Hub):
    listeners._blocker(hub.port)(True)
    assert not hub.hears(b"engine-1", local=False, timeout_seconds=0.2)
    hub.doorkeeper.stop()
    hub.doorkeeper = PortWatcher({hub.router: hub.port})
    hub.doorkeeper.start()
    assert hub.hears(b"engine-2", local=False)


@linux
def test_another_user_does_not_get_in_at_the_local_door(hub: Hub):
    need_another_user()
    assert hub.local is not None
    code = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1].replace("ipc://@", "\\0"))
sock.settimeout(30)
try:
    print("heard", sock.recv(100))
except ConnectionError as error:
    print("heard", type(error).__name__)
"""
    assert ask_stranger(code, url_of(hub.local)).strip() in ("heard b''", "heard ConnectionResetError")


def test_a_doorkeeper_that_has_stopped_leaves_nothing_open():
    Hub().close()
    before = count_files()
    Hub().close()
    assert count_files() == before
