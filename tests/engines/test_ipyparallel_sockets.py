"""ipyparallel's own sockets: who has no connection file reads nothing of what cells run, and is heard by nobody."""

import contextlib
import json
from itertools import product

import psutil
import pytest
import zmq

from dnb.pool.engines import all_processes
from dnb.pool.startup import profile_folder
from tests.engines.pools import until

pytestmark = pytest.mark.engines

# Handshakes on loopback take some milliseconds.
PATIENCE_MILLISECONDS = 1500


def listening_ports(pool):
    """Every TCP port of every process of a pool."""
    found = set()
    for process in all_processes(pool.facts):
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = psutil.Process(process.pid).net_connections(kind="tcp")
            found |= {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def connection_of(pool):
    path = profile_folder(None) / "security" / f"ipcontroller-{pool.cluster_id}-client.json"
    return json.loads(path.read_text())


def greeted(ports, *, server_key=None):
    """The ports at which a peer of any kind gets through the handshake, with a key of its own and this server's."""
    with zmq.Context() as context:
        poller, monitors = zmq.Poller(), {}
        with contextlib.ExitStack() as stack:
            for port, kind in product(ports, (zmq.DEALER, zmq.SUB, zmq.PUB)):
                peer = stack.enter_context(context.socket(kind))
                peer.linger = 0
                if server_key is not None:
                    peer.curve_publickey, peer.curve_secretkey = zmq.curve_keypair()
                    peer.curve_serverkey = server_key
                monitor = peer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
                stack.callback(monitor.close, linger=0)
                stack.callback(peer.disable_monitor)
                peer.connect(f"tcp://127.0.0.1:{port}")
                monitors[monitor] = port
                poller.register(monitor, zmq.POLLIN)
            found = set()
            while ready := poller.poll(PATIENCE_MILLISECONDS):
                for monitor, _ in ready:
                    monitor.recv_multipart()
                    found.add(monitors[monitor])
            return found


def test_no_port_of_a_pool_greets_a_peer_without_keys(pool):
    ports = listening_ports(pool)
    assert len(ports) > 10  # the controller's, the hub's, one of each engine and of its nanny
    assert greeted(ports) == set()


def test_no_port_of_a_pool_greets_a_peer_that_does_not_know_the_servers_key(pool):
    stranger, _ = zmq.curve_keypair()
    assert greeted(listening_ports(pool), server_key=stranger) == set()


def test_a_peer_that_can_read_the_connection_file_is_greeted(pool):
    connection = connection_of(pool)
    key = connection["curve_serverkey"].encode()
    ports = {connection[name] for name in ("registration", "control", "mux", "task", "iopub", "notification")}
    assert greeted(ports, server_key=key) == ports


def test_what_cells_print_is_read_with_the_servers_key_and_not_without(pool):
    connection = connection_of(pool)
    with zmq.Context() as context, context.socket(zmq.SUB) as friend, context.socket(zmq.SUB) as stranger:
        friend.curve_publickey, friend.curve_secretkey = zmq.curve_keypair()
        friend.curve_serverkey = connection["curve_serverkey"].encode()
        for reader in (friend, stranger):
            reader.linger = 0
            reader.subscribe(b"")
            reader.connect(f"tcp://127.0.0.1:{connection['iopub']}")
        heard = []

        def hears_the_secret():
            pool.client[pool.client.ids[0]].execute("print('my password is 42')", silent=False, block=True)
            while friend.poll(100):
                heard.append(b"".join(friend.recv_multipart()))
            return any(b"my password is 42" in each for each in heard)

        until(hears_the_secret, what="who has the key reads what cells print")
        assert stranger.poll(0) == 0


def test_neither_environment_nor_command_line_of_any_process_has_a_key(pool):
    connection = connection_of(pool)
    secrets = [connection["key"], connection["curve_serverkey"], connection["dnb"]["address"]["secret"]]
    lines = {}
    for process in map(psutil.Process, {process.pid for process in all_processes(pool.facts)}):
        lines[process.pid] = f"{process.cmdline()} {process.environ()}"
    assert [pid for pid, line in lines.items() if any(secret in line for secret in secrets)] == []


def test_cells_do_not_find_the_clusters_key_in_their_environment(pool):
    def environment():
        import os

        return dict(os.environ)

    assert [each for each in pool.client[:].apply_sync(environment) if pool.key.decode() in str(each)] == []


def test_the_key_that_signs_parcels_is_there_although_sockets_are_encrypted(pool):
    assert len(pool.key) == 64
