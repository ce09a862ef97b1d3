"""Calls to hubs that only ask whether one answers, and lets this process in."""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from dnb.protocol.pool import Address
from dnb.transport.sockets.channels import ANSWERS, _connect


def find_answering(addresses: Sequence[Address], *, limit_seconds: float) -> list[bool]:
    """Return, for each address, whether a hub with the expected keys answers there within the limit."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        calls = [_AdmissionCall(context, address) for address in addresses]
        deadline = time.monotonic() + limit_seconds
        while (waiting := [call for call in calls if call.is_answered is None]) and time.monotonic() < deadline:
            poller = zmq.Poller()
            for call in waiting:
                poller.register(call.monitor, zmq.POLLIN)
            poller.poll(1 + round(1000 * max(deadline - time.monotonic(), 0.0)))
            for call in waiting:
                call.poll()
        return [call.is_answered is True for call in calls]
    finally:
        context.destroy(linger=0)


class _AdmissionCall:
    """A peer that only wants to know whether it is let in."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: Address) -> None:
        self.is_answered: bool | None = None  # not known yet
        self._is_connected = False
        self._dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.monitor = self._dealer.get_monitor_socket(ANSWERS)
        try:
            _connect(self._dealer, address)
        except (zmq.ZMQError, ValueError):  # it is no address
            self.is_answered = False

    def poll(self) -> None:
        """Take what the socket tells of its connection."""
        while self.is_answered is None and self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_CONNECTED:
                self._is_connected = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_answered = True
            elif event != zmq.EVENT_CONNECT_RETRIED or not self._is_connected:
                # Refused: the supervisor keeps the port open as long as it lives. But a hub may have died meanwhile.
                self.is_answered = False
