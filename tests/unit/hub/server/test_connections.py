from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import socket
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from dnb.hub.server.connections import Connections, EngineConnection
from dnb.protocol.base import Message
from dnb.protocol.engine_messages import Attach, Challenge, EngineMessage, Loaded, WireOffer
from dnb.transport.sockets.wire_connections import prove
from dnb.transport.sockets.wires import MAX_RECORD_BYTES, Wire, WireError
from tests.strangers import need_another_user, start_stranger


class Caller:
    """The other end of a line, which says what a test wants."""

    def __init__(self, wire_connections: Connections, url: str) -> None:
        self.place = -1
        kind, _, place = url.partition("://")
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect("\0" + place)
        else:
            host, _, port = place.rpartition(":")
            sock = socket.create_connection((host, int(port)))
        self.wire = Wire(sock)
        (ready, *_), _, _ = select.select(list(wire_connections.listeners), [], [], 10)
        self.place = wire_connections.accept(ready)
        self.line: EngineConnection = wire_connections.lines[self.place]
        ((packed, _),) = self.wire.wait_for_messages(timeout_seconds=10)
        self.nonce = msgspec.msgpack.decode(packed, type=Challenge).nonce

    def says(self, message: Message) -> EngineMessage:
        """Send a record; as the hub takes it."""
        self.wire.send(message)
        ((packed, _),) = self.line.wire.wait_for_messages(timeout_seconds=10)
        return msgspec.msgpack.decode(packed, type=EngineMessage)  # type: ignore[no-any-return]

    def attaches(self, engine: int, token: str) -> EngineMessage:
        return self.says(Attach(engine=engine, proof=prove(token, self.nonce)))


class Hub:
    """A wiring, and those who call it."""

    def __init__(self) -> None:
        self.wire_connections = Connections("127.0.0.1")
        self._callers: list[Caller] = []

    def called_at(self, offer: WireOffer) -> Caller:
        self._callers.append(Caller(self.wire_connections, offer.url))
        return self._callers[-1]

    def attached(self, engine: int) -> Caller:
        """A line of an engine that has proved who it is."""
        offer = self.wire_connections.offer(engine, "memory")
        caller = self.called_at(offer)
        self.wire_connections.greet(caller.line, caller.attaches(engine, offer.token))
        return caller

    def close(self) -> None:
        self.wire_connections.close()
        for caller in self._callers:
            caller.wire.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


# who may connect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "socket"])
def test_an_engine_with_its_token_is_let_in(hub: Hub, kind: str):
    offer = hub.wire_connections.offer(3, kind)
    caller = hub.called_at(offer)
    assert hub.wire_connections.greet(caller.line, caller.attaches(3, offer.token)) == 3
    assert caller.line.engine == 3


def test_an_engine_without_shared_memory_is_called_over_a_unix_socket_first_if_it_is_near(hub: Hub):
    offer = hub.wire_connections.offer(3, "socket")
    assert (offer.url.partition(":")[0], offer.other_url.partition(":")[0]) == ("unix", "tcp")


def test_an_engine_on_another_host_is_called_over_tcp(hub: Hub):
    offer = hub.wire_connections.offer(3, "socket", is_near=False)
    assert (offer.url.partition(":")[0], offer.other_url) == ("tcp", "")


def test_a_line_has_no_engine_before_it_is_greeted(hub: Hub):
    assert hub.called_at(hub.wire_connections.offer(3, "memory")).line.engine is None


def test_a_stranger_without_an_offer_is_refused(hub: Hub):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError, match="a stranger called"):
        hub.wire_connections.greet(caller.line, caller.attaches(4, "anything"))


def test_a_first_record_that_is_no_greeting_is_refused(hub: Hub):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError, match="a stranger called"):
        hub.wire_connections.greet(caller.line, caller.says(Loaded(run="run")))


def test_a_wrong_token_is_refused_with_the_engine_it_names(hub: Hub):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError, match="a stranger called as engine 3"):
        hub.wire_connections.greet(caller.line, caller.attaches(3, "guess"))


@pytest.mark.parametrize("proof", ["", "0" * 64, "é", "\0"], ids=["empty", "zeros", "not ASCII", "a NUL"])
def test_a_wrong_proof_is_refused(hub: Hub, proof: str):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError, match="a stranger called as engine 3"):
        hub.wire_connections.greet(caller.line, caller.says(Attach(engine=3, proof=proof)))


def test_a_stranger_stays_without_an_engine(hub: Hub):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError):
        hub.wire_connections.greet(caller.line, caller.attaches(3, "guess"))
    assert caller.line.engine is None


def test_a_stranger_may_not_send_large_records(hub: Hub):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError):
        hub.wire_connections.greet(caller.line, caller.attaches(3, "guess"))
    assert caller.line.wire.max_record_bytes == 4096


def test_an_engine_that_was_let_in_may_send_large_records(hub: Hub):
    assert hub.attached(3).line.wire.max_record_bytes == MAX_RECORD_BYTES


def test_a_token_lets_in_once(hub: Hub):
    offer = hub.wire_connections.offer(3, "memory")
    first, second = hub.called_at(offer), hub.called_at(offer)
    hub.wire_connections.greet(first.line, first.attaches(3, offer.token))
    with pytest.raises(WireError, match="a stranger called"):
        hub.wire_connections.greet(second.line, second.attaches(3, offer.token))


def test_an_answer_to_another_challenge_is_refused(hub: Hub):
    offer = hub.wire_connections.offer(3, "memory")
    first, second = hub.called_at(offer), hub.called_at(offer)
    overheard = first.attaches(3, offer.token)
    with pytest.raises(WireError, match="a stranger called as engine 3"):
        hub.wire_connections.greet(second.line, overheard)


def test_the_token_of_one_engine_does_not_let_in_another(hub: Hub):
    offer = hub.wire_connections.offer(3, "memory")
    hub.wire_connections.offer(4, "memory")
    caller = hub.called_at(offer)
    with pytest.raises(WireError, match="a stranger called as engine 4"):
        hub.wire_connections.greet(caller.line, caller.attaches(4, offer.token))


def test_a_later_offer_makes_an_earlier_one_void(hub: Hub):
    old = hub.wire_connections.offer(3, "memory")
    hub.wire_connections.offer(3, "memory")
    caller = hub.called_at(old)
    with pytest.raises(WireError, match="a stranger called as engine 3"):
        hub.wire_connections.greet(caller.line, caller.attaches(3, old.token))


def test_a_stranger_does_not_use_up_the_token_of_an_engine(hub: Hub):
    offer = hub.wire_connections.offer(3, "memory")
    stranger, engine = hub.called_at(offer), hub.called_at(offer)
    with pytest.raises(WireError):
        hub.wire_connections.greet(stranger.line, stranger.attaches(3, "guess"))
    assert hub.wire_connections.greet(engine.line, engine.attaches(3, offer.token)) == 3


def test_no_two_tokens_are_equal(hub: Hub):
    assert len({hub.wire_connections.offer(3, "memory").token for _ in range(10)}) == 10


def test_an_engine_that_shares_memory_is_offered_the_local_socket(hub: Hub):
    assert hub.wire_connections.offer(3, "memory").url.startswith("unix://dnb-")


def test_an_engine_far_away_is_offered_tcp_on_the_hub_s_interface(hub: Hub):
    assert hub.wire_connections.offer(3, "socket", is_near=False).url.startswith("tcp://127.0.0.1:")


# strangers -------------------------------------------------------------------------------------------


def call_silently(wire_connections: Connections, *, over: str, number: int) -> list[socket.socket]:
    """Connections that say nothing, in the queue of a listener."""
    listening = listener(wire_connections, over=over)
    callers = []
    for _ in range(number):
        callers.append(socket.socket(listening.family))
        callers[-1].connect(listening.getsockname())
    return callers


def listener(wire_connections: Connections, *, over: str) -> socket.socket:
    family = socket.AF_UNIX if over == "unix" else socket.AF_INET
    return next(sock for sock in wire_connections.listeners.values() if sock.family == family)


def answer(wire_connections: Connections, *, over: str) -> int:
    """Let the hub answer for one turn; how many callers have come in."""
    return len(list(wire_connections.accept_some(listener(wire_connections, over=over).fileno())))


CALL_OFTEN = """
import socket, sys
kind, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
callers = []
for _ in range(number):
    sock = socket.socket(socket.AF_UNIX) if kind == "unix" else socket.socket()
    sock.connect("\\0" + place if kind == "unix" else ("127.0.0.1", int(place)))
    callers.append(sock)
print("called", flush=True)
for sock in callers:
    sock.settimeout(30)
    try:
        heard = sock.recv(1000)
    except ConnectionError:
        heard = b""
    assert not heard, heard
print("heard nothing")
"""


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_process_of_another_user_is_sent_away_before_it_hears_a_word(hub: Hub, over: str):
    need_another_user()
    name = listener(hub.wire_connections, over=over).getsockname()
    place = name[1:].decode() if over == "unix" else str(name[1])
    with start_stranger(CALL_OFTEN, over, place, "20") as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "called\n"
        assert answer(hub.wire_connections, over=over) == 0
        assert stranger.stdout.readline() == "heard nothing\n"
    assert hub.wire_connections.lines == {}


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_no_more_calls_are_answered_between_two_ticks_than_some(hub: Hub, over: str):
    callers = call_silently(hub.wire_connections, over=over, number=300)
    counts = [answer(hub.wire_connections, over=over) for _ in range(10)]
    hub.wire_connections.refill()
    counts.append(answer(hub.wire_connections, over=over))
    for caller in callers:
        caller.close()
    assert counts == [32, 32, 32, 4, 0, 0, 0, 0, 0, 0, 32]


def test_calls_are_answered_faster_while_an_engine_is_expected(hub: Hub):
    hub.wire_connections.offer(3, "memory")
    hub.wire_connections.refill()
    busy = hub.wire_connections.num_calls_left
    hub.wire_connections.withdraw(3)
    hub.wire_connections.refill()
    assert busy >= 10 * hub.wire_connections.num_calls_left


def test_an_offer_that_was_withdrawn_lets_nobody_in(hub: Hub):
    offer = hub.wire_connections.offer(3, "memory")
    hub.wire_connections.withdraw(3)
    caller = hub.called_at(offer)
    with pytest.raises(WireError, match="a stranger called"):
        hub.wire_connections.greet(caller.line, caller.attaches(3, offer.token))


def test_of_too_many_callers_as_many_must_go_as_are_too_many(hub: Hub):
    callers = call_silently(hub.wire_connections, over="tcp", number=90)
    while answer(hub.wire_connections, over="tcp"):
        hub.wire_connections.refill()
    gone = hub.wire_connections.surplus()
    for caller in callers:
        caller.close()
    assert len(hub.wire_connections.lines) == 90
    assert len(set(gone)) == 90 - 64


def test_an_engine_that_calls_over_the_local_socket_makes_no_room_for_those_who_call_by_tcp(hub: Hub):
    engine = hub.called_at(hub.wire_connections.offer(3, "memory"))
    callers = call_silently(hub.wire_connections, over="tcp", number=300)
    while answer(hub.wire_connections, over="tcp"):
        hub.wire_connections.refill()
    gone = hub.wire_connections.surplus()
    for caller in callers:
        caller.close()
    assert len(gone) == 300 - 64
    assert engine.place not in gone


def test_engines_that_were_let_in_are_never_too_many(hub: Hub):
    for engine in range(80):
        hub.attached(engine)
    assert hub.wire_connections.surplus() == []


def test_a_caller_that_says_nothing_is_known_by_its_time(hub: Hub):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    assert hub.wire_connections.silent() == []
    caller.line.opened -= 6
    assert hub.wire_connections.silent() == [caller.place]


def test_an_engine_that_was_let_in_may_be_silent(hub: Hub):
    caller = hub.attached(3)
    caller.line.opened -= 1000
    assert hub.wire_connections.silent() == []


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xc1",
        b"\x83\xa4type\xa6Attach\xa6engine\x00\xa5proof\xa3\xff\xfe\xfd",  # no UTF-8
        b"\x81\xa4type\xa2\xff\xfe",
        b"\x91" * 4000,
        b"\x82\xa4type\xa6Attach\xa1x" + b"\x91" * 3000,
        b"\xdd\x7f\xff\xff\xff",
        b"\x83\xa4type\xa6Attach\xa6engine\xcf\xff\xff\xff\xff\xff\xff\xff\xff\xa5proof\xa0",
        msgspec.msgpack.encode(Loaded(run="run")),
    ],
    ids=["nothing", "no msgpack", "text", "tag", "nested", "nested later", "endless", "huge engine", "another record"],
)
def test_whatever_a_caller_says_first_it_is_only_refused(hub: Hub, said: bytes):
    caller = hub.called_at(hub.wire_connections.offer(3, "memory"))
    with pytest.raises(WireError, match="a stranger called"):
        hub.wire_connections.hear(caller.line, memoryview(said))
    assert caller.line.engine is None


def test_a_caller_takes_little_memory_before_it_is_known(hub: Hub):
    callers = call_silently(hub.wire_connections, over="tcp", number=32)
    answer(hub.wire_connections, over="tcp")
    sizes = {len(line.wire._buffer) for line in hub.wire_connections.lines.values()}
    for caller in callers:
        caller.close()
    assert sizes == {16 + 4096}


@contextlib.contextmanager
def no_files_left() -> Iterator[None]:
    """This process has as many files open as it may."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in taken:
            os.close(file)


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_where_no_file_is_left_callers_are_sent_away_one_by_one(hub: Hub, over: str):
    callers = call_silently(hub.wire_connections, over=over, number=3)
    with no_files_left():
        assert answer(hub.wire_connections, over=over) == 0
    closed = [caller.recv(1) for caller in callers]
    for caller in callers:
        caller.close()
    assert closed == [b"", b"", b""]


def test_callers_come_in_again_when_there_are_files_again(hub: Hub):
    offer = hub.wire_connections.offer(3, "memory")
    lost = call_silently(hub.wire_connections, over="unix", number=1)
    with no_files_left():
        answer(hub.wire_connections, over="unix")
    lost[0].close()
    caller = hub.called_at(offer)
    assert hub.wire_connections.greet(caller.line, caller.attaches(3, offer.token)) == 3


# whose line is whose ---------------------------------------------------------------------------------


def test_a_new_offer_retires_the_line_of_its_engine(hub: Hub):
    line = hub.attached(3).line
    hub.wire_connections.offer(3, "socket")
    assert line.is_retired


def test_a_new_offer_does_not_retire_the_line_of_another_engine(hub: Hub):
    line = hub.attached(3).line
    hub.wire_connections.offer(4, "socket")
    assert not line.is_retired


def test_a_new_offer_does_not_retire_a_line_that_was_not_greeted_yet(hub: Hub):
    line = hub.called_at(hub.wire_connections.offer(3, "memory")).line
    hub.wire_connections.offer(3, "memory")
    assert not line.is_retired


def test_a_line_that_was_retired_stays_so(hub: Hub):
    line = hub.attached(3).line
    hub.wire_connections.offer(3, "memory")
    hub.wire_connections.offer(4, "memory")
    assert line.is_retired


def test_the_line_that_follows_a_retired_one_is_not_retired(hub: Hub):
    hub.attached(3)
    assert not hub.attached(3).line.is_retired


def test_lines_are_found_by_their_file_number(hub: Hub):
    caller = hub.attached(3)
    assert hub.wire_connections.lines == {caller.line.wire.fileno(): caller.line}


def test_a_caller_that_is_gone_already_leaves_no_line(hub: Hub):
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.connect("\0" + hub.wire_connections.offer(3, "memory").url.removeprefix("unix://"))
    caller.close()
    (ready, *_), _, _ = select.select(list(hub.wire_connections.listeners), [], [], 10)
    with pytest.raises(OSError, match=r"gone|pipe|reset"):
        hub.wire_connections.accept(ready)
    assert hub.wire_connections.lines == {}


def test_a_line_that_is_dropped_is_closed(hub: Hub):
    caller = hub.attached(3)
    hub.wire_connections.drop(caller.place)
    assert caller.wire.receive() == []
    assert caller.wire.is_closed


def test_a_line_that_is_dropped_is_forgotten(hub: Hub):
    hub.wire_connections.drop(hub.attached(3).place)
    assert hub.wire_connections.lines == {}


def test_a_wiring_that_is_closed_leaves_nothing_open():
    gc.collect()
    before = psutil.Process().num_fds()
    hub = Hub()
    hub.attached(3)
    hub.called_at(hub.wire_connections.offer(4, "socket"))
    hub.close()
    assert psutil.Process().num_fds() == before
