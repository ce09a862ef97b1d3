"""The memory that this process holds, and its peak since a run began."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FIELD = re.compile(rb"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", re.MULTILINE)


class Footprint:
    """Watches the process's memory, as far as the system tells.

    Resident memory counts every page that the process has touched: its own, and those of shared memory, of which an
    engine touches parameters, gradients and samples that it uses, and which other processes count again. *Private* is
    what no other process has: activations and copies, and what the allocator keeps of them when they are freed.
    """

    def __init__(self) -> None:
        self.start_bytes: int | None = None  # before the run
        self.peak_bytes: int | None = None
        self.peak_private_bytes: int | None = None
        self._has_own_peak = False  # the system's counts from `begin` on

    def begin(self) -> None:
        """Start the peaks from what there is now, as a run begins."""
        try:
            _CLEAR.write_bytes(b"5")
            self._has_own_peak = True
        except OSError:  # no Linux, or a container that forbids it: then only what is seen counts
            self._has_own_peak = False
        self.peak_bytes = self.peak_private_bytes = None
        self.start_bytes = self.sample()

    def sample(self) -> int:
        """Return the resident memory now, and update the peaks."""
        found = _read_status()
        if "VmRSS" not in found:
            found = {"VmRSS": psutil.Process().memory_info().rss}
        resident = found["VmRSS"]
        peak = found.get("VmHWM", resident) if self._has_own_peak else resident
        self.peak_bytes = max(self.peak_bytes or 0, peak)
        if "RssAnon" in found:
            self.peak_private_bytes = max(self.peak_private_bytes or 0, found["RssAnon"])
        return resident


def _read_status() -> dict[str, int]:
    try:
        content = _STATUS.read_bytes()
    except OSError:
        return {}
    return {name.decode(): 1024 * int(number) for name, number in _FIELD.findall(content)}
