"""The engine's heartbeat: by it the hub tells an engine that computes for long from one that hangs.

A call that holds the interpreter's lock stops this thread, too. The hub looks at the processes of its own host; on
another host a watcher does, a small process that gets the heartbeats first, and sends its own when they stop.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

import msgspec
import zmq

from dnb.engine.process.heartbeat_watcher import Watched
from dnb.protocol.engine_messages import Heartbeat
from dnb.protocol.pool import Address, EngineFacts
from dnb.transport.sockets.channels import connect_dealer, encode

# The hub calls an engine silent after five times that.
HEARTBEAT_SECONDS = 0.1
# How long a watcher may take to see that it is needed no more.
WATCHER_EXIT_SECONDS = 5.0


class HeartbeatThread(threading.Thread):
    """Sends heartbeats until it is stopped, over a socket of its own, as the worker's belongs to another thread.

    Args:
        facts: of this engine.
        address: of the hub.
        is_far: the hub is on another host.
    """

    def __init__(self, facts: EngineFacts, *, address: Address, is_far: bool = False) -> None:
        super().__init__(name="dnb-heartbeat", daemon=True)
        self._address = address
        self._identity = b"heartbeat-%d" % facts.engine
        self._parts = encode(Heartbeat(engine=facts.engine, process=facts.process))
        self._watched = Watched(engine=facts.engine, process=facts.process, address=address) if is_far else None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Send heartbeats until stopped."""
        watcher = None if self._watched is None else _start_watcher(self._watched)
        context = zmq.Context()
        dealer = connect_dealer(context, self._address, identity=self._identity)
        try:
            while not self._stopped.wait(HEARTBEAT_SECONDS):
                with contextlib.suppress(zmq.Again):  # the hub does not read: it will see that we wait
                    dealer.send_multipart(self._parts, zmq.DONTWAIT)
                if watcher is not None and watcher.stdin is not None:
                    with contextlib.suppress(OSError):  # it does not read, or has ended: nobody speaks for us then
                        os.write(watcher.stdin.fileno(), b".")
        finally:
            if watcher is not None:
                _end_watcher(watcher)
            dealer.close(linger=0)
            context.term()

    def stop(self) -> None:
        """Stop the heartbeats."""
        self._stopped.set()
        self.join()


def _start_watcher(watched: Watched) -> subprocess.Popen[bytes]:
    """Start the watcher's process, which reads its facts from standard input, as keys are among them."""
    watcher = subprocess.Popen([sys.executable, "-m", "dnb.engine.process.heartbeat_watcher"], stdin=subprocess.PIPE)
    assert watcher.stdin is not None
    watcher.stdin.write(msgspec.json.encode(watched) + b"\n")
    watcher.stdin.flush()
    os.set_blocking(watcher.stdin.fileno(), False)
    return watcher


def _end_watcher(watcher: subprocess.Popen[bytes]) -> None:
    assert watcher.stdin is not None
    watcher.stdin.close()
    try:
        watcher.wait(WATCHER_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        watcher.kill()
        watcher.wait()
