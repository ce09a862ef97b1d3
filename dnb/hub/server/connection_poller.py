"""The serving of wires in the hub's loop: they are accepted, read, written to when they can be, and closed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import zmq

from dnb.hub.message_checks import PeerError, decode_peer
from dnb.hub.server.connections import Connections, EngineConnection
from dnb.hub.server.members.engine_lifecycle import decode_engine
from dnb.protocol.engine_messages import EngineMessage
from dnb.transport.sockets.wires import Wire, WireError

log = logging.getLogger(__name__)


class ConnectionPoller:
    """Polls all sockets of the hub, and serves those that are wires.

    Args:
        wire_connections: the wires.
        attach: told of a wire whose engine has proved which one it is.
        take: told of the messages of such engines.
        lose: told of an engine whose wire has closed, and why if the hub has closed it.
    """

    def __init__(
        self,
        wire_connections: Connections,
        *,
        attach: Callable[[int, Wire], None],
        take: Callable[[int, EngineMessage, memoryview], None],
        lose: Callable[[int, str], None],
    ) -> None:
        self.poller = zmq.Poller()
        self._wire_connections = wire_connections
        self._take_wire = attach
        self._take_message = take
        self._lose = lose
        self._is_listening = False

    def serve(self, ready: Iterable[Any]) -> None:
        """Serve the wires among the sockets that can be read or written."""
        for place in ready:
            if not isinstance(place, int):
                continue
            if place in self._wire_connections.listeners:
                self._answer_calls(place)
            elif (line := self._wire_connections.lines.get(place)) is not None:
                self._serve_connection(place, line)

    def tick(self) -> None:
        """Answer calls again, and drop callers that have not said in time which engine they are."""
        self._wire_connections.refill()
        self.listen(True)
        for place in self._wire_connections.silent():
            self._drop_connection(place, self._wire_connections.lines[place])

    def listen(self, wanted: bool) -> None:
        """Let calls wake the loop, or not."""
        if wanted == self._is_listening:
            return
        self._is_listening = wanted
        for place in self._wire_connections.listeners:
            if wanted:
                self.poller.register(place, zmq.POLLIN)
            else:
                self.poller.unregister(place)

    def watch_writers(self) -> None:
        """Let the loop wake when a wire can be written to that has more to send."""
        for place, line in list(self._wire_connections.lines.items()):
            if line.wire.is_closed:
                self._drop_connection(place, line)
                continue
            wants = line.wire.wants_to_write
            if wants != line.is_watched:
                line.is_watched = wants
                self.poller.modify(place, zmq.POLLIN | zmq.POLLOUT if wants else zmq.POLLIN)

    def _answer_calls(self, listening: int) -> None:
        for caller in self._wire_connections.accept_some(listening):
            self.poller.register(caller, zmq.POLLIN)
            for place in self._wire_connections.surplus():
                self._drop_connection(place, self._wire_connections.lines[place])
        if not self._wire_connections.num_calls_left:  # until the next tick; else they would wake the loop all the time
            self.listen(False)

    def _serve_connection(self, place: int, line: EngineConnection) -> None:
        line.wire.flush()
        reason = ""
        try:
            messages = line.wire.receive()
            for packed, raw in messages:
                if line.engine is None:
                    self._attach(line, packed)
                    messages += line.wire.receive()  # what came behind the greeting
                else:
                    self._take_message(line.engine, decode_peer(decode_engine, packed), raw)
        except (WireError, PeerError) as error:  # whoever says this is cut off, and may call again
            log.warning("a wire of engine %s is closed: %s", line.engine, error)
            reason = f"was cut off: {error}"
            line.wire.close()
        if line.wire.is_closed:
            self._drop_connection(place, line, reason=reason)

    def _attach(self, line: EngineConnection, packed: memoryview) -> None:
        engine = self._wire_connections.hear(line, packed)
        for place, old in list(self._wire_connections.lines.items()):
            if old is not line and old.engine == engine:
                self.poller.unregister(place)
                self._wire_connections.drop(place)
        self._take_wire(engine, line.wire)

    def _drop_connection(self, place: int, line: EngineConnection, *, reason: str = "") -> None:
        """Close a connection: that one has closed is how a death is seen first."""
        self.poller.unregister(place)
        self._wire_connections.drop(place)
        if line.engine is not None and not line.is_retired:
            self._lose(line.engine, reason)
