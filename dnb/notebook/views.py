"""Protocols of a run as the notebook side reads it, so that pictures and texts need no pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dnb.planning.step_timeline import Timeline
from dnb.planning.utilisation import SHARES as SHARES
from dnb.planning.utilisation import Utilisation
from dnb.protocol.measurements import Prediction
from dnb.protocol.run import ENDED

SET_APART = frozenset({"spare", "dead", "left"})  # states of engines that do not take part now


class HistoryView(Protocol):
    """The numbers of a run, one column per key.

    "loss", "lr", "samples_per_second", "grad_norm" (before clipping), metrics, and "seconds" since the run was
    submitted have a value per step; "val_loss", "val_<metric>" one per evaluation.
    """

    def __iter__(self) -> Iterator[str]: ...

    def column(self, key: str, /) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return 1-based step numbers and values; both empty if there is nothing under `key` yet."""


class WorkerView(Protocol):
    """One engine's part in a run; the four shares are 0 to 1 and all 0 while nothing is known."""

    @property
    def engine(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def compute(self) -> float: ...
    @property
    def wait(self) -> float: ...
    @property
    def data(self) -> float: ...
    @property
    def idle(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def start_rss_bytes(self) -> int | None: ...
    @property
    def peak_rss_bytes(self) -> int | None: ...
    @property
    def cpu_percent(self) -> float | None: ...
    @property
    def rss_bytes(self) -> int | None: ...
    @property
    def device(self) -> str | None: ...
    @property
    def cores(self) -> int | None: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def heartbeat_age_seconds(self) -> float | None: ...
    @property
    def shards(self) -> tuple[int, ...] | None: ...


class EventView(Protocol):
    """Something that happened to a run."""

    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def engine(self) -> int | None: ...


class RunView(Protocol):
    """The part of `dnb.api.runs.run.Run` that drawing needs."""

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def error(self) -> str | None: ...
    @property
    def elapsed_seconds(self) -> float: ...
    @property
    def started(self) -> float:
        """The time of submission, in seconds since the epoch; less the time of a run that it continues."""

    @property
    def batch_size(self) -> int:
        """The samples of a batch; 0 before it is known."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training set; 0 before it is known."""

    @property
    def num_samples(self) -> int:
        """The size of the training set; 0 before it is known."""

    @property
    def num_shards(self) -> int:
        """The number of shards of a batch; 0 before it is known."""

    @property
    def seconds_left(self) -> float | None: ...
    @property
    def samples_per_second(self) -> float | None: ...
    @property
    def history(self) -> HistoryView: ...
    @property
    def workers(self) -> Sequence[WorkerView]: ...
    @property
    def recent_workers(self) -> Sequence[WorkerView]: ...
    @property
    def events(self) -> Sequence[EventView]: ...
    @property
    def utilisation(self) -> Utilisation: ...
    @property
    def timeline(self) -> Timeline: ...
    @property
    def prediction(self) -> Prediction | None: ...

    def samples_at(self, steps: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Return the number of samples seen after each of these steps."""

    def stop(self) -> None:
        """Ask the run to end; may block for a moment."""

    def pause(self) -> None:
        """Ask the run to stand still between two steps; may block for a moment."""

    def resume(self) -> None:
        """Ask the run to go on; may block for a moment."""

    def checkpoint(self) -> Path:
        """Write a checkpoint after the step under way; blocks until it is durable."""

    def add_listener(self, callback: Callable[[RunView], None]) -> None:
        """Call `callback` in the run's watcher thread while anything changes, and at the end."""

    def remove_listener(self, callback: Callable[[RunView], None]) -> None:
        """Undo `add_listener`."""

    def add_wait_hook(self, callback: Callable[[RunView], None]) -> None:
        """Call `callback` in the thread that waits for the run, and once when it has ended."""


def has_ended(run: RunView) -> bool:
    """Return True if the run's status can no longer change."""
    return run.status in ENDED


def shown_workers(run: RunView) -> Sequence[WorkerView]:
    """Return the engines with the shares to draw: of the last seconds, or of the whole run once it ended."""
    return run.workers if has_ended(run) else run.recent_workers
