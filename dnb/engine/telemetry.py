"""Where an engine's time goes, and what its process uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from dnb.records import Telemetry

# Asking the system costs about 50 microseconds: once a second is plenty.
PROCESS_PERIOD_SECONDS = 1.0


class Stopwatch:
    """Adds up seconds per activity between two reports."""

    def __init__(self) -> None:
        self.slowness = 1.0  # how many times as long computing takes, on purpose
        self._seconds = {"compute": 0.0, "data": 0.0}
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the measurement
        self._sampled = time.monotonic()
        self._rss_bytes: int | None = self._process.memory_info().rss
        self._cpu_percent: float | None = None

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time inside as "compute" or "data"."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            if self.slowness != 1.0 and activity == "compute":
                time.sleep((self.slowness - 1.0) * seconds)
                seconds = time.perf_counter() - begin
            self._seconds[activity] += seconds

    def take(self) -> Telemetry:
        """What was measured since the last call; the counters start again."""
        self._sample_process()
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return Telemetry(
            compute_seconds=seconds["compute"],
            data_seconds=seconds["data"],
            rss_bytes=self._rss_bytes,
            cpu_percent=self._cpu_percent,
        )

    def _sample_process(self) -> None:
        now = time.monotonic()
        if now - self._sampled >= PROCESS_PERIOD_SECONDS:
            self._sampled = now
            self._rss_bytes = self._process.memory_info().rss
            self._cpu_percent = self._process.cpu_percent()
