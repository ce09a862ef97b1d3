"""One pool of two engines per file, for all its tests that need no other."""

import contextlib

import pytest

from dnb import training
from dnb.errors import RunError


@pytest.fixture(scope="module")
def shared_pool(leftovers, tmp_path_factory):
    training.start(n=2)
    yield training.current_pool()
    training.shutdown()


@pytest.fixture
def pool(shared_pool, tmp_path, monkeypatch):
    """The shared pool, in a folder of the test's own, and without an active run at the end."""
    monkeypatch.chdir(tmp_path)
    yield shared_pool
    if shared_pool.is_open and shared_pool.run is not None:
        shared_pool.run.stop()
        with contextlib.suppress(RunError):
            shared_pool.run.wait(timeout_seconds=60)
