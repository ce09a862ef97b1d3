from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator

import pytest

from dnb.transport.sockets.credentials import is_foreign, user_of_peer
from tests.strangers import NOBODY, need_another_user, start_stranger

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="only Linux tells whose a peer is")

CALL = """
import socket, sys
kind, place = sys.argv[1:]
sock = socket.socket(socket.AF_UNIX) if kind == "unix" else socket.socket()
sock.connect("\\0" + place if kind == "unix" else ("127.0.0.1", int(place)))
sys.stdin.read()
"""


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    if request.param == "tcp":
        sock = socket.create_server(("127.0.0.1", 0))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"\0test-{secrets.token_hex(8)}")
        sock.listen()
    sock.settimeout(30)
    yield sock
    sock.close()


def connect(listener: socket.socket) -> socket.socket:
    sock = socket.socket(listener.family)
    sock.connect(listener.getsockname())
    return sock


def test_a_caller_of_this_user_is_known_as_such(listener: socket.socket):
    with connect(listener), listener.accept()[0] as caller:
        assert user_of_peer(caller) == os.geteuid()
        assert not is_foreign(caller)


def test_who_is_called_is_not_foreign_before_the_call_is_answered(listener: socket.socket):
    with connect(listener) as caller:
        assert not is_foreign(caller)


def test_a_caller_of_another_user_is_known_without_a_word(listener: socket.socket):
    need_another_user()
    kind = "unix" if listener.family == socket.AF_UNIX else "tcp"
    name = listener.getsockname()
    place = name[1:].decode() if kind == "unix" else str(name[1])
    with start_stranger(CALL, kind, place), listener.accept()[0] as caller:
        assert user_of_peer(caller) == NOBODY
        assert is_foreign(caller)


def test_a_caller_that_is_gone_is_not_called_foreign():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect(listener).close()
        with listener.accept()[0] as caller:
            assert not is_foreign(caller)


def test_a_caller_over_ipv6_is_known_too():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listener, connect(listener), listener.accept()[0] as caller:
        assert user_of_peer(caller) == os.geteuid()
