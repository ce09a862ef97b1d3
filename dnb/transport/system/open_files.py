"""The limit of files that a process may have open."""

from __future__ import annotations

import contextlib
import resource

# More than a pool needs, however large.
ENOUGH_FILES = 65_536


def raise_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as a pool may need, if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # some systems have other limits beside this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
