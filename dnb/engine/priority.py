"""Whose turn it is on busy cores: an engine that is starting leaves them to those that train.

Linux has two scales, and which of them counts depends on how the host is set up (see sched(7)): the niceness of a
thread, which an unprivileged process cannot take back, and, where sessions are scheduled as groups, the niceness of a
session, which may be taken back.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

# The share of a core is then a third of that of a process which trains.
NICENESS = 5
# Linux takes a change of a session's niceness ten times a second from all unprivileged processes together.
SESSION_TRIES, SESSION_WAIT_SECONDS = 100, 0.02

_is_session_gentle = False


def become_gentle() -> None:
    """Let this process's session, if it has one of its own, wait for others until `become_usual`."""
    global _is_session_gentle
    if sys.platform == "linux" and os.getsid(0) == os.getpid():
        _is_session_gentle = _set_session_niceness("self", NICENESS)


def become_usual() -> None:
    """Take the cores like everybody else."""
    global _is_session_gentle
    if _is_session_gentle:
        _is_session_gentle = not _set_session_niceness("self", 0)


def lower_thread() -> None:
    """Let the calling thread, and those that it starts, wait for others as long as they live."""
    _lower(threading.get_native_id())


def lower_process(pid: int) -> None:
    """Let a process with a session of its own wait for others as long as it lives."""
    _lower(pid)
    if sys.platform == "linux":
        _set_session_niceness(str(pid), NICENESS)


def _lower(number: int) -> None:
    """A thread, by its number; a process is its first thread, and hands its niceness down to all that it starts."""
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        with contextlib.suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, number, max(NICENESS, os.getpriority(os.PRIO_PROCESS, number)))


def _set_session_niceness(process: str, niceness: int) -> bool:
    """Whether it is so now."""
    path = Path("/proc", process, "autogroup")
    for _ in range(SESSION_TRIES):
        try:
            path.write_text(str(niceness))
        except BlockingIOError:
            time.sleep(SESSION_WAIT_SECONDS)
        except OSError:  # sessions are not scheduled as groups here
            return False
        else:
            return True
    return False
