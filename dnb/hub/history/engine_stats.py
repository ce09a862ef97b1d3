"""The time and the measurements of a run's engines: the numbers that viewers ask for."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from dnb.protocol.client_messages import Column
from dnb.protocol.measurements import Telemetry, WorkerState, WorkerTotals
from dnb.protocol.pool import EngineFacts


@dataclass(slots=True)
class _Account:
    """One engine's part in the run."""

    facts: EngineFacts
    joined: float
    left: float | None = None
    exit_state: Literal["dead", "left"] = "dead"  # once it has left
    former_seconds: float = 0.0  # that count, from before it was away
    compute_seconds: float = 0.0
    data_seconds: float = 0.0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0  # computing or loading data, in the task under way
    rss_bytes: int | None = None
    cpu_percent: float | None = None
    start_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    peak_private_bytes: int | None = None
    samples: int = 0
    steps: int = 0


class EngineStats:
    """One account per engine, dead ones included.

    Args:
        engines: those that take part from the start.
    """

    def __init__(self, engines: Iterable[EngineFacts]) -> None:
        self._workers: dict[int, _Account] = {}
        self._former: dict[int, WorkerTotals] = {}  # as the hub before had counted, of those who are not back
        self._task_opened = time.monotonic()
        self._closed: float | None = None
        self._held: tuple[tuple[int, tuple[int, ...]], ...] = ()  # engines and shards of the last step
        self._over_limit: set[int] = set()  # engines of which that was told
        for facts in engines:
            self.open(facts)

    def __iter__(self) -> Iterator[int]:
        return iter(self._workers)

    @property
    def living(self) -> list[int]:
        """Engines that have not left."""
        return [engine for engine, worker in self._workers.items() if worker.left is None]

    def open(self, facts: EngineFacts) -> None:
        """Open the account of an engine that joins, or comes back: the time it was away does not count."""
        now = time.monotonic()
        worker = self._workers.setdefault(facts.engine, _Account(facts, now))
        if (former := self._former.pop(facts.engine, None)) is not None:
            worker.samples, worker.steps = former.samples, former.steps
        worker.facts = facts
        if worker.left is not None:
            worker.former_seconds = worker.left - worker.joined
            worker.joined, worker.left, worker.busy_seconds = now - worker.former_seconds, None, 0.0

    def restore(self, former: Iterable[WorkerTotals], counts: Mapping[int, tuple[int, int]]) -> None:
        """Continue from the counts of the hub before.

        Args:
            former: the engines it knew; their times may be old.
            counts: samples and steps of each engine, as the committed steps say.
        """
        known = {totals.engine: totals for totals in former}
        for engine in sorted(known.keys() | counts.keys()):
            samples, steps = counts.get(engine, (0, 0))
            totals = known.get(engine) or _stranger(engine)
            self._former[engine] = msgspec.structs.replace(totals, samples=samples, steps=steps)

    @property
    def departed(self) -> tuple[WorkerTotals, ...]:
        """The accounts that nobody adds to any more."""
        return tuple(totals for totals in self.totals(working=()) if totals.state in ("dead", "left"))

    def begin(self, engine: int) -> None:
        """Start an engine's time, as it has loaded the run."""
        worker = self._workers[engine]
        worker.joined = time.monotonic() - worker.former_seconds

    def leave(self, engine: int, *, exit_state: Literal["dead", "left"] = "dead") -> None:
        """Stop an engine's time, as it has left or died."""
        if engine in self._former:
            self._former[engine] = msgspec.structs.replace(self._former[engine], state=exit_state)
        worker = self._workers.get(engine)
        if worker is not None and worker.left is None:
            worker.left, worker.exit_state = time.monotonic(), exit_state

    def begin_task(self) -> None:
        """Start the clock of a task: time before it, a pause or the loading, was nobody's wait."""
        self._task_opened = time.monotonic()

    def add(self, engine: int, telemetry: Telemetry) -> None:
        """Count what an engine measured."""
        worker = self._workers[engine]
        worker.compute_seconds += telemetry.compute_seconds
        worker.data_seconds += telemetry.data_seconds
        worker.busy_seconds += telemetry.compute_seconds + telemetry.data_seconds
        worker.rss_bytes = telemetry.rss_bytes
        worker.cpu_percent = telemetry.cpu_percent
        if worker.start_rss_bytes is None:  # an engine that loads the run again still holds what it had of it
            worker.start_rss_bytes = telemetry.start_rss_bytes
        worker.peak_rss_bytes = _larger(worker.peak_rss_bytes, telemetry.peak_rss_bytes)
        worker.peak_private_bytes = _larger(worker.peak_private_bytes, telemetry.peak_private_bytes)

    def grown_bytes(self, engine: int) -> int | None:
        """Return the peak growth of an engine's resident memory; None if it has not said."""
        worker = self._workers[engine]
        if worker.peak_rss_bytes is None or worker.start_rss_bytes is None:
            return None
        return worker.peak_rss_bytes - worker.start_rss_bytes

    def take_excess(self, engine: int, limit: int) -> int | None:
        """Return, once for each engine, by how much its memory has grown if that is more than a limit."""
        grown = self.grown_bytes(engine)
        if grown is None or grown <= limit or engine in self._over_limit:
            return None
        self._over_limit.add(engine)
        return grown

    def end_task(self, contributors: Collection[int]) -> None:
        """End the task; a contributor that did not compute or load in it was waiting for it to be whole."""
        now = time.monotonic()
        for engine, worker in self._workers.items():
            if engine in contributors:
                worker.wait_seconds += max(now - self._task_opened - worker.busy_seconds, 0.0)
            worker.busy_seconds = 0.0
        self._task_opened = now

    def count_step(self, samples: dict[int, int]) -> None:
        """Count a committed step, with the samples that each engine brought to it."""
        for engine, num_samples in samples.items():
            self._workers[engine].samples += num_samples
            self._workers[engine].steps += 1

    def hold(self, reports: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
        """Remember which engine had which shards of the last step; it may have reported them in several parts."""
        self._held = reports

    @property
    def shards(self) -> dict[int, tuple[int, ...]] | None:
        """The shards of the last step, by engine; None before the first."""
        held: dict[int, tuple[int, ...]] = {}
        for engine, shards in self._held:
            held[engine] = tuple(sorted({*held.get(engine, ()), *shards}))
        return held or None

    def close(self) -> None:
        """Stop everybody's time, as the run has ended."""
        self._closed = time.monotonic()

    def totals(self, *, working: Collection[int], spares: Collection[int] = ()) -> tuple[WorkerTotals, ...]:
        """Return every account, in order of the engines' ids."""
        totals = [
            self._total(engine, "busy" if engine in working else "spare" if engine in spares else "ready")
            for engine in self._workers
        ]
        return tuple(sorted([*totals, *self._former.values()], key=lambda each: each.engine))

    def _total(self, engine: int, state: WorkerState) -> WorkerTotals:
        worker = self._workers[engine]
        until = worker.left or self._closed or time.monotonic()
        return WorkerTotals(
            engine=engine,
            host=worker.facts.process.host,
            pid=worker.facts.process.pid,
            state=worker.exit_state if worker.left is not None else state,
            compute_seconds=worker.compute_seconds,
            data_seconds=worker.data_seconds,
            wait_seconds=worker.wait_seconds,
            alive_seconds=max(until - worker.joined, 0.0),
            cpu_percent=worker.cpu_percent,
            rss_bytes=worker.rss_bytes,
            samples=worker.samples,
            steps=worker.steps,
            start_rss_bytes=worker.start_rss_bytes,
            peak_rss_bytes=worker.peak_rss_bytes,
            peak_private_bytes=worker.peak_private_bytes,
            device=worker.facts.device,
            cores=worker.facts.cores,
            memory_bytes=worker.facts.memory_bytes,
        )


def account_of(facts: EngineFacts) -> WorkerTotals:
    """Return the empty account of an engine that is known."""
    return msgspec.structs.replace(
        _stranger(facts.engine),
        host=facts.process.host,
        pid=facts.process.pid,
        state="ready",
        device=facts.device,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
    )


def _stranger(engine: int) -> WorkerTotals:
    return WorkerTotals(
        engine=engine,
        host="",
        pid=0,
        state="dead",
        compute_seconds=0.0,
        data_seconds=0.0,
        wait_seconds=0.0,
        alive_seconds=0.0,
        cpu_percent=None,
        rss_bytes=None,
        samples=0,
        steps=0,
    )


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


@dataclass(slots=True)
class HistoryColumns:
    """The history in memory: flat float64 per column; evaluations interleave (step, value)."""

    by_step: dict[str, array[float]] = field(default_factory=dict)
    by_evaluation: dict[str, array[float]] = field(default_factory=dict)

    def add_step(self, values: dict[str, float]) -> None:
        """Add one value to every column: NaN for the steps in which it was not measured."""
        if not values.keys() <= self.by_step.keys():
            num_steps = max((len(column) for column in self.by_step.values()), default=0)
            for name in values:
                self.by_step.setdefault(name, array("d", [math.nan]) * num_steps)
        for name, value in values.items():
            self.by_step[name].append(value)
        if len(values) < len(self.by_step):
            for name in self.by_step.keys() - values.keys():
                self.by_step[name].append(math.nan)

    def add_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Add one value to every column, with the step after which it was measured."""
        for name, value in values.items():
            self.by_evaluation.setdefault(name, array("d")).extend((step, value))

    def after(self, seen: dict[str, int]) -> tuple[tuple[Column, ...], list[bytes]]:
        """Return the rows that a viewer does not have yet, and their number per column."""
        columns: list[Column] = []
        frames: list[bytes] = []
        for name, values in self.by_step.items():
            part = values[seen.get(name, 0) :]
            columns.append(Column(name=name, by="step", num_rows=len(part)))
            frames.append(part.tobytes())
        for name, values in self.by_evaluation.items():
            part = values[2 * seen.get(name, 0) :]
            columns.append(Column(name=name, by="evaluation", num_rows=len(part) // 2))
            frames.append(part.tobytes())
        return tuple(columns), frames
