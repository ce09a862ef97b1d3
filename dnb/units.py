"""Amounts of bytes and spans of time, as people read them."""

from __future__ import annotations


def milliseconds(seconds: float) -> str:
    """Write a span of time with three digits; from a second on in seconds."""
    value = seconds * 1e3
    return f"{value:.3g} ms" if value < 1000 else f"{seconds:.3g} s"


def amount(num_bytes: float) -> str:
    """Write bytes for people: 1 MB is 10^6."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
