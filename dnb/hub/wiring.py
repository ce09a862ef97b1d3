"""The hub's ends of the wires: who may connect, and whose wire is whose."""

from __future__ import annotations

import hmac
import os
import secrets
import time
from dataclasses import dataclass

from dnb.records import Attach, EngineMessage, TransportKind, WireOffer
from dnb.transport.wires import MAX_RECORD_BYTES, WIRES_VARIABLE, Wire, WireError, WireListener, prove

# How long a caller may take to say who it is.
GREETING_SECONDS = 10.0


@dataclass(slots=True)
class Line:
    """A wire, and what the hub knows of it."""

    wire: Wire
    nonce: str
    opened: float  # on the monotonic clock
    engine: int | None = None  # None until it has proved which one it is
    is_retired: bool = False  # its engine was asked to connect anew: that it closes is no death
    is_watched: bool = False  # whether the poller tells when it can be written to


class Wiring:
    """Listens for engines, and keeps their wires by file number.

    Args:
        host: the interface to bind.
    """

    def __init__(self, host: str) -> None:
        self._listener = WireListener(host)
        self.listeners = {sock.fileno(): sock for sock in self._listener.sockets}
        self.lines: dict[int, Line] = {}
        self._tokens: dict[int, str] = {}
        self._num_records: dict[int, int] = {}  # sent by wires that are closed

    def offer(self, engine: int, kind: TransportKind, *, is_near: bool = True) -> WireOffer:
        """Let an engine connect, once; an earlier offer to it is void.

        Args:
            engine: its id.
            kind: what the wire is for.
            is_near: whether the engine is on this host, where a Unix socket is twice as fast as TCP.
        """
        self._tokens[engine] = secrets.token_hex(32)
        for line in self.lines.values():
            line.is_retired = line.is_retired or line.engine == engine
        local, tcp = self._listener.local_url, self._listener.tcp_url
        if kind == "memory":
            return WireOffer(url=local, token=self._tokens[engine])
        if is_near and os.environ.get(WIRES_VARIABLE) != "tcp":
            return WireOffer(url=local, other_url=tcp, token=self._tokens[engine])
        return WireOffer(url=tcp, token=self._tokens[engine])

    def accept(self, listening: int) -> int:
        """Take a connection; its file number."""
        wire, nonce = self._listener.accept(self.listeners[listening])
        self.lines[wire.fileno()] = Line(wire, nonce, time.monotonic())
        return wire.fileno()

    def greet(self, line: Line, message: EngineMessage) -> int:
        """Check the first record of a wire; the engine that it leads to.

        Raises:
            WireError: it is not the engine that it says it is.
        """
        token = self._tokens.get(message.engine, "") if isinstance(message, Attach) else ""
        if not isinstance(message, Attach) or not token:
            raise WireError("a stranger called")
        if not hmac.compare_digest(message.proof.encode(), prove(token, line.nonce).encode()):
            raise WireError(f"a stranger called as engine {message.engine}")
        del self._tokens[message.engine]
        line.engine = message.engine
        line.wire.max_record_bytes = MAX_RECORD_BYTES
        return message.engine

    def num_records_out(self) -> dict[int, int]:
        """Records sent to each engine so far, over all its wires."""
        counts = dict(self._num_records)
        for line in self.lines.values():
            if line.engine is not None:
                counts[line.engine] = counts.get(line.engine, 0) + line.wire.num_records_out
        return counts

    def silent(self) -> list[int]:
        """Those who called long ago and have not said who they are."""
        limit = time.monotonic() - GREETING_SECONDS
        return [place for place, line in self.lines.items() if line.engine is None and line.opened < limit]

    def drop(self, place: int) -> None:
        """Forget a wire, and close it."""
        line = self.lines.pop(place)
        if line.engine is not None:
            self._num_records[line.engine] = self._num_records.get(line.engine, 0) + line.wire.num_records_out
        line.wire.close()

    def close(self) -> None:
        """Close everything."""
        for line in self.lines.values():
            line.wire.close()
        self.lines.clear()
        self._listener.close()
