"""A small process beside an engine whose hub is on another host: reports that it works when it cannot send heartbeats.

It reads the engine's heartbeats from its standard input, and ends with that. It imports no torch: 30 MB.
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

# More than two heartbeats; the hub waits for eight of these.
CHECK_SECONDS = 0.25


class Watched(Record, frozen=True):
    """The engine to watch, and the hub to report to."""

    engine: int
    process: Process
    address: Address


def watch(watched: Watched, heartbeats: int) -> None:
    """Check the engine whenever no heartbeat has come for a while; until their pipe is closed, or it is gone.

    Args:
        watched: the engine, and the address of its hub.
        heartbeats: descriptor of the pipe from which they are read.
    """
    poller = select.poll()
    poller.register(heartbeats, select.POLLIN)
    context = zmq.Context()
    dealer = connect_dealer(context, watched.address, identity=b"watcher-%d" % watched.engine)
    heartbeat = encode(Heartbeat(engine=watched.engine, process=watched.process, is_at_work=True))
    before, since = None, time.monotonic()
    try:
        while True:
            if poller.poll(CHECK_SECONDS * 1000):
                if not os.read(heartbeats, select.PIPE_BUF):
                    return
                before = None
                continue
            now, activity = time.monotonic(), activity_of(watched.process)
            if activity is None:
                return
            if before is not None and has_worked(before, activity, seconds=now - since):
                with contextlib.suppress(zmq.Again):  # the hub does not read
                    dealer.send_multipart(heartbeat, zmq.DONTWAIT)
            before, since = activity, now
    finally:
        dealer.close(linger=0)
        context.term()


def main() -> None:
    """Run the watcher."""
    name_process("dnb-watcher")
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as heartbeats:
        watched = msgspec.json.decode(heartbeats.readline(), type=Watched)
    watch(watched, sys.stdin.fileno())


if __name__ == "__main__":
    main()
