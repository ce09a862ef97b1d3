from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest
import zmq

from dnb.engine.process.heartbeat import HeartbeatThread
from dnb.engine.process.heartbeat_watcher import Watched
from dnb.protocol.engine_messages import EngineMessage, Heartbeat
from dnb.protocol.pool import Address, EngineFacts, Process
from dnb.transport.sockets.channels import ENGINE_ROLE, RoleKeys, bind_router, listen, start_authenticator, url_of
from dnb.transport.system.processes import this_process

LIMIT_MILLISECONDS = 10_000


# Holds the lock in one call as long as its first line says, in a thread that is not the main one.
HOLDER = """
import ctypes, sys, threading
def hold(how):
    print('ready', flush=True)
    sum(range(10**12)) if how == 'compute' else ctypes.PyDLL(None).sleep(60)
threading.Thread(target=hold, args=(sys.argv[1],)).start()
"""


@pytest.fixture
def hub() -> Iterator[tuple[zmq.Socket[bytes], Address]]:
    """A hub's socket, and how to reach it."""
    keys = RoleKeys()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = start_authenticator(context, keys)
    listener = listen("127.0.0.1")
    router = bind_router(context, keys, role=ENGINE_ROLE, listener=listener)
    yield router, keys.address(ENGINE_ROLE, url_of(listener))
    router.close()
    authenticator.stop()
    context.term()
    listener.close()


@pytest.fixture(params=[False, True], ids=["near", "far"])
def router_and_heart(hub, request) -> Iterator[tuple[zmq.Socket[bytes], HeartbeatThread]]:
    """A hub's socket, and the heart of engine 3 that beats towards it."""
    router, address = hub
    facts = EngineFacts(engine=3, process=this_process(), cores=1, memory_bytes=1, device="cpu", torch_version="2")
    heartbeat_thread = HeartbeatThread(facts, address=address, is_far=request.param)
    heartbeat_thread.start()
    yield router, heartbeat_thread
    heartbeat_thread.stop()


class Watcher:
    """The watcher of a process that holds its interpreter's lock, and whose heart the test is."""

    def __init__(self, how: str, address: Address) -> None:
        self.engine = subprocess.Popen([sys.executable, "-c", HOLDER, how], stdout=subprocess.PIPE)
        self.engine.stdout.readline()
        created = psutil.Process(self.engine.pid).create_time()
        self.process = Process(host=socket.gethostname(), pid=self.engine.pid, create_time=created)
        self.watcher = subprocess.Popen(
            [sys.executable, "-m", "dnb.engine.process.heartbeat_watcher"], stdin=subprocess.PIPE
        )
        self.watcher.stdin.write(msgspec.json.encode(Watched(engine=3, process=self.process, address=address)) + b"\n")
        self.watcher.stdin.flush()

    def beat(self) -> None:
        os.write(self.watcher.stdin.fileno(), b".")

    def end(self) -> None:
        self.engine.kill()
        self.engine.wait()
        self.engine.stdout.close()
        self.watcher.stdin.close()
        self.watcher.wait(10)


@pytest.fixture
def watcher_of(hub):
    """Starts the watcher of a process that computes, or that sleeps."""
    watchers: list[Watcher] = []

    def start(how: str) -> Watcher:
        watchers.append(Watcher(how, hub[1]))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.end()


def test_a_watcher_says_that_an_engine_works_which_cannot_beat(hub, watcher_of):
    watcher = watcher_of("compute")
    for _ in range(3):
        assert hub[0].poll(LIMIT_MILLISECONDS)
        identity, packed = hub[0].recv_multipart()
        assert identity == b"watcher-3"
        beat = msgspec.msgpack.decode(packed, type=EngineMessage)
        assert beat == Heartbeat(engine=3, process=watcher.process, is_at_work=True)


def test_a_watcher_says_nothing_of_an_engine_that_does_nothing(hub, watcher_of):
    watcher_of("sleep")
    assert not hub[0].poll(2000)


def test_a_watcher_ends_with_its_engine(watcher_of):
    watcher = watcher_of("compute")
    watcher.engine.kill()
    watcher.engine.wait()
    assert watcher.watcher.wait(10) == 0  # although its standard input is open


def test_a_watcher_says_nothing_while_the_engine_beats(hub, watcher_of):
    watcher = watcher_of("compute")
    assert hub[0].poll(LIMIT_MILLISECONDS)
    heard = [0, 0]  # with and without its heart
    for has_heart in (1, 0):
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            if has_heart:
                watcher.beat()
            hub[0].poll(50)
            while hub[0].poll(0):
                hub[0].recv_multipart()
                heard[1 - has_heart] += 1
    assert heard[0] < heard[1] / 2  # on a full host one may come now and then


def test_a_heart_beats_again_and_again_and_says_whose_it_is(
    router_and_heart: tuple[zmq.Socket[bytes], HeartbeatThread],
):
    router, _ = router_and_heart
    beats = []
    for _ in range(3):
        assert router.poll(LIMIT_MILLISECONDS)
        identity, packed = router.recv_multipart()
        assert identity == b"heartbeat-3"
        beats.append(msgspec.msgpack.decode(packed, type=EngineMessage))
    assert beats == [Heartbeat(engine=3, process=this_process())] * 3


def test_a_heart_that_was_stopped_beats_no_more(router_and_heart: tuple[zmq.Socket[bytes], HeartbeatThread]):
    _, heartbeat_thread = router_and_heart
    heartbeat_thread.stop()
    assert not heartbeat_thread.is_alive()
