"""Measurements of an engine: seconds per activity, and the resources of its process."""

from __future__ import annotations

import time

import psutil

from dnb.engine.runtime.process_memory import Footprint
from dnb.protocol.measurements import Telemetry

# Asking the system costs about 100 microseconds: once a second is plenty.
PROCESS_PERIOD_SECONDS = 1.0
# But a short run shall have the memory of its first steps, not that of its beginning.
NUM_FIRST = 3


class Stopwatch:
    """Adds up seconds per activity between two reports."""

    def __init__(self) -> None:
        self.slowness = 1.0  # how many times as long computing takes, on purpose
        self._seconds = {"compute": 0.0, "data": 0.0}
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the measurement
        self._sampled = time.monotonic()
        self._num_sampled = NUM_FIRST
        self._footprint = Footprint()
        self._rss_bytes: int | None = self._process.memory_info().rss
        self._cpu_percent: float | None = None

    def begin_run(self) -> None:
        """Measure memory for another run from now on."""
        self._footprint.begin()
        self._num_sampled = 0

    @property
    def start_rss_bytes(self) -> int | None:
        """Resident memory before the run."""
        return self._footprint.start_bytes

    def measure(self, activity: str) -> Measured:
        """Count the time inside as "compute" or "data"."""
        return Measured(self, activity)

    def add(self, activity: str, begin: float) -> None:
        """Count the time since then."""
        seconds = time.perf_counter() - begin
        if self.slowness != 1.0 and activity == "compute":
            time.sleep((self.slowness - 1.0) * seconds)
            seconds = time.perf_counter() - begin
        self._seconds[activity] += seconds

    def collect(self) -> Telemetry:
        """Return the measurements since the last call; the counters start again."""
        self._sample_process()
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return Telemetry(
            compute_seconds=seconds["compute"],
            data_seconds=seconds["data"],
            rss_bytes=self._rss_bytes,
            cpu_percent=self._cpu_percent,
            start_rss_bytes=self._footprint.start_bytes,
            peak_rss_bytes=self._footprint.peak_bytes,
            peak_private_bytes=self._footprint.peak_private_bytes,
        )

    def _sample_process(self) -> None:
        now = time.monotonic()
        if self._num_sampled < NUM_FIRST:
            self._num_sampled += 1
            self._rss_bytes = self._footprint.sample()
        if now - self._sampled >= PROCESS_PERIOD_SECONDS:
            self._sampled = now
            self._rss_bytes = self._footprint.sample()
            self._cpu_percent = self._process.cpu_percent()


class Measured:
    """A block of which the time is counted; entered several times in every step.

    Args:
        stopwatch: counts it.
        activity: as it is counted.
    """

    __slots__ = ("_activity", "_begin", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch, activity: str) -> None:
        self._stopwatch = stopwatch
        self._activity = activity
        self._begin = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stopwatch.add(self._activity, self._begin)
