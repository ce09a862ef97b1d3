"""The engines' use of their time over a run: the hub's counts, in as few spans as a chart can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dnb.protocol.measurements import UsageRow

SHARES = ("compute", "wait", "data", "idle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Shares of time, span by span.

    Args:
        edges: seconds since the run was submitted, of shape (spans + 1,).
        steps: committed at the end of each span, of shape (spans,).
        engines: ids, in ascending order.
        shares: of shape (spans, engines, 4), in the order of `SHARES`; NaN where an engine did not take part.
    """

    edges: NDArray[np.float64]
    steps: NDArray[np.int64]
    engines: tuple[int, ...]
    shares: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)


class Utilisation:
    """Every engine's time in compute, wait, data and idle since the run began.

    One thread may extend it while others read.
    """

    def __init__(self, rows: Iterable[UsageRow] = ()) -> None:
        self._held = _HeldShare((), np.zeros((0, 2)), np.zeros(0, dtype=np.int64), np.zeros((0, 0, len(SHARES))))
        self.extend(list(rows))

    def __len__(self) -> int:
        return len(self._held.steps)

    def __repr__(self) -> str:
        seconds = float(self._held.ends[-1, 1]) if len(self) else 0.0
        return f"<dnb.Utilisation: {len(self.engines)} engines over {seconds:.1f} s, in {len(self)} spans>"

    @property
    def engines(self) -> tuple[int, ...]:
        """Ids of all that ever took part."""
        return self._held.engines

    @property
    def last_engines(self) -> tuple[int, ...]:
        """Ids of those that took part at the end; an engine that only ever stood by is none of them."""
        held = self._held
        if not len(held.steps):
            return ()
        is_there = ~np.isnan(held.seconds[-1, :, 0])
        has_worked = np.nansum(held.seconds[:, :, : SHARES.index("idle")], axis=(0, 2)) > 0
        return tuple(engine for place, engine in enumerate(held.engines) if is_there[place] and has_worked[place])

    def extend(self, rows: Sequence[UsageRow]) -> None:
        """Add what is new."""
        if not rows:
            return
        held = self._held
        engines = tuple(sorted({*held.engines, *(engine for row in rows for engine in row.engines)}))
        index = {engine: place for place, engine in enumerate(engines)}
        seconds = np.full((len(held.steps) + len(rows), len(engines), len(SHARES)), np.nan)
        seconds[: len(held.steps), [index[engine] for engine in held.engines]] = held.seconds
        for place, row in enumerate(rows, start=len(held.steps)):
            seconds[place, [index[engine] for engine in row.engines]] = np.transpose(
                (row.compute, row.wait, row.data, row.idle)
            )
        # in one move: who reads meanwhile has either all of it or nothing
        self._held = _HeldShare(
            engines,
            np.concatenate([held.ends, [(row.begin_seconds, row.end_seconds) for row in rows]]),
            np.concatenate([held.steps, np.array([row.step for row in rows], dtype=np.int64)]),
            seconds,
        )

    def spans(self, *, limit: int) -> Spans:
        """Merge the spans of the whole run into at most `limit`.

        Their width is a power of two of a quarter of a second, so that they do not tremble while the run grows.
        """
        held = self._held
        if not len(held.steps):
            return Spans(edges=np.zeros(1), steps=held.steps, engines=held.engines, shares=held.seconds)
        begin, end = held.ends[0, 0], held.ends[-1, 1]
        width = 0.25
        while (end - begin) / width >= limit:
            width *= 2
        places = ((held.ends[:, 1] - begin) / width).astype(np.int64)
        firsts = np.flatnonzero(np.diff(places, prepend=-1))
        lasts = np.append(firsts[1:], len(places)) - 1
        present = ~np.isnan(held.seconds)
        sums = np.add.reduceat(np.where(present, held.seconds, 0.0), firsts, axis=0)
        taken = np.logical_or.reduceat(present, firsts, axis=0)
        totals = sums.sum(axis=2, keepdims=True)
        shares = np.where(taken & (totals > 0), sums / np.where(totals > 0, totals, 1.0), np.nan)
        return Spans(
            edges=np.append(held.ends[firsts, 0], end),
            steps=held.steps[lasts],
            engines=held.engines,
            shares=shares,
        )


@dataclass(frozen=True, slots=True)
class _HeldShare:
    engines: tuple[int, ...]
    ends: NDArray[np.float64]  # (rows, 2): begin and end in seconds
    steps: NDArray[np.int64]
    seconds: NDArray[np.float64]  # (rows, engines, 4); NaN where an engine did not take part
