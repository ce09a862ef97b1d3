"""A run without pool or hub: what the notebook side reads, set by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dnb.planning.sample_order import samples_after
from dnb.planning.step_timeline import Timeline
from dnb.planning.utilisation import Utilisation
from dnb.protocol.measurements import Prediction, UsageRow


class FakeHistory:
    """Columns of numbers; `steps` where a key has no steps of its own."""

    def __init__(self, **columns: list[float]) -> None:
        self.columns: dict[str, tuple[list[int], list[float]]] = {}
        for key, values in columns.items():
            self.set(key, values)

    def set(self, key: str, values: list[float], *, steps: list[int] | None = None) -> None:
        self.columns[key] = (steps or list(range(1, len(values) + 1)), values)

    def append(self, key: str, step: int, value: float) -> None:
        steps, values = self.columns.setdefault(key, ([], []))
        steps.append(step)
        values.append(value)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.columns))

    def column(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        steps, values = self.columns.get(key, ([], []))
        size = len(values)
        return np.asarray(steps[:size], dtype=np.int64), np.asarray(values[:size], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class FakeWorker:
    engine: int = 0
    host: str = "host-a"
    pid: int = 4711
    state: str = "busy"
    compute: float = 0.6
    wait: float = 0.25
    data: float = 0.1
    idle: float = 0.05
    cpu_percent: float | None = None
    rss_bytes: int | None = None
    samples: int = 0
    steps: int = 0
    start_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    device: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    heartbeat_age_seconds: float | None = None
    shards: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FakeEvent:
    kind: str
    text: str = ""
    step: int = 0
    time: float = 0.0
    engine: int | None = None


@dataclass(kw_only=True, eq=False)
class FakeRun:
    name: str = "digits"
    status: str = "running"
    step: int = 0
    num_steps: int = 496
    error: str | None = None
    elapsed_seconds: float = 0.0
    started: float = 1_000_000.0
    batch_size: int = 64
    num_samples: int = 1000
    num_shards: int = 8
    steps_per_epoch: int = 16
    utilisation: Utilisation = field(default_factory=Utilisation)
    seconds_left: float | None = None
    samples_per_second: float | None = None
    history: FakeHistory = field(default_factory=FakeHistory)
    workers: list[FakeWorker] = field(default_factory=list)
    recent: list[FakeWorker] | None = None
    events: list[FakeEvent] = field(default_factory=list)
    listeners: list[Callable[[FakeRun], None]] = field(default_factory=list)
    wait_hooks: list[Callable[[FakeRun], None]] = field(default_factory=list)
    num_stops: int = 0
    num_pauses: int = 0
    num_resumes: int = 0
    num_checkpoints: int = 0
    timeline: Timeline = field(default_factory=lambda: Timeline(None))
    prediction: Prediction | None = None

    @property
    def recent_workers(self) -> list[FakeWorker]:
        return self.workers if self.recent is None else self.recent

    def samples_at(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        return samples_after(
            steps, num_samples=self.num_samples, batch_size=self.batch_size, steps_per_epoch=self.steps_per_epoch
        )

    def stop(self) -> None:
        self.num_stops += 1

    def pause(self) -> None:
        self.num_pauses += 1

    def resume(self) -> None:
        self.num_resumes += 1

    def checkpoint(self) -> Path:
        self.num_checkpoints += 1
        return Path(f"/work/checkpoints/step-{self.step}")

    def add_listener(self, callback: Callable[[FakeRun], None]) -> None:
        self.listeners.append(callback)

    def remove_listener(self, callback: Callable[[FakeRun], None]) -> None:
        self.listeners.remove(callback)

    def add_wait_hook(self, callback: Callable[[FakeRun], None]) -> None:
        self.wait_hooks.append(callback)

    def tell(self) -> None:
        """What the watcher thread does when something has changed."""
        for callback in list(self.listeners):
            callback(self)

    def end(self, status: str, *, error: str | None = None) -> None:
        self.error = error
        self.status = status
        self.tell()


def long_run(*, num_steps: int = 100_000, num_engines: int = 4) -> FakeRun:
    """A run of many steps, with validation every 500 steps, still going on."""
    rng = np.random.default_rng(0)
    losses = 2.0 * np.exp(-np.arange(num_steps) / (num_steps / 4)) + 0.2 * rng.random(num_steps)
    run = FakeRun(step=num_steps, num_steps=2 * num_steps, seconds_left=100.0)
    run.samples_per_second = 2410.0
    run.history.set("loss", losses.tolist())
    val_steps = list(range(500, num_steps + 1, 500))
    run.history.set("val_loss", losses[499::500].tolist(), steps=val_steps)
    run.workers = [FakeWorker(engine=engine) for engine in range(num_engines)]
    return run


def usage_rows(num_rows: int, *, engines: tuple[int, ...] = (0, 1), seconds: float = 1.0) -> list[UsageRow]:
    """Spans of equal length in which engines compute more and more, and wait for the rest."""
    rows = []
    for place in range(num_rows):
        busy = seconds * (place + 1) / (num_rows + 1)
        each = {"compute": busy, "wait": seconds - busy, "data": 0.0, "idle": 0.0}
        rows.append(
            UsageRow(
                begin_seconds=place * seconds,
                end_seconds=(place + 1) * seconds,
                step=10 * (place + 1),
                engines=engines,
                **{name: (value,) * len(engines) for name, value in each.items()},
            )
        )
    return rows


def advance(run: FakeRun) -> None:
    """One more step, other shares: everything that a refresh may have to send."""
    run.step += 1
    run.history.append("loss", run.step, 0.5 + 0.01 * (run.step % 7))
    run.workers = [
        replace(w, compute=0.5 + 0.01 * (run.step % 9), wait=0.3 - 0.01 * (run.step % 9), data=0.15)
        for w in run.workers
    ]


def wait_until(claim: Callable[[], bool], *, timeout_seconds: float = 20.0) -> None:
    """Poll a claim about another thread, with a limit."""
    end = time.monotonic() + timeout_seconds
    while not claim():
        if time.monotonic() > end:
            raise TimeoutError(f"not true after {timeout_seconds} s")
        time.sleep(0.01)
