"""How an engine learns where the hub is, and whether both are one version of dnb."""

import json
import os
import socket

import pytest

from dnb.engine.process import worker
from dnb.errors import PoolError
from dnb.protocol.versions import VERSION

PROCESS = {"host": "a", "pid": 1, "create_time": 0.0}
ADDRESS = {"url": "tcp://127.0.0.1:1", "server_public": "s", "public": "p", "secret": "x"}


def connection(**changes):
    place = {"address": ADDRESS, "guardian": PROCESS, "format": 1, "version": VERSION, **changes}
    return json.dumps({"key": "k", "dnb": place})


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("IPP_CONNECTION_INFO", raising=False)


def test_an_engine_reads_the_file_of_its_pool(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text(connection())
    place, key = worker._read_connection(str(path))
    assert (place.address.url, place.supervisor.pid, key) == ("tcp://127.0.0.1:1", 1, b"k")


def test_what_an_engine_is_told_by_its_environment_is_not_left_there(monkeypatch):
    monkeypatch.setenv("IPP_CONNECTION_INFO", connection())
    _, key = worker._read_connection("no such file")
    assert (key, "IPP_CONNECTION_INFO" in os.environ) == (b"k", False)


def test_the_connection_of_an_early_dnb_which_says_no_version_is_read(monkeypatch):
    early = json.dumps({"key": "k", "dnb": {"address": ADDRESS, "guardian": PROCESS}})
    monkeypatch.setenv("IPP_CONNECTION_INFO", early)
    place, _ = worker._read_connection("")
    assert (place.version, place.format) == ("", 1)


def test_an_engine_of_another_version_than_the_hub_says_both_and_its_host(monkeypatch):
    monkeypatch.setenv("IPP_CONNECTION_INFO", connection(format=2, version="9.9.9", mood="good"))
    with pytest.raises(PoolError) as caught:
        worker._read_connection("")
    assert str(caught.value) == (
        f"the pool's hub is dnb 9.9.9 (format 2), and the engine on {socket.gethostname()} dnb {VERSION} (format 1): "
        "install one version of dnb on all hosts"
    )
