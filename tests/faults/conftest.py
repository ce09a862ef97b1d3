"""What faults need: a memory folder that is soon full, and a place for kernels that may be killed."""

import pytest

from dnb.api import pools
from tests.disks import small_disk


@pytest.fixture
def tiny_memory(tmp_path):
    """A real tmpfs of 256 kB."""
    with small_disk(tmp_path / "tiny", "256k") as folder:
        yield folder


@pytest.fixture
def folder(tmp_path, monkeypatch, leftovers):
    """A folder and profiles of the test's own, shared with the kernels it starts; this kernel has no pool yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(pools, "_pool", None)  # the tests' shared one is back afterwards
    yield tmp_path
    pools.shutdown()
    leftovers.wait_until_none()
