"""The engine's heartbeat: by it the hub tells an engine that computes for long from one that hangs."""

from __future__ import annotations

import contextlib
import threading

import zmq

from dnb.records import Address, Beat, EngineFacts
from dnb.transport.channels import connect_dealer, encode

# The hub calls an engine silent after five times that.
BEAT_SECONDS = 0.1


class Heart(threading.Thread):
    """Beats until it is stopped, over a socket of its own, as the worker's belongs to another thread.

    Args:
        facts: of this engine.
        address: of the hub.
    """

    def __init__(self, facts: EngineFacts, *, address: Address) -> None:
        super().__init__(name="dnb-heart", daemon=True)
        self._address = address
        self._identity = b"heart-%d" % facts.engine
        self._parts = encode(Beat(engine=facts.engine, process=facts.process))
        self._stopped = threading.Event()

    def run(self) -> None:
        """Beat."""
        context = zmq.Context()
        dealer = connect_dealer(context, self._address, identity=self._identity)
        try:
            while not self._stopped.wait(BEAT_SECONDS):
                with contextlib.suppress(zmq.Again):  # the hub does not read: it will see that we wait
                    dealer.send_multipart(self._parts, zmq.DONTWAIT)
        finally:
            dealer.close(linger=0)
            context.term()

    def stop(self) -> None:
        """Beat no more."""
        self._stopped.set()
        self.join()
