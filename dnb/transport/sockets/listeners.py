"""Listeners of the hub's ROUTERs: a TCP port, and on Linux a local socket for this user's processes only.

ZeroMQ accepts whoever calls, and keeps a file for each until its handshake has failed. A doorkeeper counts those who
have not proved yet to have a key: while they are too many, the system drops new calls at the port. Peers on this host
use the local socket, at which the system says whose they are, so that nobody keeps them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from dnb.transport.sockets.credentials import ROOT, is_foreign

HAS_LOCAL_SOCKETS = sys.platform == "linux"
# How long who calls may take to prove that it has the role's key.
HANDSHAKE_SECONDS = 3.0
# How many may be about to do so at a port.
MOST_CALLERS = 64
# Calls that may wait at a port, as they do while no hub is there, or when its process is busy.
QUEUE_LENGTH = 128
LOCAL_QUEUE_LENGTH = 4096
# How often the doorkeeper forgets those whose time is over.
LOOK_SECONDS = 0.1

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
# Of linux/filter.h: a program of one instruction, "return 0", lets no packet in. Connections that are there have none.
_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27


def listen(host: str) -> socket.socket:
    """Open a free port of this host for `open_door`, in this process or in one that inherits it."""
    host = "0.0.0.0" if host == "*" else host  # as ipyparallel takes it
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(QUEUE_LENGTH)
    listener.setblocking(False)
    return listener


def listen_locally() -> socket.socket:
    """Open a local socket of a name that nobody can guess, and that leaves no file behind."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0hub-{secrets.token_hex(16)}")
    listener.listen(LOCAL_QUEUE_LENGTH)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return a listener's URL, as ZeroMQ writes it."""
    if listener.family == socket.AF_UNIX:
        return f"ipc://@{listener.getsockname()[1:].decode()}"
    host, port = listener.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_near(url: str) -> bool:
    """Return whether a local socket is on this host, and of this user."""
    if not HAS_LOCAL_SOCKETS or not url:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"\0{url.removeprefix('ipc://@')}")
        except BlockingIOError:  # it is there, and many call
            return True
        except OSError:
            return False
        return not is_foreign(probe)


def open_door(router: zmq.Socket[Any], listener: socket.socket) -> None:
    """Let a ROUTER answer who calls at a socket, which stays when the ROUTER is gone; once it is set up otherwise."""
    if listener.family == socket.AF_UNIX:
        for user in {os.geteuid(), ROOT}:
            router.setsockopt(zmq.IPC_FILTER_UID, user)
    router.setsockopt(zmq.HANDSHAKE_IVL, round(1000 * HANDSHAKE_SECONDS))
    router.setsockopt(zmq.USE_FD, os.dup(listener.fileno()))  # ZeroMQ closes what it is given
    router.bind(url_of(listener))
    router.setsockopt(zmq.USE_FD, -1)


class Turnstile:
    """The count of callers at a port that have neither been let in nor been sent away.

    Args:
        block: called to drop new calls, or to accept them again.
        clock: in seconds.
    """

    def __init__(self, block: Callable[[bool], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._block = block
        self._clock = clock
        self._callers: dict[int, float] = {}  # file numbers, and when they called; the oldest first
        self.is_blocked = False

    @property
    def has_callers(self) -> bool:
        """True while a caller may still be sent away."""
        return bool(self._callers)

    def call(self, file: int) -> None:
        """Count a caller."""
        self._callers.pop(file, None)
        self._callers[file] = self._clock()
        self.expire()

    def come_in(self) -> None:
        """Count one caller less, who has proved to have a key; ZeroMQ does not say who, and one is like the other."""
        if self._callers:
            del self._callers[next(iter(self._callers))]
        self.expire()

    def leave(self, file: int) -> None:
        """Forget a caller whose connection has ended."""
        self._callers.pop(file, None)
        self.expire()

    def expire(self) -> None:
        """Forget those whose time is over: they are sent away by ZeroMQ."""
        limit = self._clock() - HANDSHAKE_SECONDS
        for file in [file for file, called in self._callers.items() if called < limit]:
            del self._callers[file]
        most = MOST_CALLERS // 2 if self.is_blocked else MOST_CALLERS  # not open and shut for each of them
        wanted = len(self._callers) >= most
        if wanted != self.is_blocked:
            self.is_blocked = wanted
            self._block(wanted)


class PortWatcher(threading.Thread):
    """Watches the ports of ROUTERs; a thread of its own, so that it does so while the hub computes.

    Args:
        doors: the ROUTERs, and their ports.
    """

    def __init__(self, doors: Mapping[zmq.Socket[Any], socket.socket]) -> None:
        super().__init__(name="dnb-doorkeeper", daemon=True)
        self._routers = list(doors)
        self._turnstiles: dict[zmq.Socket[Any], Turnstile] = {}
        for router, listener in doors.items():
            block = _blocker(listener)
            block(False)  # a hub that died may have left it so
            self._turnstiles[_watch(router)] = Turnstile(block)

    def run(self) -> None:
        """Count until all ROUTERs are let go."""
        poller = zmq.Poller()
        for events in self._turnstiles:
            poller.register(events, zmq.POLLIN)
        watched = dict(self._turnstiles)
        while watched:
            is_idle = not any(turnstile.has_callers for turnstile in watched.values())
            for events, _ in poller.poll(None if is_idle else round(1000 * LOOK_SECONDS)):
                if not _count_events(events, watched[events]):
                    poller.unregister(events)
                    watched.pop(events).expire()
                    events.close(linger=0)
            for turnstile in watched.values():
                turnstile.expire()

    def stop(self) -> None:
        """Let go of the ROUTERs; before they are closed, by the thread that they belong to."""
        for router in self._routers:
            router.monitor(None, 0)
        self.join()


def _watch(router: zmq.Socket[Any]) -> zmq.Socket[Any]:
    """Open the monitor socket of a ROUTER. It never waits until that is read: its thread carries all messages."""
    url = f"inproc://doorkeeper-{secrets.token_hex(8)}"
    router.monitor(url, _EVENTS)
    events: zmq.Socket[Any] = router.context.socket(zmq.PAIR)
    events.set_hwm(0)
    events.connect(url)
    return events


def _count_events(events: zmq.Socket[Any], turnstile: Turnstile) -> bool:
    """Count what is new; False at the end."""
    while events.poll(0):
        message = recv_monitor_message(events)
        if message["event"] == zmq.EVENT_MONITOR_STOPPED:
            return False
        if not message["endpoint"].startswith(b"tcp:"):
            continue
        match message["event"]:
            case zmq.EVENT_ACCEPTED:
                turnstile.call(message["value"])
            case zmq.EVENT_DISCONNECTED:
                turnstile.leave(message["value"])
            case _:
                turnstile.come_in()
    return True


def _blocker(listener: socket.socket) -> Callable[[bool], None]:
    """Return a function that drops new calls at a port, where the system can."""

    def block(wanted: bool) -> None:
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError):
            if not wanted:
                listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
                return
            program = ctypes.create_string_buffer(_RETURN_NOTHING)
            address = struct.pack("HL", 1, ctypes.addressof(program))
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, address)

    return block
