"""The number of engines that a host can hold, and the number of threads of each."""

from __future__ import annotations

from dnb.errors import ArgumentError

# Resident memory of a process that has imported torch, and shares nothing yet: 0.2 GB proportional, 0.33 GB peak.
ENGINE_BYTES = 300_000_000
HUB_BYTES = 300_000_000


def choose_num_threads(num_cores: int, *, num_engines: int) -> int:
    """Return the threads per engine such that the engines of a host together do not oversubscribe it."""
    return max(1, num_cores // num_engines)


def check_num_engines(num_engines: object, *, free_bytes: int) -> int:
    """Refuse a number of engines that is none, or that the host's memory cannot hold.

    Args:
        num_engines: as the user gave it.
        free_bytes: memory that new processes of the host may use.

    Raises:
        ArgumentError: it is not a positive integer, or too large; says the estimate.
    """
    _check_positive(num_engines, example="%dtrain start -n 2")
    assert isinstance(num_engines, int)
    needed = HUB_BYTES + num_engines * ENGINE_BYTES
    if needed > free_bytes:
        most = max(0, (free_bytes - HUB_BYTES) // ENGINE_BYTES)
        way_out = f"%dtrain start -n {most} fits" if most else "free some memory first"
        raise ArgumentError(
            f"{num_engines} engines need about {needed / 1e9:.1f} GB ({ENGINE_BYTES / 1e9:.1f} GB each and "
            f"{HUB_BYTES / 1e9:.1f} GB for the hub), {free_bytes / 1e9:.1f} GB is free: {way_out}"
        )
    return num_engines


def check_num_added(num_engines: object, *, free_bytes: int) -> int:
    """Refuse to add a number of engines that is none, or that the host's memory cannot hold beside what runs.

    Args:
        num_engines: as the user gave it.
        free_bytes: memory that new processes of the host may use.

    Raises:
        ArgumentError: it is not a positive integer, or too large; says the estimate.
    """
    _check_positive(num_engines, example="%dtrain add 1")
    assert isinstance(num_engines, int)
    needed = num_engines * ENGINE_BYTES
    if needed > free_bytes:
        most = max(0, free_bytes // ENGINE_BYTES)
        way_out = f"%dtrain add {most} fits" if most else "free some memory first"
        raise ArgumentError(
            f"{num_engines} more engines need about {needed / 1e9:.1f} GB ({ENGINE_BYTES / 1e9:.1f} GB each), "
            f"{free_bytes / 1e9:.1f} GB is free: {way_out}"
        )
    return num_engines


def _check_positive(num_engines: object, *, example: str) -> None:
    if not isinstance(num_engines, int) or isinstance(num_engines, bool) or num_engines < 1:
        raise ArgumentError(f"n must be an integer of at least 1, not {num_engines!r}: {example}")
