"""What a test session leaves behind on the machine: processes, shared memory, temporary files."""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from dnb.transport.segments import segment_roots

# Every process a test starts inherits this variable, also one that has left its parent, so that
# leftovers are told from the processes of another session by fact, never by name.
MARK_NAME = "DNB_TEST_SESSION"
MARK_VALUE = uuid.uuid4().hex


class Leftovers:
    """Names what this session has put on this machine since this object was made."""

    def __init__(self) -> None:
        self._folders = segment_roots()  # now: a test may name others
        self._known_files = find_files(self._folders)
        self._known_processes = set(find_processes())

    def find(self) -> list[str]:
        """List what is there now, one readable line each; empty is clean."""
        files = sorted(find_files(self._folders) - self._known_files)
        new = [process for process in find_processes() if process not in self._known_processes]
        return [describe(process) for process in new] + files

    def wait_until_none(self, *, timeout_seconds: float = 60) -> None:
        """Give what is just ending time to end; on a busy machine, that may be long.

        Raises:
            AssertionError: something is still there at the limit; it is listed.
        """
        found = poll_until_empty(self.find, timeout_seconds=timeout_seconds)
        listing = "\n  ".join(found)
        assert not found, f"still there {timeout_seconds} s after the end:\n  {listing}"


def find_processes() -> list[psutil.Process]:
    """Find living processes that a test of this session started, however far they have drifted."""
    return [process for process in psutil.process_iter() if is_ours(process)]


def is_ours(process: psutil.Process) -> bool:
    """Whether a test started this process and it is still running."""
    if process.pid == os.getpid():
        return False
    try:
        if process.environ().get(MARK_NAME) != MARK_VALUE:
            return False
        return process.status() != psutil.STATUS_ZOMBIE and not is_resource_tracker(process)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended, or it is another user's
        return False


def is_resource_tracker(process: psutil.Process) -> bool:
    """Whether this is pytest's own helper of multiprocessing, which ends with pytest."""
    return process.ppid() == os.getpid() and "resource_tracker" in " ".join(process.cmdline())


def find_files(folders: list[Path]) -> set[str]:
    """Find shared segments and temporary files under the names that dnb gives them."""
    return {str(path) for folder in folders for path in folder.glob("dnb-*")}


def describe(process: psutil.Process) -> str:
    """Say which process this is, even if it ends while we look."""
    try:
        return f"pid {process.pid} ({process.name()}, {process.status()}): {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"pid {process.pid}: ended just now"


def poll_until_empty(find: Callable[[], list[str]], *, timeout_seconds: float) -> list[str]:
    """Ask until nothing is found; return what is found at the limit."""
    deadline = time.monotonic() + timeout_seconds
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
