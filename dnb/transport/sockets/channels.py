"""Framed sockets: one msgpack record, then raw frames; CurveZMQ with a key pair per role."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from dnb.errors import ArgumentError, DnbError, HubError
from dnb.protocol.base import Message
from dnb.protocol.client_messages import GetMembers, Members, Repeatable, Submit
from dnb.protocol.pool import Address
from dnb.protocol.versions import explain_unreadable, name_this_dnb
from dnb.transport.encoding import encode_exactly, encode_record
from dnb.transport.sockets.listeners import is_near, open_door
from dnb.transport.sockets.listeners import listen as listen
from dnb.transport.sockets.listeners import url_of as url_of

T = TypeVar("T")

SERVER_ROLE = "server"
ENGINE_ROLE = "engine"
CLIENT_ROLE = "client"


def local(role: str) -> str:
    """Return the name under which the socket for this host's peers of a role is kept, beside the role's port."""
    return f"{role} local"


# Messages of one peer that may wait in the hub's memory; the others wait in the peer's.
MOST_UNREAD = 100

# How soon a hub that was started again is found.
RECONNECT_MILLISECONDS = 20
# How often a client that waits for an answer looks whether the hub still lives.
LOOK_SECONDS = 0.25
# So often a request is asked again of hubs that die while they are asked: it may be what they die of, most likely one
# that runs user code for the first time.
MOST_BREAKS, MOST_BREAKS_OF_SUBMIT = 10, 1
# How long the next hub may take to say why the one before has died.
REASON_SECONDS = 2.0
# How long a send may block. It never does while there is a connection, or one is tried for: nothing limits what queues.
SEND_SECONDS = 1.0
# Of what a stranger may call a request.
KIND_LENGTH = 60
# What tells whether a hub is at an address.
ANSWERS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def encode(record: Message, frames: Sequence[Any] = ()) -> list[Any]:
    """Encode the parts of one message."""
    return [encode_record(record), *frames]


class RoleKeys:
    """The server's key pair and one pair per role, made anew for every pool; kept in memory.

    Args:
        pairs: those of another process of the pool; None makes new ones.
    """

    def __init__(self, pairs: dict[str, tuple[bytes, bytes]] | None = None) -> None:
        self.pairs = pairs or {role: zmq.curve_keypair() for role in (SERVER_ROLE, ENGINE_ROLE, CLIENT_ROLE)}
        self.server_public, self.server_secret = self.pairs[SERVER_ROLE]
        self.roles = {role: self.pairs[role] for role in (ENGINE_ROLE, CLIENT_ROLE)}

    def address(self, role: str, url: str, *, local: str = "") -> Address:
        """Return the address and keys with which a peer of this role connects."""
        public, secret = self.roles[role]
        return Address(
            url=url,
            local=local,
            server_public=self.server_public.decode(),
            public=public.decode(),
            secret=secret.decode(),
        )


class _RoleCheck:
    """Lets in only the one key that belongs to a socket's role."""

    def __init__(self, keys: RoleKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        public, _ = self._keys.roles[domain]
        return key == public  # Z85 text, as the keys are


def start_authenticator(context: zmq.Context[Any], keys: RoleKeys) -> ThreadAuthenticator:
    """Answer CurveZMQ's question who may connect; stop it with `.stop()`."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    for role in keys.roles:
        authenticator.configure_curve_callback(domain=role, credentials_provider=_RoleCheck(keys))
    return authenticator


def bind_router(
    context: zmq.Context[Any], keys: RoleKeys, *, role: str, listener: socket.socket, local: socket.socket | None = None
) -> zmq.Socket[bytes]:
    """Bind a ROUTER that only peers of `role` may enter; its listener stays open when the ROUTER is gone.

    Args:
        context: of the process.
        keys: of the pool.
        role: of the peers.
        listener: a port.
        local: a socket for this host.
    """
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.linger = 0
    router.set_hwm(0)
    router.setsockopt(zmq.RCVHWM, MOST_UNREAD)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.curve_server = True
    router.curve_secretkey = keys.server_secret
    router.curve_publickey = keys.server_public
    router.zap_domain = role.encode()
    for door in filter(None, (listener, local)):
        open_door(router, door)
    return router


def connect_dealer(context: zmq.Context[Any], address: Address, *, identity: bytes | None = None) -> zmq.Socket[bytes]:
    """Connect a DEALER to the hub; its sends raise zmq.Again when ZeroMQ has given the connection up for good.

    So it does after a handshake that failed: the keys are wrong, or whoever listens there is no hub.
    """
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    dealer.linger = 1000
    dealer.reconnect_ivl = RECONNECT_MILLISECONDS
    dealer.set_hwm(0)
    dealer.sndtimeo = int(1000 * SEND_SECONDS)
    if identity is not None:
        dealer.setsockopt(zmq.IDENTITY, identity)
    _connect(dealer, address)
    return dealer


def _connect(dealer: zmq.Socket[bytes], address: Address) -> None:
    dealer.curve_serverkey = address.server_public.encode()
    dealer.curve_publickey = address.public.encode()
    dealer.curve_secretkey = address.secret.encode()
    dealer.connect(address.local if is_near(address.local) else address.url)


class HubRestartedError(HubError):
    """The hub died while it was asked something, and another one has taken its place."""


class HubClient:
    """Asks the hub and waits for its answer; may be shared by threads.

    A hub that dies is started again and finds this client's name in what the one before has left. What it was asked
    meanwhile is asked again if that does no harm.

    Args:
        address: the hub's client address.
        is_alive: whether there will be an answer; asked while waiting, so that the end of a pool is told at once.
        timeout_seconds: how long an answer may take.
        hub: which dnb it is, for errors.
    """

    def __init__(
        self,
        address: Address,
        *,
        is_alive: Callable[[], bool] = lambda: True,
        timeout_seconds: float = 30.0,
        hub: str = "another version of dnb",
    ) -> None:
        self._is_alive = is_alive
        self._hub = hub
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._address = address
        self._identity = f"client-{secrets.token_hex(8)}".encode()
        self._context = zmq.Context()
        self._connect()
        self._count = 0

    def _connect(self) -> None:
        self._socket = connect_dealer(self._context, self._address, identity=self._identity)
        self._breaks = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._breaks, zmq.POLLIN)

    def _disconnect(self) -> None:
        self._socket.disable_monitor()
        self._breaks.close(linger=0)
        self._socket.close(linger=0)

    def _send(self, parts: list[Any]) -> None:
        for _ in range(2):
            try:
                self._socket.send_multipart(parts, zmq.DONTWAIT, copy=False)
            except zmq.Again:  # given up for good: only another socket may find a hub there again
                self._disconnect()
                self._connect()
            else:
                return
        raise HubError(
            f"the hub cannot be asked: whoever answers at {self._address.url} is no hub, or has other keys; "
            "%dtrain status looks again, %dtrain start opens a new pool"
        )

    @property
    def is_alive(self) -> bool:
        """True while an answer may still come."""
        return self._is_alive()

    def ask(
        self,
        request: Message,
        expect: type[T],
        *,
        frames: Sequence[Any] = (),
        timeout_seconds: float | None = None,
    ) -> tuple[T, list[bytes]]:
        """Send one request and return the decoded reply and its raw frames.

        Raises:
            DnbError: the hub refused; of the class that the hub named.
            ArgumentError: the request holds text that is none.
            HubError: no answer in time, or none because the hub died and may have done what was asked; or one that
                this version of dnb cannot read.
        """
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            packed = encode_exactly(request)
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"{error.object!a} is no text: a lone surrogate such as {error.object[error.start]!a} is no character, "
                "and comes of a file name in another encoding: rename it, or give another"
            ) from error
        with self._lock:
            if self._socket.closed:
                raise HubError("the connection to the hub is closed: %dtrain start opens a new pool")
            self._count += 1
            number = str(self._count).encode()
            self._take_break()  # of the time when nobody asked
            parts = [number, packed, *frames]
            self._send(parts)
            reply = self._receive(number, limit, request=request, parts=parts)
        try:
            return decode_reply(reply[0], expect), reply[1:]
        except (msgspec.MsgspecError, ValueError) as error:
            if isinstance(error, DnbError):
                raise
            raise HubError(
                f"the hub is {self._hub}, and this kernel, {name_this_dnb()}, cannot read its answer to "
                f"{type(request).__name__} ({explain_unreadable(error)}): use one version of dnb for both"
            ) from error

    def _why(self) -> str:
        """Ask why the hub was started again, for an error; empty if it does not say."""
        self._count += 1
        number, request = str(self._count).encode(), GetMembers()
        parts = [number, *encode(request)]
        self._send(parts)
        try:
            reply = self._receive(number, REASON_SECONDS, request=request, parts=parts)
            reason = decode_reply(reply[0], Members).last_restart
        except (DnbError, msgspec.MsgspecError):
            return ""
        return f" ({reason})" if reason else ""

    def _receive(self, number: bytes, limit: float, *, request: Message, parts: list[Any]) -> list[bytes]:
        name = type(request).__name__
        deadline = time.monotonic() + limit
        num_breaks = 0
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(int(1000 * min(left, LOOK_SECONDS)) + 1))
            if self._socket in ready:
                got, *reply = self._socket.recv_multipart()
                if got == number:  # an older number answers a request that was given up
                    return reply
            elif self._take_break():
                num_breaks += 1
                if not isinstance(request, Repeatable):
                    raise HubRestartedError(
                        f"the hub died and was started again while it was asked to {name}{self._why()}: look whether "
                        "that was done, and ask again"
                    )
                if num_breaks > (MOST_BREAKS_OF_SUBMIT if isinstance(request, Submit) else MOST_BREAKS):
                    raise HubRestartedError(
                        f"the hub died {num_breaks} times while it was asked to {name}{self._why()}"
                    )
                self._send(parts)
            elif not ready and not self._is_alive():
                raise HubError("the hub has died: %dtrain shutdown clears up, %dtrain start opens a new pool")
        raise HubError(
            f"the hub did not answer {name} within {limit:g} s: it is busy or dead; "
            "%dtrain status looks again, %dtrain shutdown ends the pool"
        )

    def _take_break(self) -> bool:
        """Return whether the connection has broken since the last call."""
        has_broken = False
        while self._breaks.poll(0):
            self._breaks.recv_multipart()
            has_broken = True
        return has_broken

    def close(self) -> None:
        """Close the socket; safe to call twice."""
        with self._lock:
            if not self._socket.closed:
                self._disconnect()
                self._context.term()


def decode_reply(data: bytes, expect: type[T]) -> T:
    """Decode a reply, or raise what the hub refused with."""
    from dnb import errors
    from dnb.protocol.client_messages import Refused

    answer = msgspec.msgpack.decode(data, type=Refused | expect)
    if isinstance(answer, Refused):
        if answer.error == errors.RunError.__name__:
            raise errors.RunError(answer.message, remote_traceback=answer.traceback)
        kind = getattr(errors, answer.error, HubError)
        raise kind(answer.message)
    return answer  # type: ignore[no-any-return]


class _Kind(msgspec.Struct):
    """The class of a message, of whatever version."""

    type: str = ""


def refuse_unreadable(header: bytes, error: BaseException, *, kernel: str) -> HubError:
    """Say why a request is refused that cannot be decoded.

    Args:
        header: the request.
        error: of the decoder.
        kernel: which dnb sent it, as far as is known.
    """
    try:
        kind = msgspec.msgpack.decode(header, type=_Kind).type
    except (msgspec.MsgspecError, ValueError, RecursionError):
        kind = ""
    kind = repr(kind[:KIND_LENGTH]) if kind else "that came"
    return HubError(
        f"the hub is {name_this_dnb()}, and cannot read the request {kind} of {kernel} ({explain_unreadable(error)}): "
        "use one version of dnb for both, or %dtrain shutdown and %dtrain start open a pool of the kernel's own"
    )
