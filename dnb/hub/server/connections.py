"""The hub's ends of the wires: who may connect, and whose wire is whose."""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from dnb.protocol.engine_messages import Attach, EngineMessage, WireOffer
from dnb.protocol.run import TransportKind
from dnb.transport.sockets.sealing import derive_keys
from dnb.transport.sockets.wire_connections import WIRES_VARIABLE, WireListener, prove
from dnb.transport.sockets.wires import MAX_RECORD_BYTES, Wire, WireError

log = logging.getLogger(__name__)

# How long a caller may take to say who it is.
GREETING_SECONDS = 5.0
# How many callers may be about to say it.
MOST_CALLERS = 64
# How many calls are answered in one turn of the hub's loop, and between two of its ticks: while no engine is expected,
# and while one is. What strangers call beyond that waits in the queue, and takes no time from the run.
TURN_CALLS = 32
QUIET_CALLS = 100
BUSY_CALLS = 1000
# What an engine has to draw by lot for a wire that is sealed.
NONCE_LETTERS = 32

_decode_greeting = msgspec.msgpack.Decoder(Attach).decode


@dataclass(slots=True)
class EngineConnection:
    """A wire, and what the hub knows of it."""

    wire: Wire
    nonce: str
    opened: float  # on the monotonic clock
    is_tcp: bool = False
    engine: int | None = None  # None until it has proved which one it is
    is_retired: bool = False  # its engine was asked to connect anew: that it closes is no death
    is_watched: bool = False  # whether the poller tells when it can be written to


class Connections:
    """Listens for engines, and keeps their wires by file number.

    Args:
        host: the interface to bind.
    """

    def __init__(self, host: str) -> None:
        self._listener = WireListener(host)
        self.listeners = {sock.fileno(): sock for sock in self._listener.sockets}
        self.lines: dict[int, EngineConnection] = {}
        self.num_calls_left = QUIET_CALLS
        self._spare_file: int | None = None  # closed for a moment when a call comes and no other file is left
        self._keep_spare_file()
        self._tokens: dict[int, str] = {}
        self._sealed: set[int] = set()  # engines whose wires are sealed if they come by TCP
        self._is_exposed = not _is_loopback(host)
        self._num_records: dict[int, int] = {}  # sent by wires that are closed

    def withdraw(self, engine: int) -> None:
        """Expect an engine no more: it is gone."""
        self._tokens.pop(engine, None)

    def offer(self, engine: int, kind: TransportKind, *, is_near: bool = True) -> WireOffer:
        """Let an engine connect, once; an earlier offer to it is void.

        Args:
            engine: its id.
            kind: what the wire is for.
            is_near: whether the engine is on this host, where a Unix socket is twice as fast as TCP.
        """
        token = self._tokens[engine] = secrets.token_hex(32)
        for line in self.lines.values():
            line.is_retired = line.is_retired or line.engine == engine
        wanted = os.environ.get(WIRES_VARIABLE)
        sealed = self._is_exposed or not is_near or wanted == "sealed"
        self._sealed = self._sealed | {engine} if sealed else self._sealed - {engine}
        local, tcp = self._listener.local_url, self._listener.tcp_url
        if kind == "memory":
            return WireOffer(url=local, token=token, sealed=sealed)
        if is_near and wanted not in ("tcp", "sealed"):
            return WireOffer(url=local, other_url=tcp, token=token, sealed=sealed)
        return WireOffer(url=tcp, token=token, sealed=sealed)

    def refill(self) -> None:
        """Answer calls again, as another tick has begun."""
        self._keep_spare_file()
        self.num_calls_left = BUSY_CALLS if self._tokens else QUIET_CALLS

    def accept_some(self, listening: int) -> Iterator[int]:
        """Take the next callers of a listener; yield the file numbers of those who may say who they are."""
        for _ in range(min(TURN_CALLS, self.num_calls_left)):
            self.num_calls_left -= 1
            try:
                yield self.accept(listening)
            except BlockingIOError:  # nobody calls any more
                return
            except OSError as error:
                log.warning("a caller of a wire was sent away: %s", error)

    def accept(self, listening: int) -> int:
        """Take a connection; return its file number.

        Raises:
            OSError: it is gone already, or a process of another user; BlockingIOError if nobody calls.
        """
        listener = self.listeners[listening]
        try:
            wire, nonce = self._listener.accept(listener)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._send_away(listener)
            raise
        self.lines[wire.fileno()] = EngineConnection(
            wire, nonce, time.monotonic(), is_tcp=listener.family != socket.AF_UNIX
        )
        return wire.fileno()

    def _send_away(self, listening: socket.socket) -> None:
        """Close a call for which there is no file, else the listener would be ready for ever."""
        self._drop_spare_file()
        with contextlib.suppress(OSError):
            listening.accept()[0].close()
        self._keep_spare_file()

    def _keep_spare_file(self) -> None:
        if self._spare_file is None:
            with contextlib.suppress(OSError):  # another thread has taken it: next time, then
                self._spare_file = os.open(os.devnull, os.O_RDONLY)

    def _drop_spare_file(self) -> None:
        if self._spare_file is not None:
            os.close(self._spare_file)
            self._spare_file = None

    def surplus(self) -> list[int]:
        """Callers who must go as there are too many: any of them, so that nobody can keep an engine out for long.

        Those of the Unix socket, who are this user's, make no room for those who come by TCP and may be anybody's.
        """
        gone: list[int] = []
        for is_tcp in (False, True):
            callers = [place for place, line in self.lines.items() if line.engine is None and line.is_tcp == is_tcp]
            gone += random.sample(callers, max(len(callers) - MOST_CALLERS, 0))
        return gone

    def hear(self, line: EngineConnection, packed: memoryview) -> int:
        """Read a caller's first message; return the engine that it leads to.

        Raises:
            WireError: it is no greeting, or not of the engine that it says it is.
        """
        try:
            message = _decode_greeting(packed)
        except Exception as error:  # whatever a stranger can bring the decoder to
            raise WireError(f"a stranger called, whose greeting is none: {type(error).__name__}") from error
        return self.greet(line, message)

    def greet(self, line: EngineConnection, message: EngineMessage) -> int:
        """Check the first record of a wire; return the engine that it leads to.

        Raises:
            WireError: it is not the engine that it says it is.
        """
        token = self._tokens.get(message.engine, "") if isinstance(message, Attach) else ""
        if not isinstance(message, Attach) or not token:
            raise WireError("a stranger called")
        if not hmac.compare_digest(message.proof.encode(), prove(token, line.nonce).encode()):
            raise WireError(f"a stranger called as engine {message.engine}")
        if line.is_tcp and message.engine in self._sealed:
            if len(message.nonce) < NONCE_LETTERS:
                raise WireError(f"engine {message.engine} calls from another host and does not seal what it says")
            to_hub, to_engine = derive_keys(token, hub_nonce=line.nonce, engine_nonce=message.nonce)
            line.wire.seal(outgoing=to_engine, incoming=to_hub)
        line.wire.is_greeting = False
        del self._tokens[message.engine]
        line.engine = message.engine
        line.wire.trust(max_record_bytes=MAX_RECORD_BYTES)
        return message.engine

    def num_records_out(self) -> dict[int, int]:
        """Records sent to each engine so far, over all its wires."""
        counts = dict(self._num_records)
        for line in self.lines.values():
            if line.engine is not None:
                counts[line.engine] = counts.get(line.engine, 0) + line.wire.num_records_out
        return counts

    def silent(self) -> list[int]:
        """List those who called long ago and have not said who they are."""
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
        self._drop_spare_file()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
