"""The engines' use of their time, span by span: the data of a chart of the whole run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dnb.protocol.measurements import UsageRow, WorkerTotals

# A span is at least so long, and a part of the run's time: a day makes some 3,000 rows, not 300,000.
LEAST_SECONDS = 0.25
MOST_OF_RUN = 1 / 400


class UsageMeter:
    """Turns what accounts count from a run's beginning into rows of spans.

    Args:
        rows: of the hub before; grows.
        begin_seconds: when the first span begins, in seconds since the run was submitted.
    """

    def __init__(self, rows: Iterable[UsageRow], *, begin_seconds: float) -> None:
        self.rows = list(rows)
        self._since = begin_seconds
        self._before: dict[int, tuple[float, float, float, float]] = {}

    def is_due(self, seconds: float) -> bool:
        """Return whether the open span has lasted long enough."""
        return seconds - self._since >= max(LEAST_SECONDS, seconds * MOST_OF_RUN)

    def skip_to(self, seconds: float) -> None:
        """Leave the time until then, that of loading the run, out of all spans."""
        self._since = seconds

    def close_span(self, seconds: float, step: int, totals: Sequence[WorkerTotals]) -> UsageRow | None:
        """Close the span that is open; None if nobody has been there in it.

        Args:
            seconds: since the run was submitted.
            step: committed.
            totals: of all engines.
        """
        spent = {each.engine: self._spent(each) for each in totals if each.state not in ("dead", "left")}
        begin, self._since = self._since, seconds
        present = {engine: parts for engine, parts in spent.items() if sum(parts) > 0}
        if not present or seconds <= begin:
            return None
        compute, wait, data, idle = zip(*present.values(), strict=True)
        row = UsageRow(
            begin_seconds=begin,
            end_seconds=seconds,
            step=step,
            engines=tuple(present),
            compute=compute,
            wait=wait,
            data=data,
            idle=idle,
        )
        self.rows.append(row)
        return row

    def _spent(self, totals: WorkerTotals) -> tuple[float, float, float, float]:
        now = totals.compute_seconds, totals.wait_seconds, totals.data_seconds, totals.alive_seconds
        before = self._before.get(totals.engine, (0.0, 0.0, 0.0, 0.0))
        self._before[totals.engine] = now
        compute, wait, data, alive = (max(new - old, 0.0) for new, old in zip(now, before, strict=True))
        return compute, wait, data, max(alive - compute - wait - data, 0.0)
