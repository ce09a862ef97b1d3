"""What faults need: a memory folder that is soon full, and a place for kernels that may be killed."""

import subprocess

import pytest

from dnb import training


@pytest.fixture
def tiny_memory(tmp_path):
    """A real tmpfs of 256 kB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def folder(tmp_path, monkeypatch, leftovers):
    """A folder and profiles of the test's own, shared with the kernels it starts; this kernel has no pool yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(training, "_pool", None)  # the tests' shared one is back afterwards
    yield tmp_path
    training.shutdown()
    leftovers.wait_until_none()
