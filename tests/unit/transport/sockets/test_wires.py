from __future__ import annotations

import gc
import secrets
import select
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import psutil
import pytest

from dnb.errors import HubError
from dnb.protocol.base import Message
from dnb.protocol.engine_messages import Attach, EngineMessage, Loaded, WireOffer
from dnb.transport.sockets.wire_connections import WireListener, connect_wire, prove
from dnb.transport.sockets.wires import MAX_RECORD_BYTES, PIECE_BYTES, Flat, Outbox, Wire, WireError
from tests.strangers import need_another_user, start_stranger

HEADER = struct.Struct("<BxHIQ")  # kind, slot, bytes of the body, bytes of msgpack | offset in the landing
RECORD, PIECE = 1, 2
BUFFER_BYTES = 65_536

Pair = tuple[Wire, Wire]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    wires = Wire(left), Wire(right)
    yield wires
    for wire in wires:
        wire.close()


@pytest.fixture
def peer_and_wire() -> Iterator[tuple[socket.socket, Wire]]:
    """A wire, and a socket at its other end that sends whatever bytes a test wants."""
    peer, other = socket.socketpair()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    wire = Wire(other)
    yield peer, wire
    wire.close()
    peer.close()


def loaded(name: str = "run") -> Message:
    return Loaded(run=name)


def read(messages: list[tuple[memoryview, memoryview]]) -> list[tuple[str, bytes]]:
    """Names of the runs in `Loaded` records, with what is behind them."""
    found = []
    for packed, raw in messages:
        record = msgspec.msgpack.decode(packed, type=EngineMessage)
        assert isinstance(record, Loaded)
        found.append((record.run, bytes(raw)))
    return found


def carry(sender: Wire, receiver: Wire, *, num_messages: int) -> list[tuple[str, bytes]]:
    """Let both ends work in turn until so many records have arrived."""
    messages: list[tuple[str, bytes]] = []
    while len(messages) < num_messages and not receiver.is_closed:
        sender.flush()
        messages += read(receiver.receive())
    return messages


def record_frame(name: str = "run", raw: bytes = b"") -> bytes:
    packed = msgspec.msgpack.encode(Loaded(run=name))
    return HEADER.pack(RECORD, 0, len(packed) + len(raw), len(packed)) + packed + raw


def piece_frame(slot: int, offset: int, data: bytes) -> bytes:
    return HEADER.pack(PIECE, slot, len(data), offset) + data


def pattern(num_bytes: int, *, first: int = 1) -> bytes:
    """Bytes whose place shows."""
    return bytes((first + index) % 251 for index in range(251)) * (num_bytes // 251 + 1)


def open_files() -> int:
    gc.collect()
    return psutil.Process().num_fds()


# records -----------------------------------------------------------------------------------------


def test_a_record_arrives_with_its_raw_bytes(pair: Pair):
    left, right = pair
    left.send(loaded("digits"), b"\x00\x01\xff")
    assert read(right.receive()) == [("digits", b"\x00\x01\xff")]


def test_a_record_without_raw_bytes_arrives(pair: Pair):
    left, right = pair
    left.send(loaded("digits"))
    assert read(right.receive()) == [("digits", b"")]


def test_records_arrive_in_the_order_in_which_they_were_sent(pair: Pair):
    left, right = pair
    for number in range(100):
        left.queue(loaded(str(number)), bytes([number]))
    assert carry(left, right, num_messages=100) == [(str(number), bytes([number])) for number in range(100)]


def test_both_ends_may_speak(pair: Pair):
    left, right = pair
    left.send(loaded("to the right"))
    right.send(loaded("to the left"))
    assert (read(left.receive()), read(right.receive())) == ([("to the left", b"")], [("to the right", b"")])


def test_nothing_has_come_when_nothing_was_sent(pair: Pair):
    assert pair[1].receive() == []
    assert not pair[1].is_closed


@pytest.mark.parametrize("num_bytes", [BUFFER_BYTES - 30, BUFFER_BYTES, BUFFER_BYTES + 1, 5_000_000])
def test_a_record_larger_than_the_buffer_arrives_whole(pair: Pair, num_bytes: int):
    left, right = pair
    raw = pattern(num_bytes)[:num_bytes]
    left.queue(loaded(), raw)
    assert carry(left, right, num_messages=1) == [("run", raw)]


def test_a_small_record_follows_a_large_one(pair: Pair):
    left, right = pair
    left.queue(loaded("large"), bytes(1_000_000))
    left.queue(loaded("small"), b"x")
    assert carry(left, right, num_messages=2)[1] == ("small", b"x")


def test_a_large_record_follows_the_half_of_it_that_came_behind_a_small_one(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    large = record_frame("large", pattern(100_000)[:100_000])
    peer.sendall(record_frame("small") + large[:60_000])
    first = read(wire.receive())
    peer.sendall(large[60_000:])
    assert first == [("small", b"")]
    assert read(wire.receive()) == [("large", pattern(100_000)[:100_000])]


@pytest.mark.parametrize("num_bytes", range(17))
def test_a_read_may_end_anywhere_in_a_header(peer_and_wire: tuple[socket.socket, Wire], num_bytes: int):
    peer, wire = peer_and_wire
    fill = BUFFER_BYTES - num_bytes - len(record_frame("first"))
    peer.sendall(record_frame("first", bytes(fill)) + record_frame("second"))
    messages = read(wire.receive()) + read(wire.receive())
    assert [name for name, _ in messages] == ["first", "second"]
    assert not wire.is_closed


def test_records_that_are_kept_do_not_change_when_more_arrive(pair: Pair):
    left, right = pair
    left.send(loaded(), b"first")
    ((_, raw),) = right.receive()
    left.send(loaded(), b"other")
    right.receive()
    assert bytes(raw) == b"first"


# pieces ------------------------------------------------------------------------------------------


def test_a_piece_lands_where_it_should_and_nowhere_else(pair: Pair):
    left, right = pair
    landing = bytearray(12)
    right.receive_buffers[5] = memoryview(landing)
    left.queue_pieces(5, Flat(memoryview(b"abcdefghijkl")), [(3, 7)])
    left.queue(loaded())
    carry(left, right, num_messages=1)
    assert bytes(landing) == b"\0\0\0defg\0\0\0\0\0"


def test_ranges_larger_than_a_piece_are_cut(pair: Pair):
    left, right = pair
    num_bytes = 2 * PIECE_BYTES + 17
    source, landing = pattern(num_bytes)[:num_bytes], bytearray(num_bytes)
    right.receive_buffers[0] = memoryview(landing)
    left.queue_pieces(0, Flat(memoryview(source)), [(0, num_bytes)])
    left.queue(loaded())
    carry(left, right, num_messages=1)
    assert landing == source


def test_an_empty_range_sends_nothing(pair: Pair):
    left, _ = pair
    left.queue_pieces(0, Flat(memoryview(b"abc")), [(1, 1)])
    assert not left.wants_to_write


def test_pieces_and_records_arrive_in_line(pair: Pair):
    left, right = pair
    first, second = bytearray(3), bytearray(3)
    right.receive_buffers = {0: memoryview(first), 1: memoryview(second)}
    left.queue(loaded("a"), b"raw")
    left.queue_pieces(0, Flat(memoryview(b"abc")), [(0, 3)])
    left.queue(loaded("b"))
    left.queue_pieces(1, Flat(memoryview(b"def")), [(0, 3)])
    left.queue(loaded("c"))
    assert carry(left, right, num_messages=3) == [("a", b"raw"), ("b", b""), ("c", b"")]
    assert (bytes(first), bytes(second)) == (b"abc", b"def")


def test_the_last_of_two_pieces_for_one_place_counts(pair: Pair):
    left, right = pair
    landing = bytearray(3)
    right.receive_buffers[0] = memoryview(landing)
    left.queue_pieces(0, Flat(memoryview(b"old")), [(0, 3)])
    left.queue_pieces(0, Flat(memoryview(b"new")), [(0, 3)])
    left.queue(loaded())
    carry(left, right, num_messages=1)
    assert bytes(landing) == b"new"


def test_a_piece_may_end_where_its_landing_ends(pair: Pair):
    left, right = pair
    landing = bytearray(PIECE_BYTES)
    right.receive_buffers[0] = memoryview(landing)
    source = pattern(PIECE_BYTES)[:PIECE_BYTES]
    left.queue_pieces(0, Flat(memoryview(source)), [(0, PIECE_BYTES)])
    left.queue(loaded())
    carry(left, right, num_messages=1)
    assert landing == source


def test_frames_that_arrive_byte_by_byte_are_whole(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    landing = bytearray(5)
    wire.receive_buffers[2] = memoryview(landing)
    stream = record_frame("a", b"raw") + piece_frame(2, 1, b"abc") + piece_frame(2, 0, b"") + record_frame("b")
    messages = []
    for byte in stream:
        peer.send(bytes([byte]))
        messages += read(wire.receive())
    assert messages == [("a", b"raw"), ("b", b"")]
    assert bytes(landing) == b"\0abc\0"


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40, 41, 60])
def test_a_stream_may_be_cut_anywhere(peer_and_wire: tuple[socket.socket, Wire], cut: int):
    peer, wire = peer_and_wire
    landing = bytearray(30)
    wire.receive_buffers[2] = memoryview(landing)
    stream = record_frame("a", b"raw") + piece_frame(2, 1, b"abcdefgh") + record_frame("b")
    peer.send(stream[:cut])
    messages = read(wire.receive())
    peer.send(stream[cut:])
    messages += read(wire.receive())
    assert messages == [("a", b"raw"), ("b", b"")]
    assert bytes(landing[:10]) == b"\0abcdefgh\0"


def test_a_wire_does_not_read_for_ever_while_the_other_side_sends(pair: Pair):
    """One engine must not starve the others: after 16 MB it is their turn."""
    left, right = pair
    num_bytes = 48 << 20
    landing = memoryview(bytearray(PIECE_BYTES))
    right.receive_buffers[0] = landing
    source = Flat(memoryview(bytes(PIECE_BYTES)))
    for _ in range(num_bytes // PIECE_BYTES):
        left.queue_pieces(0, source, [(0, PIECE_BYTES)])
    left.queue(loaded())
    outbox_of_nobody = ThreadPoolExecutor(1)
    sending = outbox_of_nobody.submit(left.flush_all, timeout_seconds=30)
    num_turns = 0
    while not right.receive():
        num_turns += 1
    sending.result()
    outbox_of_nobody.shutdown()
    assert num_turns >= 2


# bad frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 3, 255])
def test_a_frame_of_an_unknown_kind_is_refused(peer_and_wire: tuple[socket.socket, Wire], kind: int):
    peer, wire = peer_and_wire
    peer.send(HEADER.pack(kind, 0, 4, 4) + b"abcd")
    with pytest.raises(WireError, match=f"a frame of kind {kind} with 4 bytes is against the rules"):
        wire.receive()


def test_a_record_whose_msgpack_is_longer_than_its_body_is_refused(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    peer.send(HEADER.pack(RECORD, 0, 4, 5) + b"abcd")
    with pytest.raises(WireError, match="a frame of kind 1 with 4 bytes is against the rules"):
        wire.receive()


@pytest.mark.parametrize(("offset", "size"), [(8, 3), (11, 0), (0, 11), (2**63, 1), (2**64 - 1, 1)])
def test_a_piece_outside_its_landing_is_refused(peer_and_wire: tuple[socket.socket, Wire], offset: int, size: int):
    peer, wire = peer_and_wire
    wire.receive_buffers[0] = memoryview(bytearray(10))
    peer.send(HEADER.pack(PIECE, 0, size, offset))
    with pytest.raises(WireError, match=f"a piece of {size} bytes at {offset} has no place in slot 0"):
        wire.receive()


def test_a_piece_without_a_landing_is_refused(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    wire.receive_buffers[0] = memoryview(bytearray(10))
    peer.send(piece_frame(7, 0, b"abc"))
    with pytest.raises(WireError, match="a piece of 3 bytes at 0 has no place in slot 7"):
        wire.receive()


def test_a_piece_of_more_than_4_mb_is_refused(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    wire.receive_buffers[0] = memoryview(bytearray(5 << 20))
    peer.send(HEADER.pack(PIECE, 0, 4_194_305, 0))
    with pytest.raises(WireError, match="a piece of 4194305 bytes at 0 has no place in slot 0"):
        wire.receive()


def test_a_record_that_is_too_large_before_a_greeting_is_refused_when_its_header_has_come(
    peer_and_wire: tuple[socket.socket, Wire],
):
    peer, wire = peer_and_wire
    wire.max_record_bytes = 4096
    peer.send(HEADER.pack(RECORD, 0, 4097, 10))
    with pytest.raises(WireError, match="a frame of kind 1 with 4097 bytes is against the rules"):
        wire.receive()


def test_a_header_that_announces_a_gigabyte_takes_no_memory_by_itself(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    peer.send(HEADER.pack(RECORD, 0, 1 << 30, 10) + bytes(1000))
    assert wire.receive() == []
    assert len(wire._buffer) == BUFFER_BYTES


def test_memory_grows_with_what_has_come_of_a_large_record(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    peer.send(HEADER.pack(RECORD, 0, 1 << 30, 10))
    for _ in range(10):
        peer.send(bytes(100_000))
        assert wire.receive() == []
    assert len(wire._buffer) <= 2 * 1_000_016


def test_who_is_not_trusted_yet_is_read_little_in_one_turn(peer_and_wire: tuple[socket.socket, Wire]):
    peer, trusted = peer_and_wire
    wire = Wire(trusted._sock.dup(), is_trusted=False)
    peer.send(HEADER.pack(RECORD, 0, 0, 0) * 10_000)
    assert 0 < len(wire.receive()) <= 2 * (16 + 4096) // 16
    wire.close()


def test_who_is_trusted_may_send_no_more_than_was_said(peer_and_wire: tuple[socket.socket, Wire]):
    peer, trusted = peer_and_wire
    wire = Wire(trusted._sock.dup(), is_trusted=False)
    wire.trust(max_record_bytes=MAX_RECORD_BYTES)
    peer.send(HEADER.pack(RECORD, 0, MAX_RECORD_BYTES + 1, 10))
    with pytest.raises(WireError, match=f"with {MAX_RECORD_BYTES + 1} bytes is against the rules"):
        wire.receive()
    wire.close()


def test_a_record_of_more_than_a_gigabyte_is_refused(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    peer.send(HEADER.pack(RECORD, 0, (1 << 30) + 1, 10))
    with pytest.raises(WireError, match="with 1073741825 bytes is against the rules"):
        wire.receive()


# the end -----------------------------------------------------------------------------------------


def test_a_wire_sees_that_the_other_side_has_closed(pair: Pair):
    left, right = pair
    left.close()
    assert right.receive() == []
    assert right.is_closed


def test_what_was_sent_before_the_end_arrives(pair: Pair):
    left, right = pair
    left.send(loaded("last"))
    left.close()
    assert read(right.wait_for_messages(timeout_seconds=10)) == [("last", b"")]


def test_half_a_record_before_the_end_is_no_record(peer_and_wire: tuple[socket.socket, Wire]):
    peer, wire = peer_and_wire
    peer.send(record_frame("torn")[:-1])
    peer.close()
    assert wire.receive() == []
    wire.receive()
    assert wire.is_closed


def test_a_wire_sees_when_it_sends_that_the_other_side_has_closed(pair: Pair):
    left, right = pair
    right.close()
    left.send(loaded())
    assert left.is_closed
    assert not left.wants_to_write


def test_a_wire_may_be_closed_twice(pair: Pair):
    pair[0].close()
    pair[0].close()
    assert pair[0].is_closed


def test_a_closed_wire_takes_records_to_nowhere(pair: Pair):
    left, _ = pair
    left.close()
    left.send(loaded())
    assert not left.wants_to_write


def test_to_wait_for_a_side_that_is_gone_is_an_error(pair: Pair):
    left, right = pair
    left.close()
    with pytest.raises(WireError, match="the other side is gone"):
        right.wait_for_messages(timeout_seconds=10)


def test_the_limit_of_a_wait_is_named(pair: Pair):
    with pytest.raises(WireError, match=r"the other side said nothing for 0\.05 s"):
        pair[1].wait_for_messages(timeout_seconds=0.05)


def test_the_limit_of_flush_all_is_named(pair: Pair):
    left, _ = pair
    left.queue_pieces(0, Flat(memoryview(bytes(64 << 20))), [(0, 64 << 20)])
    with pytest.raises(WireError, match=r"the other side took nothing for 0\.05 s"):
        left.flush_all(timeout_seconds=0.05)


def test_flush_all_of_nothing_is_done_at_once(pair: Pair):
    pair[0].flush_all(timeout_seconds=0)


def test_flush_all_to_a_side_that_is_gone_is_an_error(pair: Pair):
    left, right = pair
    right.close()
    left.queue(loaded())
    with pytest.raises(WireError, match="the other side is gone"):
        left.flush_all(timeout_seconds=10)


def test_what_the_socket_does_not_take_at_once_waits(pair: Pair):
    left, right = pair
    left.send(loaded(), bytes(64 << 20))
    assert left.wants_to_write
    assert len(carry(left, right, num_messages=1)[0][1]) == 64 << 20
    assert not left.wants_to_write


class ReadToTheEndMeanwhile(socket.socket):
    """While one thread sends, another one sees the end and closes the wire."""

    wire: Wire

    def send(self, *arguments: Any) -> int:
        sent = super().send(*arguments)
        self.wire.close()
        return sent


def test_a_wire_that_its_reader_closes_in_the_middle_of_sending_is_closed():
    left, right = socket.socketpair()
    sock = ReadToTheEndMeanwhile(fileno=left.detach())
    wire = sock.wire = Wire(sock)
    wire.send(loaded())
    right.close()
    assert wire.is_closed


# outbox ------------------------------------------------------------------------------------------


@pytest.fixture
def outbox(pair: Pair) -> Iterator[Outbox]:
    thread = Outbox(pair[0], timeout_seconds=10)
    thread.start()
    yield thread
    thread.stop()
    thread.join(10)


def test_an_outbox_sends_in_the_order_in_which_it_was_asked(pair: Pair, outbox: Outbox):
    for number in range(50):
        outbox.send(loaded(str(number)), bytes([number]))
    messages: list[tuple[str, bytes]] = []
    while len(messages) < 50:
        messages += read(pair[1].wait_for_messages(timeout_seconds=10))
    assert messages == [(str(number), bytes([number])) for number in range(50)]


def test_pieces_of_an_outbox_are_there_before_the_record_that_follows_them(pair: Pair, outbox: Outbox):
    right = pair[1]
    source = pattern(9_000_000)[:9_000_000]
    landing = bytearray(9_000_000)
    right.receive_buffers[0] = memoryview(landing)
    outbox.send_pieces(0, Flat(memoryview(source)), [(0, 5_000_000), (5_000_000, 9_000_000)])
    outbox.send(loaded())
    right.wait_for_messages(timeout_seconds=10)
    assert landing == source


def test_an_outbox_that_is_stopped_has_sent_all(pair: Pair):
    outbox = Outbox(pair[0], timeout_seconds=10)
    outbox.start()
    outbox.send(loaded("last"))
    outbox.stop()
    outbox.join(10)
    assert read(pair[1].receive()) == [("last", b"")]


def test_an_outbox_closes_a_wire_whose_other_side_is_gone(pair: Pair):
    left, right = pair
    right.close()
    outbox = Outbox(left, timeout_seconds=10)
    outbox.start()
    outbox.send(loaded())
    outbox.send(loaded())
    outbox.stop()
    outbox.join(10)
    assert left.is_closed


def test_an_outbox_closes_a_wire_whose_other_side_reads_nothing(pair: Pair):
    outbox = Outbox(pair[0], timeout_seconds=0.05)
    outbox.start()
    outbox.send_pieces(0, Flat(memoryview(bytes(64 << 20))), [(0, 64 << 20)])
    outbox.stop()
    outbox.join(10)
    assert pair[0].is_closed


# connecting --------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[WireListener]:
    listener = WireListener("127.0.0.1")
    yield listener
    listener.close()


@pytest.fixture
def engine_side() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def accept(listener: WireListener) -> tuple[Wire, str]:
    (ready, *_), _, _ = select.select(listener.sockets, [], [], 10)
    return listener.accept(ready)


def urls(listener: WireListener) -> dict[str, str]:
    return {"local": listener.local_url, "tcp": listener.tcp_url}


def call(engine_side: ThreadPoolExecutor, url: str, token: str) -> Future[Wire]:
    return engine_side.submit(connect_wire, WireOffer(url=url, token=token), engine=3, timeout_seconds=10)


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_an_engine_with_the_right_token_proves_who_it_is(
    listener: WireListener, engine_side: ThreadPoolExecutor, kind: str
):
    calling = call(engine_side, urls(listener)[kind], "secret")
    wire, nonce = accept(listener)
    ((packed, _),) = wire.wait_for_messages(timeout_seconds=10)
    calling.result().close()
    wire.close()
    assert msgspec.msgpack.decode(packed, type=EngineMessage) == Attach(engine=3, proof=prove("secret", nonce))


def test_an_engine_with_the_wrong_token_proves_nothing(listener: WireListener, engine_side: ThreadPoolExecutor):
    calling = call(engine_side, listener.local_url, "guess")
    wire, nonce = accept(listener)
    ((packed, _),) = wire.wait_for_messages(timeout_seconds=10)
    calling.result().close()
    wire.close()
    attach = msgspec.msgpack.decode(packed, type=EngineMessage)
    assert isinstance(attach, Attach)
    assert attach.proof != prove("secret", nonce)


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_records_and_pieces_go_both_ways_once_connected(
    listener: WireListener, engine_side: ThreadPoolExecutor, kind: str
):
    calling = call(engine_side, urls(listener)[kind], "secret")
    hub, _ = accept(listener)
    hub.wait_for_messages(timeout_seconds=10)
    engine = calling.result()
    landing = bytearray(3)
    engine.receive_buffers[0] = memoryview(landing)
    hub.queue_pieces(0, Flat(memoryview(b"abc")), [(0, 3)])
    hub.send(loaded("to the engine"))
    engine.send(loaded("to the hub"))
    told = read(engine.wait_for_messages(timeout_seconds=10)), read(hub.wait_for_messages(timeout_seconds=10))
    engine.close()
    hub.close()
    assert told == ([("to the engine", b"")], [("to the hub", b"")])
    assert bytes(landing) == b"abc"


def test_every_caller_is_challenged_anew(listener: WireListener):
    nonces = set()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", int(listener.tcp_url.rpartition(":")[2]))):
            wire, nonce = accept(listener)
            wire.close()
            nonces.add(nonce)
    assert len(nonces) == 5


def test_a_caller_may_send_a_small_greeting_only(listener: WireListener):
    with socket.create_connection(("127.0.0.1", int(listener.tcp_url.rpartition(":")[2]))) as caller:
        wire, _ = accept(listener)
        caller.sendall(HEADER.pack(RECORD, 0, 4097, 10))
        with pytest.raises(WireError, match="a frame of kind 1 with 4097 bytes is against the rules"):
            wire.wait_for_messages(timeout_seconds=10)
        wire.close()


def test_a_caller_has_no_landing(listener: WireListener):
    with socket.create_connection(("127.0.0.1", int(listener.tcp_url.rpartition(":")[2]))) as caller:
        wire, _ = accept(listener)
        caller.sendall(piece_frame(0, 0, b"abc"))
        with pytest.raises(WireError, match="has no place in slot 0"):
            wire.wait_for_messages(timeout_seconds=10)
        wire.close()


def test_a_caller_that_is_gone_already_is_told_as_an_os_error(listener: WireListener):
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.connect("\0" + listener.local_url.removeprefix("unix://"))
    caller.close()
    with pytest.raises(OSError, match=r"gone|pipe|reset"):
        accept(listener)


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_a_hub_that_cannot_be_reached_is_told_with_its_address(listener: WireListener, kind: str):
    url = urls(listener)[kind]
    listener.close()
    with pytest.raises(HubError, match=f"engine 3 cannot reach the hub at {url}: "):
        connect_wire(WireOffer(url=url, token="secret"), engine=3, timeout_seconds=0.05)


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_a_hub_that_says_nothing_is_told_with_the_limit(listener: WireListener, kind: str):
    with pytest.raises(HubError, match=r"the other side said nothing for 0\.05 s"):
        connect_wire(WireOffer(url=urls(listener)[kind], token="secret"), engine=3, timeout_seconds=0.05)


def test_an_engine_whose_call_the_queue_has_no_room_for_calls_again(
    listener: WireListener, engine_side: ThreadPoolExecutor
):
    local = next(sock for sock in listener.sockets if sock.family == socket.AF_UNIX)
    local.listen(0)
    first = socket.socket(socket.AF_UNIX)
    first.connect(local.getsockname())  # the queue is full
    calling = call(engine_side, listener.local_url, "secret")
    with pytest.raises(TimeoutError):
        calling.result(timeout=0.2)
    first.close()
    with pytest.raises(OSError, match=r"gone|pipe|reset"):
        accept(listener)
    wire, _ = accept(listener)
    calling.result(timeout=10).close()
    wire.close()


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_an_engine_that_had_to_make_room_for_another_caller_calls_again(
    listener: WireListener, engine_side: ThreadPoolExecutor, kind: str
):
    calling = call(engine_side, urls(listener)[kind], "secret")
    (ready, *_), _, _ = select.select(listener.sockets, [], [], 10)
    ready.accept()[0].close()  # before it was challenged
    wire, _ = accept(listener)
    calling.result(timeout=10).close()
    wire.close()


def test_an_engine_says_nothing_to_a_listener_of_another_user():
    need_another_user()
    name = f"dnb-{secrets.token_hex(8)}"
    code = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind("\\0" + sys.argv[1])
sock.listen()
print("listens", flush=True)
caller, _ = sock.accept()
print("heard", caller.recv(1000), flush=True)
"""
    with start_stranger(code, name) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "listens\n"
        with pytest.raises(HubError, match="a process of another user listens there"):
            connect_wire(WireOffer(url=f"unix://{name}", token="secret"), engine=3, timeout_seconds=5)
        assert stranger.stdout.readline() == "heard b''\n"


def test_the_answer_to_a_challenge_is_an_hmac_of_rfc_2104():
    # RFC 4231, test case 2
    proof = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert prove("Jefe", "what do ya want for nothing?") == proof


# nothing is left -----------------------------------------------------------------------------------


def test_a_listener_that_is_closed_leaves_nothing_open():
    before = open_files()
    WireListener("127.0.0.1").close()
    assert open_files() == before


def test_wires_that_are_closed_leave_nothing_open(listener: WireListener, engine_side: ThreadPoolExecutor):
    engine_side.submit(len, ()).result()  # the thread is there
    before = open_files()
    calling = call(engine_side, listener.local_url, "secret")
    wire, _ = accept(listener)
    calling.result().close()
    wire.close()
    assert open_files() == before


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_a_call_that_failed_leaves_nothing_open(kind: str):
    listener = WireListener("127.0.0.1")
    url = urls(listener)[kind]
    listener.close()
    before = open_files()
    with pytest.raises(HubError) as caught:
        connect_wire(WireOffer(url=url, token="secret"), engine=3, timeout_seconds=0.05)
    assert open_files() == before, caught.value


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_a_call_that_nobody_answered_leaves_nothing_open(listener: WireListener, kind: str):
    before = open_files()
    with pytest.raises(HubError) as caught:
        connect_wire(WireOffer(url=urls(listener)[kind], token="secret"), engine=3, timeout_seconds=0.05)
    assert open_files() == before, caught.value
