"""The clock of a run: since it was submitted, and since its last commit."""

from __future__ import annotations

import time


class RunClock:
    """Seconds of a run; they stand still once it has ended.

    Args:
        started: when it was submitted, in seconds since the epoch.
        ended: likewise; None: it has not.
    """

    def __init__(self, *, started: float, ended: float | None) -> None:
        self.started = started
        self._ended = ended
        self._last_commit = time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds since the run was submitted, or from then until it ended."""
        return (self._ended or time.time()) - self.started

    @property
    def seconds_since_end(self) -> float:
        """The seconds since the run ended; many if it has not."""
        return time.time() - (self._ended or 0.0)

    def end(self) -> None:
        """Stand still from now on, unless the run had ended before."""
        self._ended = self._ended or time.time()

    def begin_task(self) -> None:
        """Count the seconds of the next commit from now."""
        self._last_commit = time.monotonic()

    def take_lap(self) -> float:
        """Return the seconds since the last commit, which this one ends."""
        now = time.monotonic()
        seconds, self._last_commit = now - self._last_commit, now
        return seconds
