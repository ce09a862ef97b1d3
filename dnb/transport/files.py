"""How many files a process may have open, and how many it has."""

from __future__ import annotations

import os
import resource


def raise_file_limit() -> int:
    """Let this process open as many files as the system allows it to; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # more than this system can count, as an unlimited number is to some
        return soft
    return hard


def file_limit() -> int:
    """How many files this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft


def count_open_files() -> int:
    """How many files this process has open; as many as it may if there is not even one for the list of them."""
    try:
        return len(os.listdir("/dev/fd")) - 1
    except OSError:
        return file_limit()
