"""Disks that fail: a limit on the size of files, and real small or read-only file systems."""

import contextlib
import os
import resource
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def files_end_at(num_bytes):
    """No file of this process grows beyond; the write that would is cut short, as on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(*arguments):
    """Mount something; skipped where this user may not, unless DNB_REQUIRE_ROOT=1 says that it must."""
    mounted = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if mounted.returncode:
        reason = f"this user may not mount: {mounted.stderr.strip()}"
        if os.environ.get("DNB_REQUIRE_ROOT") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@contextlib.contextmanager
def small_disk(folder: Path, size="2m"):
    """A real tmpfs."""
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def read_only(folder: Path):
    """The folder cannot be written by who opens something there from now on."""
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Filler:
    """A file that takes all the room of a disk.

    Args:
        folder: of the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "filler"

    def fill(self) -> None:
        """Take the last byte."""
        with open(self.path, "ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        """Give it back."""
        self.path.unlink()
