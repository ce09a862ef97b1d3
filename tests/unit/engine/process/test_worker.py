from __future__ import annotations

import pytest
import zmq

from dnb.engine.process.worker import TrainingThread, engine_facts
from dnb.errors import HubError
from dnb.transport.sockets.channels import ENGINE_ROLE, RoleKeys, connect_dealer
from dnb.transport.system.processes import this_process
from tests.unit.web_server import WebServer, wait_until_given_up


def test_a_worker_whose_connection_was_given_up_says_what_it_could_not_send_and_where():
    web_server = WebServer()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = RoleKeys().address(ENGINE_ROLE, web_server.url)
    worker = TrainingThread(engine_facts(3, num_threads=1), address=address, supervisor=this_process(), key=b"")
    worker._socket = connect_dealer(context, address)
    try:
        wait_until_given_up(worker._socket)
        with pytest.raises(HubError, match=rf"engine 3 could not send Join within 1 s: .* to {web_server.url} was"):
            worker._join()
    finally:
        context.destroy(linger=0)
        web_server.close()
