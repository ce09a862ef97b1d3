"""Sealed wires: what somebody in between does to any byte is noticed before it counts."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator

import msgspec
import pytest

from dnb.hub.server.connections import Connections
from dnb.protocol.base import Message
from dnb.protocol.engine_messages import Attach, EngineMessage, Loaded
from dnb.transport.sockets.sealing import SEAL_BYTES, Seal, derive_keys
from dnb.transport.sockets.wire_connections import WIRES_VARIABLE, connect_wire, prove
from dnb.transport.sockets.wires import PIECE_BYTES, Flat, Wire, WireError

KEYS = derive_keys("token", hub_nonce="a" * 32, engine_nonce="b" * 32)
HEADER_BYTES = 16
BUFFER_BYTES = 65_536


class Between:
    """Two sealed wires, and somebody between them who has what the left one sends, and gives the right one anything."""

    def __init__(self) -> None:
        left, self._from_left = socket.socketpair()
        right, self._to_right = socket.socketpair()
        self.left, self.right = Wire(left), Wire(right)
        self.left.seal(outgoing=KEYS[0], incoming=KEYS[1])
        self.right.seal(outgoing=KEYS[1], incoming=KEYS[0])
        self.landing = bytearray(12)
        self.right.receive_buffers[0] = memoryview(self.landing)
        self.arrived: list[tuple[str, bytes]] = []

    def take(self) -> bytes:
        """All that the left one has sent."""
        pieces = []
        self._from_left.setblocking(False)
        while True:
            self.left.flush()
            try:
                pieces.append(self._from_left.recv(1 << 20))
            except BlockingIOError:
                return b"".join(pieces)

    def give(self, data: bytes) -> None:
        """Let the right one receive this, as it comes."""
        for begin in range(0, len(data), 1 << 16):
            self._to_right.sendall(data[begin : begin + (1 << 16)])
            for packed, raw in self.right.receive():
                record = msgspec.msgpack.decode(packed, type=EngineMessage)
                assert isinstance(record, Loaded)
                self.arrived.append((record.run, bytes(raw)))

    def sent(self, name: str, raw: bytes = b"") -> bytes:
        self.left.queue(Loaded(run=name), raw)
        return self.take()

    def piece(self, data: bytes, offset: int = 0) -> bytes:
        self.left.queue_pieces(0, Flat(memoryview(bytes(offset) + data)), [(offset, offset + len(data))])
        return self.take()

    def close(self) -> None:
        for each in (self.left, self.right, self._from_left, self._to_right):
            each.close()


@pytest.fixture
def between() -> Iterator[Between]:
    between = Between()
    yield between
    between.close()


# what arrives ------------------------------------------------------------------------------------


def test_records_and_pieces_arrive_in_line(between: Between):
    data = between.sent("first", b"raw") + between.piece(b"abc", 4) + between.sent("second")
    between.give(data)
    assert between.arrived == [("first", b"raw"), ("second", b"")]
    assert between.landing == b"\0\0\0\0abc\0\0\0\0\0"


def test_a_frame_has_a_seal_behind_its_header_and_one_behind_its_body(between: Between):
    assert len(between.piece(b"abcdefgh")) == HEADER_BYTES + 8 + 2 * SEAL_BYTES


def test_frames_may_come_byte_by_byte(between: Between):
    data = between.sent("first", b"raw") + between.piece(b"abcdef") + between.sent("second")
    for place in range(len(data)):
        between.give(data[place : place + 1])
    assert between.arrived == [("first", b"raw"), ("second", b"")]
    assert between.landing[:6] == b"abcdef"


@pytest.mark.parametrize("num_bytes", [0, BUFFER_BYTES - 80, BUFFER_BYTES - 40, BUFFER_BYTES, 3_000_000])
def test_records_of_every_size_arrive(between: Between, num_bytes: int):
    raw = bytes(index % 251 for index in range(num_bytes))
    between.give(between.sent("large", raw) + between.sent("small"))
    assert between.arrived == [("large", raw), ("small", b"")]


@pytest.mark.parametrize("num_bytes", [BUFFER_BYTES - 50, BUFFER_BYTES, PIECE_BYTES, 2 * PIECE_BYTES + 17])
def test_pieces_of_every_size_arrive(between: Between, num_bytes: int):
    source = bytes(index % 251 for index in range(num_bytes))
    landing = bytearray(num_bytes)
    between.right.receive_buffers[0] = memoryview(landing)
    between.give(between.piece(source) + between.sent("done"))
    assert landing == source
    assert between.arrived == [("done", b"")]


def test_both_directions_have_keys_of_their_own():
    assert len({*KEYS, *derive_keys("token", hub_nonce="b" * 32, engine_nonce="a" * 32)}) == 4
    assert not set(KEYS) & set(derive_keys("tokem", hub_nonce="a" * 32, engine_nonce="b" * 32))


def test_a_piece_that_changes_while_it_waits_is_sent_as_it_is_then(between: Between):
    """Backward may come to a gradient again while the socket is full; it is sent once more later."""
    source = bytearray(b"before")
    between.left.queue_pieces(0, Flat(memoryview(source)), [(0, 6)])
    source[:] = b"behind"
    between.give(between.take() + between.sent("done"))
    assert between.landing[:6] == b"behind"


# what somebody in between may do -------------------------------------------------------------------


def broken(between: Between, data: bytes) -> list[tuple[str, bytes]]:
    """What counts of data with a broken seal."""
    with pytest.raises(WireError, match="a seal is broken: something between hub and engine has changed, added or"):
        between.give(data)
    return between.arrived


@pytest.mark.parametrize("bit", [0, 7])
def test_no_bit_of_a_record_can_change_unseen(bit: int):
    between = Between()
    size = len(between.sent("run", b"raw"))
    between.close()
    for place in range(size):
        between = Between()
        data = bytearray(between.sent("run", b"raw"))
        data[place] ^= 1 << bit
        assert broken(between, bytes(data)) == []
        between.close()


def test_no_bit_of_a_piece_can_change_unseen_before_a_record_makes_it_count():
    between = Between()
    size = len(between.piece(b"abcdef"))
    between.close()
    for place in range(size):
        between = Between()
        data = bytearray(between.piece(b"abcdef") + between.sent("done"))
        data[place] ^= 1
        assert broken(between, bytes(data)) == []
        between.close()


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a record twice": lambda frames: [frames[0], frames[0]],
    "a piece twice": lambda frames: [frames[0], frames[1], frames[1]],
    "in another order": lambda frames: [frames[0], frames[2], frames[1]],
    "the first is left out": lambda frames: frames[1:],
    "one is left out": lambda frames: [frames[0], frames[2]],
    "one of another connection before": lambda frames: [_of_another_connection(), *frames],
    "one of another connection in between": lambda frames: [frames[0], _of_another_connection(), frames[1]],
    "a frame without seals": lambda frames: [frames[0], frames[1][:HEADER_BYTES] + bytes(SEAL_BYTES)],
    "a header alone of another frame": lambda frames: [frames[0], frames[2][: HEADER_BYTES + SEAL_BYTES]],
    "its body's end cut off": lambda frames: [frames[0], frames[1][:-SEAL_BYTES], frames[2]],
    "a body of another": lambda frames: [
        frames[0],
        frames[1][: HEADER_BYTES + SEAL_BYTES] + bytes(6) + frames[1][-SEAL_BYTES:],
    ],
}


def _of_another_connection() -> bytes:
    seal = Seal(derive_keys("token", hub_nonce="c" * 32, engine_nonce="b" * 32)[0])
    return bytes(seal.seal(b"\1" + bytes(HEADER_BYTES - 1), b""))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_frames_cannot_be_moved_repeated_left_out_or_put_in(
    between: Between, change: Callable[[list[bytes]], list[bytes]]
):
    frames = [between.sent("first"), between.piece(b"abcdef"), between.sent("second")]
    arrived = broken(between, b"".join(change(frames)))
    assert arrived in ([], [("first", b"")])


def test_what_was_sent_does_not_come_back(between: Between):
    """The other direction has another key."""
    data = between.sent("first")
    between.left._sock.setblocking(False)
    between._from_left.sendall(data)
    with pytest.raises(WireError, match="a seal is broken"):
        between.left.receive()


def test_a_body_that_is_not_announced_touches_no_memory(between: Between):
    forged = b"\2" + bytes(3) + (6).to_bytes(4, "little") + bytes(8)
    broken(between, between.sent("first") + forged + bytes(SEAL_BYTES) + b"forged" + bytes(SEAL_BYTES))
    assert between.landing == bytes(12)


def test_what_is_cut_off_is_waited_for(between: Between):
    data = between.sent("first") + between.piece(b"abcdef")
    for end in range(len(data)):
        fresh = Between()
        fresh.give(data[:end])
        assert fresh.arrived in ([], [("first", b"")])
        fresh.close()


# between hub and engine ------------------------------------------------------------------------------


@pytest.fixture
def wire_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connections]:
    monkeypatch.setenv(WIRES_VARIABLE, "sealed")
    wire_connections = Connections("127.0.0.1")
    yield wire_connections
    wire_connections.close()


def attach(wire_connections: Connections, connect: Callable[[], Wire]) -> tuple[Wire, Wire]:
    """Both ends of a wire whose engine was let in."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as engine_side:
        calling = engine_side.submit(connect)
        (ready, *_), _, _ = select.select(list(wire_connections.listeners), [], [], 10)
        line = wire_connections.lines[wire_connections.accept(ready)]
        wire = calling.result(10)
    ((packed, _),) = line.wire.wait_for_messages(timeout_seconds=10)
    wire_connections.greet(line, msgspec.msgpack.decode(packed, type=EngineMessage))
    return line.wire, wire


def say(sender: Wire, receiver: Wire, record: Message) -> Message:
    sender.send(record)
    ((packed, _),) = receiver.wait_for_messages(timeout_seconds=10)
    return msgspec.msgpack.decode(packed, type=EngineMessage)  # type: ignore[no-any-return]


def test_hub_and_engine_have_the_same_keys(wire_connections: Connections):
    offer = wire_connections.offer(3, "socket")
    at_hub, at_engine = attach(wire_connections, lambda: connect_wire(offer, engine=3, timeout_seconds=10))
    assert at_hub.is_sealed
    assert at_engine.is_sealed
    assert say(at_hub, at_engine, Loaded(run="to the engine")) == Loaded(run="to the engine")
    assert say(at_engine, at_hub, Loaded(run="to the hub")) == Loaded(run="to the hub")
    at_engine.close()


def test_what_an_engine_says_in_one_breath_with_its_greeting_is_checked_too(wire_connections: Connections):
    offer = wire_connections.offer(3, "socket")

    def connect() -> Wire:
        wire = connect_wire(offer, engine=3, timeout_seconds=10)
        wire.send(Loaded(run="at once"))
        return wire

    at_hub, at_engine = attach(wire_connections, connect)
    ((packed, _),) = at_hub.wait_for_messages(timeout_seconds=10)
    assert msgspec.msgpack.decode(packed, type=EngineMessage) == Loaded(run="at once")
    at_engine.close()


def test_an_engine_that_does_not_seal_is_not_let_in(wire_connections: Connections):
    offer = wire_connections.offer(3, "socket")
    host, _, port = offer.url.removeprefix("tcp://").rpartition(":")
    wire = Wire(socket.create_connection((host, int(port))))
    (ready, *_), _, _ = select.select(list(wire_connections.listeners), [], [], 10)
    line = wire_connections.lines[wire_connections.accept(ready)]
    greeting = Attach(engine=3, proof=prove(offer.token, line.nonce))
    with pytest.raises(WireError, match="engine 3 calls from another host and does not seal what it says"):
        wire_connections.greet(line, greeting)
    wire.close()


@pytest.mark.parametrize(
    ("host", "is_near", "wish", "sealed"),
    [
        ("127.0.0.1", True, "", False),
        ("127.0.0.1", True, "tcp", False),
        ("127.0.0.1", False, "", True),
        ("127.0.0.1", True, "sealed", True),
        ("0.0.0.0", True, "", True),
        ("0.0.0.0", False, "", True),
    ],
)
def test_what_leaves_the_host_is_sealed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, host: str, is_near: bool, wish: str, sealed: bool
):
    monkeypatch.setenv(WIRES_VARIABLE, wish)
    wire_connections = Connections(host)
    assert wire_connections.offer(3, "socket", is_near=is_near).sealed is sealed
    wire_connections.close()


def test_a_unix_socket_is_not_sealed_though_tcp_would_be():
    wire_connections = Connections("0.0.0.0")
    offer = wire_connections.offer(3, "socket")
    at_hub, at_engine = attach(wire_connections, lambda: connect_wire(offer, engine=3, timeout_seconds=10))
    assert (offer.sealed, at_hub.is_sealed, at_engine.is_sealed) == (True, False, False)
    at_engine.close()
    wire_connections.close()


class Meddler:
    """Somebody between engine and hub who changes one byte of what the engine says."""

    def __init__(self, url: str, *, place: int) -> None:
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        self._listener = socket.create_server((host, 0))
        self.url = f"tcp://{host}:{self._listener.getsockname()[1]}"
        self._hub = (host, int(port))
        self._place = place
        self._sockets: list[socket.socket] = []

    def relay(self, num_bytes: int) -> None:
        """Carry the challenge to the engine, then so many bytes to the hub."""
        engine, _ = self._listener.accept()
        hub = socket.create_connection(self._hub)
        self._sockets += [engine, hub]
        engine.sendall(hub.recv(1 << 16))
        carried = 0
        while carried < num_bytes:
            data = bytearray(engine.recv(1 << 16))
            if carried <= self._place < carried + len(data):
                data[self._place - carried] ^= 1
            hub.sendall(data)
            carried += len(data)

    def close(self) -> None:
        for each in (*self._sockets, self._listener):
            each.close()


@pytest.mark.parametrize("place", [0, 40, 100, 10_000], ids="byte {}".format)
def test_whoever_meddles_between_an_engine_and_its_hub_is_found_out(wire_connections: Connections, place: int):
    from concurrent.futures import ThreadPoolExecutor

    offer = wire_connections.offer(3, "socket")
    greeting = 16 + len(msgspec.msgpack.encode(Attach(engine=3, proof="0" * 64, nonce="0" * 32)))
    meddler = Meddler(offer.url, place=greeting + place)
    tampered = msgspec.structs.replace(offer, url=meddler.url)
    with ThreadPoolExecutor(2) as others:
        calling = others.submit(connect_wire, tampered, engine=3, timeout_seconds=10)
        relaying = others.submit(meddler.relay, greeting + 20_000)
        (ready, *_), _, _ = select.select(list(wire_connections.listeners), [], [], 10)
        line = wire_connections.lines[wire_connections.accept(ready)]
        at_engine = calling.result(10)
        at_engine.send(Loaded(run="run"), bytes(20_000))
        ((packed, _),) = line.wire.wait_for_messages(timeout_seconds=10)
        wire_connections.greet(line, msgspec.msgpack.decode(packed, type=EngineMessage))
        with pytest.raises(WireError, match="a seal is broken"):
            line.wire.wait_for_messages(timeout_seconds=10)
        relaying.result(10)
    at_engine.close()
    meddler.close()
