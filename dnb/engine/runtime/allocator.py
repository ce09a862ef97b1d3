"""The treatment of freed memory by this process's allocator: kept between steps, given back after a run."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

# Options of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER_BYTES = 1 << 30
_SIZES = Path("/proc/self/statm")
# Of what a run may hold; the rest is for what comes until the next look.
_SHORT_SHARE = 0.85


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, instead of mapping them anew in every step.

    A backward frees and asks for the same blocks over and over. By default each is mapped and unmapped, and touching
    new pages took 10 to 50 of 240 ms in a step of a model of 17 M parameters. Only glibc has these options.
    """
    library = _glibc()
    if library is not None:
        for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _NEVER_BYTES), (_TRIM_THRESHOLD, _NEVER_BYTES)):
            if not library.mallopt(option, value):
                log.info("mallopt(%d, %d) was refused", option, value)


def release_freed_memory() -> None:
    """Give what is kept back to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


class Ration:
    """Gives back what is kept when the process has grown to most of what a run may hold.

    Freed blocks lie between small ones that are in use, so that not all of them serve again: a stage of 12 layers with
    4 MB each was seen to hold a freed gradient for every layer. Where there is room that does no harm.
    """

    def __init__(self) -> None:
        self._most_bytes: int | None = None

    def set(self, most_bytes: int | None, *, start_bytes: int | None) -> None:
        """Set the growth that the run may hold from now on; None: as much as there is."""
        self._most_bytes = None
        if most_bytes is not None and start_bytes is not None and _SIZES.exists():
            self._most_bytes = start_bytes + round(_SHORT_SHARE * most_bytes)

    def check(self) -> None:
        """Give kept memory back if the process is near its limit; ten microseconds if there is a limit."""
        if self._most_bytes is not None and _resident_bytes() > self._most_bytes:
            release_freed_memory()


# Of this process, whose memory all runs share.
ration = Ration()


def _resident_bytes() -> int:
    return int(_SIZES.read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
