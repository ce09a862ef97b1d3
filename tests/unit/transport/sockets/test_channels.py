from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from dnb.errors import ArgumentError, HubError, RunError
from dnb.protocol.base import Message
from dnb.protocol.client_messages import Done, GetPool, Hello, KillHub, Members, Refused, Request, Shutdown, Submit
from dnb.protocol.pool import Address, Process
from dnb.protocol.versions import VERSION
from dnb.transport.sockets import channels
from dnb.transport.sockets.admission_calls import find_answering
from dnb.transport.sockets.channels import (
    CLIENT_ROLE,
    ENGINE_ROLE,
    HubClient,
    RoleKeys,
    bind_router,
    connect_dealer,
    encode,
    listen,
    refuse_unreadable,
    start_authenticator,
    url_of,
)
from tests.unit.web_server import WebServer, wait_until_given_up

# Long enough for a handshake on loopback (about 5 ms), short enough to wait for what must not come.
PATIENCE_MILLISECONDS = 300
LIMIT_MILLISECONDS = 10_000


class Hub:
    """The sockets of a hub, and a thread that answers its clients as told."""

    def __init__(self) -> None:
        self.keys = RoleKeys()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = start_authenticator(self.context, self.keys)
        self.listeners = {role: listen("127.0.0.1") for role in (ENGINE_ROLE, CLIENT_ROLE)}
        self.routers: dict[str, zmq.Socket[bytes]] = {}
        self._threads: list[threading.Thread] = []
        self.open()

    def open(self) -> None:
        """Take the ports, as a hub does when it is started."""
        self.routers = {
            role: bind_router(self.context, self.keys, role=role, listener=listener)
            for role, listener in self.listeners.items()
        }

    def die(self) -> None:
        """Let go of the ports, which stay open."""
        for thread in self._threads:
            thread.join(LIMIT_MILLISECONDS / 1000)
        self._threads.clear()
        for router in self.routers.values():
            router.close(linger=0)

    def address(self, role: str, *, of: str | None = None) -> Address:
        """Where the socket of a role is, with the keys of that role, or of another."""
        return self.keys.address(of or role, url_of(self.listeners[role]))

    def answer(self, *replies: Callable[[list[bytes]], list[list[bytes]]]) -> None:
        """Take one request after the other and send what each function makes of its parts."""

        def serve() -> None:
            router = self.routers[CLIENT_ROLE]
            for reply in replies:
                if not router.poll(LIMIT_MILLISECONDS):
                    return
                for parts in reply(router.recv_multipart()):
                    router.send_multipart(parts)

        self._threads.append(threading.Thread(target=serve, name="fake-hub"))
        self._threads[-1].start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_MILLISECONDS / 1000)
        self._authenticator.stop()
        self.context.destroy(linger=0)
        for listener in self.listeners.values():
            listener.close()


def reply(record: Message, *frames: bytes) -> Callable[[list[bytes]], list[list[bytes]]]:
    return lambda parts: [[*parts[:2], *encode(record, frames)]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def client_of() -> Iterator[Callable[..., HubClient]]:
    clients: list[HubClient] = []

    def make(address: Address, **options) -> HubClient:
        clients.append(HubClient(address, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def arrives(hub: Hub, role: str, address: Address) -> bool:
    """Whether what a peer with this address sends gets through to the socket of a role."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        dealer = connect_dealer(context, address)
        dealer.send_multipart([b"1", b"knock"])
        return bool(hub.routers[role].poll(PATIENCE_MILLISECONDS))
    finally:
        context.destroy(linger=0)


# who is let in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [ENGINE_ROLE, CLIENT_ROLE])
def test_a_peer_with_the_key_of_the_role_is_let_in(hub: Hub, role: str):
    assert arrives(hub, role, hub.address(role))


def test_the_key_of_an_engine_does_not_open_the_socket_of_clients(hub: Hub):
    assert not arrives(hub, CLIENT_ROLE, hub.address(CLIENT_ROLE, of=ENGINE_ROLE))


def test_the_key_of_a_client_does_not_open_the_socket_of_engines(hub: Hub):
    assert not arrives(hub, ENGINE_ROLE, hub.address(ENGINE_ROLE, of=CLIENT_ROLE))


@pytest.mark.parametrize("role", [ENGINE_ROLE, CLIENT_ROLE])
def test_the_key_of_a_stranger_opens_nothing(hub: Hub, role: str):
    public, secret = zmq.curve_keypair()
    stranger = msgspec.structs.replace(hub.address(role), public=public.decode(), secret=secret.decode())
    assert not arrives(hub, role, stranger)


@pytest.mark.parametrize("role", [ENGINE_ROLE, CLIENT_ROLE])
def test_the_keys_of_another_hub_open_nothing(hub: Hub, role: str):
    foreign = RoleKeys().address(role, hub.address(role).url)
    assert not arrives(hub, role, foreign)


def test_a_peer_without_keys_is_not_let_in(hub: Hub):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        plain = context.socket(zmq.DEALER)
        plain.connect(hub.address(CLIENT_ROLE).url)
        with contextlib.suppress(zmq.Again):  # the hub may have dropped it before it said a word
            plain.send_multipart([b"1", b"knock"], zmq.DONTWAIT)
        assert not hub.routers[CLIENT_ROLE].poll(PATIENCE_MILLISECONDS)
    finally:
        context.destroy(linger=0)


# somebody else on the hub's port ----------------------------------------------------------------------------


# The second on a machine so busy that the connection is given up before a word is sent.
NO_HUB = r"the hub did not answer GetPool within 0\.3 s|the hub cannot be asked: whoever answers at tcp:\S+ is no hub"


@pytest.fixture
def web_server() -> Iterator[WebServer]:
    made = WebServer()
    yield made
    made.close()


def test_whoever_does_not_speak_as_a_hub_is_asked_for_no_longer_than_the_limit(web_server: WebServer, client_of):
    client = client_of(RoleKeys().address(CLIENT_ROLE, web_server.url), timeout_seconds=0.3)
    for _ in range(2):
        with pytest.raises(HubError, match=NO_HUB):
            client.ask(GetPool(), Done)
    assert web_server.num_callers >= 2  # it was called anew for the second question


def test_a_client_that_was_given_up_reaches_the_hub_that_comes_back(hub: Hub, web_server: WebServer, client_of):
    stranger = msgspec.structs.replace(hub.address(CLIENT_ROLE), url=web_server.url)
    client = client_of(stranger, timeout_seconds=0.3)
    with pytest.raises(HubError, match=NO_HUB):
        client.ask(GetPool(), Done)
    wait_until_given_up(client._socket)
    client._address = hub.address(CLIENT_ROLE)  # as if the hub had its port again
    hub.answer(reply(Done()))
    assert client.ask(GetPool(), Done, timeout_seconds=LIMIT_MILLISECONDS / 1000) == (Done(), [])


def test_a_dealer_that_was_given_up_does_not_wait_for_ever(web_server: WebServer):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = connect_dealer(context, RoleKeys().address(ENGINE_ROLE, web_server.url))
    try:
        wait_until_given_up(dealer)
        with pytest.raises(zmq.Again):
            dealer.send_multipart([b"knock"])
    finally:
        context.destroy(linger=0)


def test_every_hub_has_keys_of_its_own():
    first, second = RoleKeys(), RoleKeys()
    assert first.address(CLIENT_ROLE, "").secret != second.address(CLIENT_ROLE, "").secret


def test_the_sockets_listen_on_loopback_only(hub: Hub):
    assert hub.address(CLIENT_ROLE).url.startswith("tcp://127.0.0.1:")


# questions and answers ---------------------------------------------------------------------------------------


def test_an_answer_comes_with_its_frames(hub: Hub, client_of):
    hub.answer(reply(Done(), b"one", b"two"))
    assert client_of(hub.address(CLIENT_ROLE)).ask(GetPool(), Done) == (Done(), [b"one", b"two"])


def test_frames_of_a_request_arrive_as_they_are(hub: Hub, client_of):
    seen: list[bytes] = []

    def keep(parts: list[bytes]) -> list[list[bytes]]:
        seen.extend(parts[3:])
        return reply(Done())(parts)

    hub.answer(keep)
    client_of(hub.address(CLIENT_ROLE)).ask(GetPool(), Done, frames=[b"one", b""])
    assert seen == [b"one", b""]


def test_a_refusal_is_raised_as_the_error_that_the_hub_named(hub: Hub, client_of):
    hub.answer(reply(Refused(error="ArgumentError", message="run 'a' is active")))
    with pytest.raises(ArgumentError, match="run 'a' is active"):
        client_of(hub.address(CLIENT_ROLE)).ask(GetPool(), Done)


def test_a_refusal_of_an_unknown_kind_is_a_hub_error(hub: Hub, client_of):
    hub.answer(reply(Refused(error="Surprise", message="what now")))
    with pytest.raises(HubError, match="what now"):
        client_of(hub.address(CLIENT_ROLE)).ask(GetPool(), Done)


def test_a_hub_that_does_not_answer_is_told_with_the_request_and_the_limit(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE), timeout_seconds=0.3)
    with pytest.raises(HubError, match=r"the hub did not answer GetPool within 0\.3 s"):
        client.ask(GetPool(), Done)


def test_the_limit_of_one_request_may_be_its_own(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE))
    with pytest.raises(HubError, match=r"the hub did not answer Shutdown within 0\.2 s"):
        client.ask(Shutdown(), Done, timeout_seconds=0.2)


@pytest.mark.timeout(20)
def test_a_dead_hub_is_told_long_before_the_limit(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE), is_alive=lambda: False, timeout_seconds=300)
    with pytest.raises(HubError, match="the hub has died: %dtrain shutdown clears up"):
        client.ask(GetPool(), Done)


def test_a_late_answer_to_a_request_that_was_given_up_is_not_taken_for_the_next(hub: Hub, client_of):
    kept: list[list[bytes]] = []

    def keep(parts: list[bytes]) -> list[list[bytes]]:
        kept.append(parts)
        return []

    def answer_both(parts: list[bytes]) -> list[list[bytes]]:
        return [*reply(Done(), b"late")(kept[0]), *reply(Done(), b"of the second")(parts)]

    hub.answer(keep, answer_both)
    client = client_of(hub.address(CLIENT_ROLE), timeout_seconds=5)
    with pytest.raises(HubError, match="did not answer"):
        client.ask(GetPool(), Done, timeout_seconds=0.3)
    assert client.ask(GetPool(), Done) == (Done(), [b"of the second"])


def test_threads_that_share_a_client_each_get_their_own_answer(hub: Hub, client_of):
    def echo(parts: list[bytes]) -> list[list[bytes]]:
        pid = msgspec.msgpack.decode(parts[2], type=Hello).owner.pid
        return reply(Done(), str(pid).encode())(parts)

    hub.answer(*[echo] * 8)
    client = client_of(hub.address(CLIENT_ROLE))
    answers: dict[int, bytes] = {}

    def ask(pid: int) -> None:
        owner = Process(host="here", pid=pid, create_time=0.0)
        answers[pid] = client.ask(Hello(owner=owner), Done)[1][0]

    threads = [threading.Thread(target=ask, args=(pid,), name=f"ask-{pid}") for pid in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_MILLISECONDS / 1000)
    assert answers == {pid: str(pid).encode() for pid in range(8)}


def nothing(_parts: list[bytes]) -> list[list[bytes]]:
    return []


def test_what_a_hub_did_not_answer_before_it_died_is_asked_again_if_that_does_no_harm(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE))
    hub.answer(nothing)

    def restart() -> None:
        hub.die()
        hub.open()
        hub.answer(reply(Done(), b"of the next hub"))

    restarting = threading.Thread(target=restart, name="restart")
    restarting.start()
    answer = client.ask(GetPool(), Done)
    restarting.join()
    assert answer == (Done(), [b"of the next hub"])


def test_what_must_not_be_done_twice_is_not_asked_again(hub: Hub, client_of, monkeypatch):
    monkeypatch.setattr(channels, "REASON_SECONDS", 0.2)  # no other hub comes
    client = client_of(hub.address(CLIENT_ROLE))
    hub.answer(nothing)
    dying = threading.Thread(target=hub.die, name="dying")
    dying.start()
    with pytest.raises(HubError, match="died and was started again while it was asked to KillHub: look whether"):
        client.ask(KillHub(), Done)
    dying.join()


def test_why_a_hub_has_died_that_was_asked_something_is_told_by_the_next_one(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE))
    hub.answer(nothing)
    members = Members(
        workers=(),
        spares=(),
        leaving=(),
        wanted_spares=0,
        num_died=0,
        num_killed=0,
        last_restart="ValueError: seven",
    )

    def restart() -> None:
        hub.die()
        hub.open()
        hub.answer(reply(members))

    restarting = threading.Thread(target=restart, name="restart")
    restarting.start()
    with pytest.raises(HubError, match=r"while it was asked to KillHub \(ValueError: seven\): look whether"):
        client.ask(KillHub(), Done)
    restarting.join()


def test_a_request_of_which_every_hub_dies_is_given_up(hub: Hub, client_of, monkeypatch):
    monkeypatch.setattr(channels, "REASON_SECONDS", 0.2)
    monkeypatch.setattr(channels, "MOST_BREAKS", 2)
    client = client_of(hub.address(CLIENT_ROLE))
    hub.answer(nothing)

    def die_again_and_again() -> None:
        for _ in range(2):
            hub.die()
            hub.open()
            hub.answer(nothing)
        hub.die()

    dying = threading.Thread(target=die_again_and_again, name="dying")
    dying.start()
    with pytest.raises(HubError, match="the hub died 3 times while it was asked to GetPool"):
        client.ask(GetPool(), Done)
    dying.join()


def test_what_user_code_in_the_hub_has_raised_keeps_its_traceback(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE))
    hub.answer(reply(Refused(error="RunError", message="ValueError: seven", traceback="Traceback: here")))
    with pytest.raises(RunError, match=r"(?s)^ValueError: seven.*Traceback: here") as caught:
        client.ask(Submit(), Done)
    assert caught.value.remote_traceback == "Traceback: here"


def test_a_client_has_the_same_name_for_the_next_hub(hub: Hub, client_of):
    names: list[bytes] = []

    def keep(parts: list[bytes]) -> list[list[bytes]]:
        names.append(parts[0])
        return reply(Done())(parts)

    client = client_of(hub.address(CLIENT_ROLE))
    hub.answer(keep)
    client.ask(GetPool(), Done)
    hub.die()
    hub.open()
    hub.answer(keep)
    client.ask(GetPool(), Done)
    assert names[0] == names[1]


def test_a_closed_client_says_that_it_is_closed(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE))
    client.close()
    with pytest.raises(HubError, match="the connection to the hub is closed: %dtrain start opens a new pool"):
        client.ask(GetPool(), Done)


def test_a_client_may_be_closed_twice(hub: Hub, client_of):
    client = client_of(hub.address(CLIENT_ROLE))
    client.close()
    client.close()
    assert client._socket.closed


# other versions --------------------------------------------------------------------------------------------


def test_an_answer_that_this_version_cannot_read_is_said_with_both_versions(hub: Hub, client_of):
    def answer(parts: list[bytes]) -> list[list[bytes]]:
        return [[*parts[:2], msgspec.msgpack.encode({"type": "Done", "weather": "fine"})]]

    hub.answer(answer)
    client = client_of(hub.address(CLIENT_ROLE), hub="dnb 9.9.9 (format 1)")
    with pytest.raises(HubError) as caught:
        client.ask(GetPool(), Done)
    assert str(caught.value) == (
        f"the hub is dnb 9.9.9 (format 1), and this kernel, dnb {VERSION} (format 1), cannot read its answer to "
        "GetPool (the field 'weather' is not known): use one version of dnb for both"
    )


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"type": "GetWeather"}, "cannot read the request 'GetWeather' of K ('GetWeather' is not known): use one"),
        (
            {"type": "GetPool", "new_option": 1},
            "cannot read the request 'GetPool' of K (the field 'new_option' is not known): use one",
        ),
        (
            {"type": "Control", "run": "a"},
            "cannot read the request 'Control' of K (the field 'verb' is missing): use one",
        ),
        (["no", "record"], "cannot read the request that came of K ("),
    ],
    ids=str,
)
def test_a_request_that_a_hub_cannot_read_is_refused_with_what_is_not_known(request_, said):
    packed = msgspec.msgpack.encode(request_)
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.msgpack.decode(packed, type=Request)
    told = str(refuse_unreadable(packed, caught.value, kernel="K"))
    assert told.startswith(f"the hub is dnb {VERSION} (format 1), and {said}")


def test_a_request_that_is_not_even_text_is_refused_in_a_sentence():
    packed = msgspec.msgpack.encode({"type": "XXXX"}).replace(b"XXXX", b"\xff\xfe\xfd\xfc")
    with pytest.raises(UnicodeDecodeError) as caught:
        msgspec.msgpack.decode(packed, type=Request)
    assert "the request that came of K (" in str(refuse_unreadable(packed, caught.value, kernel="K"))


# who is there ----------------------------------------------------------------------------------------------


def test_hubs_that_answer_are_told_from_ports_that_refuse_and_ports_of_others(hub: Hub):
    there = hub.address(CLIENT_ROLE)
    with listen("127.0.0.1") as listener:
        refusing = msgspec.structs.replace(there, url=url_of(listener))
    begin = time.monotonic()
    assert find_answering([there, refusing, there], limit_seconds=20) == [True, False, True]
    assert time.monotonic() - begin < 10  # nobody waits for a port that refuses
    other = RoleKeys().address(CLIENT_ROLE, there.url)
    no_address = msgspec.structs.replace(there, url="nonsense", secret="no key")
    assert find_answering([other, no_address], limit_seconds=PATIENCE_MILLISECONDS / 1000) == [False, False]


def test_a_port_that_takes_connections_and_says_nothing_does_not_answer(hub: Hub):
    with listen("127.0.0.1") as silent:
        address = msgspec.structs.replace(hub.address(CLIENT_ROLE), url=url_of(silent))
        assert find_answering([address], limit_seconds=PATIENCE_MILLISECONDS / 1000) == [False]


def test_a_hub_that_is_just_started_again_answers(hub: Hub):
    hub.die()
    answers: list[list[bool]] = []
    address = hub.address(CLIENT_ROLE)
    looking = threading.Thread(target=lambda: answers.append(find_answering([address], limit_seconds=10)), name="look")
    looking.start()
    time.sleep(0.1)  # any moment at which it looks already
    hub.open()
    looking.join()
    assert answers == [[True]]


def test_nobody_is_asked_if_nobody_is_to_be_found():
    assert find_answering([], limit_seconds=1) == []
