"""Fair comparison on a machine whose timings swing: sides take turns, and each pair gives one ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The middle of several measurements, and the quartiles around it."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Two sides over the same rounds."""

    ours: Spread
    rival: Spread
    ratio: Spread  # of each round's own two figures
    pairs: tuple[tuple[float, float], ...]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; one value is all three."""
    if len(values) == 1:
        return Spread(median=values[0], low=values[0], high=values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)


def alternate(sides: Mapping[Name, Callable[[], float]], *, rounds: int) -> dict[Name, list[float]]:
    """Let every side take one turn per round; every second round goes backwards, so that nobody is always second."""
    figures: dict[Name, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            figures[name].append(sides[name]())
    return figures


def compare(ours: Sequence[float], rival: Sequence[float]) -> Compared:
    """Medians of both sides, and the median of the ratios pair by pair."""
    pairs = tuple(zip(ours, rival, strict=True))
    return Compared(
        ours=spread(ours), rival=spread(rival), ratio=spread([mine / theirs for mine, theirs in pairs]), pairs=pairs
    )


def collective_seconds(starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]) -> list[float]:
    """Per round: from when the last process was ready until the last one had the result.

    Args:
        starts: per process, one reading of the host's monotonic clock per round.
        ends: likewise.
    """
    return [
        max(finished) - max(began)
        for began, finished in zip(zip(*starts, strict=True), zip(*ends, strict=True), strict=True)
    ]
