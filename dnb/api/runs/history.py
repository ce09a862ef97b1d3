"""Columns of numbers that were measured in a run."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnb.api.runs.exporting import write_csv, write_parquet
from dnb.api.runs.run_views import plot_columns


class History(Mapping[str, list[float]]):
    """Measured values, by name.

    "loss", "lr", "samples_per_second", metrics, and "seconds" since the run was submitted: one value per step;
    "val_loss" and "val_<metric>": one value per evaluation; "grad_norm", the 2-norm of the gradient of all
    parameters before it is clipped: one value now and then, so that it costs at most a hundredth of the time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # an array that is being read cannot grow
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}

    def __getitem__(self, name: str) -> list[float]:
        if name not in self._values:
            raise KeyError(f"{name!r} was not measured; there is: {', '.join(self._values) or 'nothing yet'}")
        with self._lock:
            return self._values[name].tolist()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(values)}" for name, values in self._values.items())
        return f"<dnb.History {sizes or 'empty'}>"

    def column(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return steps (from 1) and values of one column; empty if there is none yet."""
        if name not in self._values:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        with self._lock:  # whole buffers are copied, not number by number: a chart asks several times a second
            steps = np.frombuffer(self._steps[name] or b"", dtype=np.int64).copy()
            return steps, np.frombuffer(self._values[name] or b"", dtype=np.float64).copy()

    def plot(self, *names: str) -> Any:
        """Return a plotly figure of some columns over the steps; of losses, if none is named.

        Raises:
            ArgumentError: one of them was not measured; with those that were.
        """
        return plot_columns(self, names)

    def to_pandas(self) -> Any:
        """Return one row per step, indexed by it; what was not measured at a step is NaN.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas as pd

        columns = {name: pd.Series(values, index=steps) for name in self for steps, values in [self.column(name)]}
        frame = pd.DataFrame(columns)
        frame.index.name = "step"
        return frame

    def to_csv(self, path: str | Path) -> Path:
        """Write one line per step; a cell is empty where nothing was measured, and "nan" where that was measured.

        Raises:
            ArgumentError: there is nothing to write, or the file cannot be written.
        """
        return write_csv(self, path)

    def to_parquet(self, path: str | Path) -> Path:
        """Write one row per step; null is what was not measured, NaN what was measured so.

        Raises:
            ArgumentError: pyarrow is not installed, there is nothing to write, or the file cannot be written.
        """
        return write_parquet(self, path)

    def append(self, name: str, steps: Iterable[int], values: Iterable[float]) -> None:
        """Add new steps and values to one column."""
        with self._lock:
            self._steps.setdefault(name, array("q")).extend(steps)
            self._values.setdefault(name, array("d")).extend(values)

    def num_rows(self, name: str) -> int:
        """Return the number of values of one column so far."""
        return len(self._values.get(name, ()))
