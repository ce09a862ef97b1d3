from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import zmq

from dnb.engine.heart import Heart
from dnb.records import Beat, EngineFacts, EngineMessage
from dnb.transport.channels import ENGINE_ROLE, RoleKeys, bind_router, listen, start_authenticator, url_of
from dnb.transport.lives import this_process

LIMIT_MILLISECONDS = 10_000


@pytest.fixture
def router_and_heart() -> Iterator[tuple[zmq.Socket[bytes], Heart]]:
    """A hub's socket, and the heart of engine 3 that beats towards it."""
    keys = RoleKeys()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = start_authenticator(context, keys)
    listener = listen("127.0.0.1")
    router = bind_router(context, keys, role=ENGINE_ROLE, listener=listener)
    facts = EngineFacts(engine=3, process=this_process(), cores=1, memory_bytes=1, device="cpu", torch_version="2")
    heart = Heart(facts, address=keys.address(ENGINE_ROLE, url_of(listener)))
    heart.start()
    yield router, heart
    heart.stop()
    router.close()
    authenticator.stop()
    context.term()
    listener.close()


def test_a_heart_beats_again_and_again_and_says_whose_it_is(router_and_heart: tuple[zmq.Socket[bytes], Heart]):
    router, _ = router_and_heart
    beats = []
    for _ in range(3):
        assert router.poll(LIMIT_MILLISECONDS)
        identity, packed = router.recv_multipart()
        assert identity == b"heart-3"
        beats.append(msgspec.msgpack.decode(packed, type=EngineMessage))
    assert beats == [Beat(engine=3, process=this_process())] * 3


def test_a_heart_that_was_stopped_beats_no_more(router_and_heart: tuple[zmq.Socket[bytes], Heart]):
    _, heart = router_and_heart
    heart.stop()
    assert not heart.is_alive()
