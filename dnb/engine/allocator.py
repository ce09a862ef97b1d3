"""How this process's memory allocator treats what is freed: kept between steps, given back after a run."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

# Options of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER_BYTES = 1 << 30


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


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
