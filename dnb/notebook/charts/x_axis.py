"""The x axes of a run's subplots: steps, samples or time. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dnb.errors import ArgumentError, nearest
from dnb.notebook.charts import subplots
from dnb.notebook.views import EventView, RunView

Kind = Literal["step", "samples", "time"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Time is counted in the first of these of which there are not too many: up to how many seconds, name, how long one is.
# An axis of dates would have 0:30, 1:00, 1:30, but plotly.js takes new data that are numbers for no dates any more.
_UNITS = ((120.0, "s", 1.0), (7_200.0, "min", 60.0), (math.inf, "h", 3_600.0))
_NEAR_SECONDS = 60.0  # engines are watched from the first step on, which may take its time
_INT32_MAX = 2**31 - 1

Positions = NDArray[np.int32] | NDArray[np.float32]


class Abscissa:
    """The positions of one run's steps and times on an x axis.

    Args:
        run: as it is now.
        kind: what is counted; steps, if it is to be time and no times are known.
        longest_seconds: what has to be on the axis, too.
    """

    def __init__(self, run: RunView, kind: Kind, *, longest_seconds: float = 0.0) -> None:
        self._run = run
        is_untimed = kind == "time" and bool(run.step) and not len(self._times[0])
        self.kind: Kind = "step" if is_untimed else kind
        longest = max(run.elapsed_seconds, longest_seconds)
        unit, self._unit_seconds = next((unit, length) for most, unit, length in _UNITS if longest < most)
        self.title = {
            "step": "step (times were not measured)" if is_untimed else "step",
            "samples": "samples seen",
            "time": f"time since it was submitted ({unit})",
        }[self.kind]

    def at(self, steps: NDArray[Any]) -> Positions:
        """Return the positions of steps."""
        if self.kind == "step":
            return steps.astype(np.int32)
        if self.kind == "samples":
            return _small(self._run.samples_at(steps.astype(np.int64)))
        known, seconds = self._times
        if not len(known):
            return self._at_seconds(np.zeros(len(steps)))
        # what was before the first known time began at 0
        return self._at_seconds(np.interp(steps, known, seconds, left=0.0 if known[0] > 1 else None))

    def at_edges(self, edges: NDArray[np.float64], steps: NDArray[np.int64]) -> Positions:
        """Return the positions of the edges of spans: seconds, and the steps committed at the ends of the spans."""
        if self.kind == "time":
            return self._at_seconds(edges)
        first = 0
        if edges[0] > _NEAR_SECONDS:  # of a run that goes on from a checkpoint: its engines were watched from there
            known, seconds = self._times
            before = int(np.searchsorted(seconds, edges[0], side="right"))
            first = int(known[before - 1]) if before else 0
        return self.at(np.concatenate([[min(first, int(steps[0]))], steps]))

    def at_events(self, events: Sequence[EventView]) -> Positions:
        """Return the positions of events."""
        if self.kind == "time" and self._run.started and all(event.time for event in events):
            return self._at_seconds(np.maximum([event.time - self._run.started for event in events], 0.0))
        return self.at(np.array([event.step for event in events], dtype=np.int64))

    def axis(self) -> dict[str, Any]:
        """Return the properties of an x axis in plotly's terms."""
        return {
            "title": {"text": self.title, "standoff": 6},
            "type": "linear",
            "tickformat": "," if self.kind != "time" else "",
            "hoverformat": "," if self.kind != "time" else ".4~g",
        }

    def matched(
        self, *, anchor: str, domain: tuple[float, float], nticks: int, has_points: bool = True
    ) -> dict[str, Any]:
        """Return the properties of an x axis that shows what the loss's does, in plotly's terms, without a title."""
        return {
            **subplots.axis("", anchor=anchor, domain=list(domain), nticks=nticks, matches="x", tickfont={"size": 11}),
            **self.axis(),
            "title": {"text": ""},
            "showticklabels": has_points,
            "showgrid": has_points,
            "ticks": "outside" if has_points else "",
        }

    @cached_property
    def _times(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return times_of(self._run)

    def _at_seconds(self, seconds: NDArray[np.float64]) -> Positions:
        return (seconds / self._unit_seconds).astype(np.float32)


def abscissa(run: RunView, kind: str = "step", *, longest_seconds: float = 0.0) -> Abscissa:
    """Return the x axis of a run; by step if it is to be by time, and no times are known.

    Args:
        run: as it is now.
        kind: what is counted.
        longest_seconds: what has to be on the axis, too: another run that took longer.

    Raises:
        ArgumentError: there is no such kind.
    """
    return Abscissa(run, checked_kind(kind), longest_seconds=longest_seconds)


def checked_kind(kind: str) -> Kind:
    """Return `kind` itself, if there is such an x axis.

    Raises:
        ArgumentError: there is none.
    """
    if kind not in KINDS:
        raise ArgumentError(f"x={kind!r} is no x axis; {nearest(kind, KINDS)}")
    return kind


def times_of(run: RunView) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return steps and seconds as far as they are known: of each step, else of the spans engines were watched in."""
    steps, seconds = run.history.column("seconds")
    if not len(steps):
        spans = run.utilisation.spans(limit=200)
        steps, seconds = spans.steps, spans.edges[1:]
    known = np.isfinite(seconds)
    return (steps, seconds) if known.all() else (steps[known], seconds[known])


def _small(positions: NDArray[Any]) -> Positions:
    """Convert positions to four bytes each: of large numbers, more than a screen can show is left out."""
    is_small = not len(positions) or float(positions.max()) <= _INT32_MAX
    return positions.astype(np.int32) if is_small else positions.astype(np.float32)
