"""A small process beside an engine whose hub is on another host: says that it works when it cannot beat itself.

It hears the engine's heart through its standard input, and ends with it. It imports no torch: 30 MB.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time

import msgspec
import zmq

from dnb.protocol.base import Record
from dnb.protocol.engine_messages import Heartbeat
from dnb.protocol.pool import Address, Process
from dnb.transport.sockets.channels import connect_dealer, encode
from dnb.transport.system.processes import activity_of, has_worked, name_process

# More than two beats; the hub waits for eight of these.
LOOK_SECONDS = 0.25


class Watched(Record, frozen=True):
    """Whom to watch, and whom to tell."""

    engine: int
    process: Process
    address: Address


def watch(watched: Watched, heartbeat_thread: int) -> None:
    """Look at the engine whenever nothing has come from its heart for a while; until that is closed, or it is gone."""
    poller = select.poll()
    poller.register(heartbeat_thread, select.POLLIN)
    context = zmq.Context()
    dealer = connect_dealer(context, watched.address, identity=b"watcher-%d" % watched.engine)
    beat = encode(Heartbeat(engine=watched.engine, process=watched.process, is_at_work=True))
    before, since = None, time.monotonic()
    try:
        while True:
            if poller.poll(LOOK_SECONDS * 1000):
                if not os.read(heartbeat_thread, select.PIPE_BUF):
                    return
                before = None
                continue
            now, activity = time.monotonic(), activity_of(watched.process)
            if activity is None:
                return
            if before is not None and has_worked(before, activity, seconds=now - since):
                with contextlib.suppress(zmq.Again):  # the hub does not read
                    dealer.send_multipart(beat, zmq.DONTWAIT)
            before, since = activity, now
    finally:
        dealer.close(linger=0)
        context.term()


def main() -> None:
    """Run the watcher."""
    name_process("dnb-watcher")
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as heartbeat_thread:
        watched = msgspec.json.decode(heartbeat_thread.readline(), type=Watched)
    watch(watched, sys.stdin.fileno())


if __name__ == "__main__":
    main()
