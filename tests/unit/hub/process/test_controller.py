"""The ports of a pool's controller: drawn at once, bound one by one, and nobody else's in between."""

import socket
import struct
import sys

import pytest
import zmq

from dnb.hub.process.controller import DnbController

# Of Linux 6.3 and later; Python has no name for it.
IP_LOCAL_PORT_RANGE = 51


@pytest.fixture
def controller():
    controller = DnbController()
    yield controller
    controller._ports.close()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connection_from(port, listener):
    """A connection whose port the system draws, from a range of one."""
    line = socket.socket()
    try:
        line.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port | port << 16))
    except OSError:
        line.close()
        pytest.skip("this kernel draws from one range for all sockets")
    try:
        line.connect(listener.getsockname())
    except OSError:
        line.close()
        raise
    return line


@pytest.mark.skipif(sys.platform != "linux", reason="ports are held on Linux")
def test_no_connection_is_given_a_port_that_the_controller_has_drawn(controller, listener):
    with pytest.raises(OSError, match="Cannot assign requested address"):
        connection_from(controller.next_port(), listener)


@pytest.mark.skipif(sys.platform != "linux", reason="ports are held on Linux")
def test_no_other_controller_can_hold_it(controller):
    other = DnbController()
    assert not other._ports.hold(controller.next_port())


def test_the_controllers_own_socket_gets_it(controller):
    url = f"tcp://127.0.0.1:{controller.next_port()}"
    with zmq.Context() as context, context.socket(zmq.PULL) as here, context.socket(zmq.PUSH) as there:
        here.bind(url)
        there.connect(url)
        there.send(b"there")
        assert here.recv() == b"there"


def test_a_port_that_is_taken_is_not_drawn(controller, listener, monkeypatch):
    draws = iter([[listener.getsockname()[1]], [0]])
    monkeypatch.setattr("ipyparallel.util.select_random_ports", lambda _num: next(draws))
    assert controller.next_port() == 0


def test_a_port_of_the_users_choice_is_kept_although_it_is_taken(controller, listener):
    taken = listener.getsockname()[1]
    controller.client_ports = [taken]
    assert controller.next_port("client") == taken


def test_ports_are_free_again_when_the_controller_has_ended(controller, listener):
    port = controller.next_port()
    controller._ports.close()
    connection_from(port, listener).close()
