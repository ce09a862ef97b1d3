"""Connections of wires: the hub's listener, and the call by which an engine proves that it is one of the pool."""

from __future__ import annotations

import errno
import hmac
import secrets
import socket
import sys
import time

import msgspec

from dnb.errors import HubError
from dnb.protocol.engine_messages import Attach, Challenge, WireOffer
from dnb.transport.sockets.credentials import is_foreign
from dnb.transport.sockets.sealing import derive_keys
from dnb.transport.sockets.wires import Wire, WireError

# Connections that wait to be looked at: so many that strangers do not fill the queue faster than they are sent away.
QUEUE_LENGTH = 4096
# How soon an engine calls again that the queue had no room for, or that made room for another caller.
CALL_SECONDS = 0.02
# Where the wires of engines without shared memory go, on the hub's own host: "tcp" keeps them from the Unix socket,
# "sealed" seals them besides, as if they left the host.
WIRES_VARIABLE = "DNB_WIRES"


class _HungUpError(WireError):
    """The hub has closed the connection before it said anything."""


class WireListener:
    """The listener for engines: a Unix socket on the hub's host where there is one, and TCP.

    Args:
        host: the interface to bind.
    """

    def __init__(self, host: str) -> None:
        self._tcp = socket.create_server((host, 0), backlog=QUEUE_LENGTH)
        self.tcp_url = f"tcp://{host}:{self._tcp.getsockname()[1]}"
        self.local_url = self.tcp_url
        self.sockets = [self._tcp]
        if sys.platform == "linux":
            # An abstract name leaves no file behind; whoever connects must know the token.
            name = f"dnb-{secrets.token_hex(8)}"
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.bind(f"\0{name}")
            local.listen(QUEUE_LENGTH)
            self.sockets.append(local)
            self.local_url = f"unix://{name}"
        for sock in self.sockets:
            sock.setblocking(False)

    def accept(self, listening: socket.socket) -> tuple[Wire, str]:
        """Accept a new wire that may send one greeting, and return it with the nonce of its challenge.

        Raises:
            BlockingIOError: nobody calls.
            PermissionError: the caller is a process of another user of this host; it is sent away.
            OSError: the caller is gone already, or there are too many files.
        """
        sock, _ = listening.accept()
        if is_foreign(sock):
            sock.close()
            raise PermissionError(errno.EACCES, "a process of another user called")
        wire = Wire(sock, is_trusted=False)
        wire.is_greeting = True
        nonce = secrets.token_hex(16)
        wire.send(Challenge(nonce=nonce))
        if wire.is_closed:
            raise ConnectionError("the caller is gone already")
        return wire, nonce

    def close(self) -> None:
        """Listen no more."""
        for sock in self.sockets:
            sock.close()


def connect_wire(offer: WireOffer, *, engine: int, timeout_seconds: float) -> Wire:
    """Connect to the hub and prove to be the engine that the offer was made to.

    Raises:
        HubError: it cannot be reached.
    """
    faults: list[str] = []
    deadline = time.monotonic() + timeout_seconds
    for url in filter(None, (offer.url, offer.other_url)):
        try:
            wire, nonce = _call(url, deadline=deadline, timeout_seconds=timeout_seconds)
        except (OSError, ValueError, WireError, msgspec.MsgspecError) as error:
            faults.append(f"{url}: {error}")
            continue
        is_sealed = offer.sealed and url.startswith("tcp://")
        own = secrets.token_hex(16) if is_sealed else ""
        wire.send(Attach(engine=engine, proof=prove(offer.token, nonce), nonce=own))
        if is_sealed:
            to_hub, to_engine = derive_keys(offer.token, hub_nonce=nonce, engine_nonce=own)
            wire.seal(outgoing=to_hub, incoming=to_engine)
        return wire
    raise HubError(f"engine {engine} cannot reach the hub at {'; '.join(faults)}")


def _call(url: str, *, deadline: float, timeout_seconds: float) -> tuple[Wire, str]:
    """Connect to the hub, and return the wire and its challenge; where many call, that may take several tries."""
    while True:
        try:
            return _call_once(url, timeout_seconds=timeout_seconds)
        except (BlockingIOError, _HungUpError):
            if time.monotonic() + CALL_SECONDS > deadline:
                raise
            time.sleep(CALL_SECONDS)


def _call_once(url: str, *, timeout_seconds: float) -> tuple[Wire, str]:
    kind, _, place = url.partition("://")
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_seconds)
        host, _, port = place.rpartition(":")
        sock.connect(f"\0{place}" if kind == "unix" else (host, int(port)))
        if is_foreign(sock):
            raise PermissionError(errno.EACCES, "a process of another user listens there")
        wire = Wire(sock)
        try:
            ((packed, _raw),) = wire.wait_for_messages(timeout_seconds=timeout_seconds)
        except WireError as error:
            if wire.is_closed:
                raise _HungUpError(str(error)) from error
            raise
        return wire, msgspec.msgpack.decode(packed, type=Challenge).nonce
    except BaseException:
        sock.close()
        raise


def prove(token: str, nonce: str) -> str:
    """Return the answer to a challenge (HMAC-SHA256, RFC 2104)."""
    return hmac.digest(token.encode(), nonce.encode(), "sha256").hex()
