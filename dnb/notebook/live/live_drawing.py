"""The figure of a run that goes on: made anew only where something has changed, and not all of it at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dnb.notebook.charts import subplots
from dnb.notebook.charts.loss import with_loss_scale
from dnb.notebook.charts.run_figure import PARTS, assembled, room, structure
from dnb.notebook.charts.subplots import SubplotGroup
from dnb.notebook.charts.x_axis import abscissa
from dnb.notebook.views import RunView

# The loss and new events are news at once; the others take turns, so that no refresh
# costs more than a few milliseconds and 20 kB. For a page that is slow, refreshes are rare, and each has more turns.
TURNS = ("pace", "over_time", "metrics", "rate", "events", "norm", "over_time", "metrics", "timeline")
TURN_SECONDS = 0.3


class LiveDrawing:
    """Draws a run again and again.

    Args:
        run: the run.
        clock: seconds from any origin.
    """

    def __init__(self, run: RunView, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._last_turn = clock()
        self._parts: dict[str, SubplotGroup] = {}
        self._turn = 0
        self._num_events = 0
        self._drawn: tuple[Any, ...] = ()

    def draw(
        self, *, x: str = "step", loss_scale: str = "linear", is_wide: bool = False, is_whole: bool = False
    ) -> subplots.Figure:
        """Draw the figure: all of it at first, when its subplots change, or if asked; else new parts and those due.

        Args:
            x: what the x axes count.
            loss_scale: "linear" or "log".
            is_wide: for a page of `WIDE_PIXELS` or more.
            is_whole: leave nothing for the next time, for there is none.
        """
        along, place = abscissa(self._run, x), room(self._run, is_wide=is_wide)
        state = (along.title, place, structure(self._run))
        is_whole |= state != self._drawn
        due = set(PARTS) if is_whole else self._due()
        self._last_turn = self._clock()
        for name in due:
            self._parts[name] = PARTS[name](self._run, along, place)
        self._drawn, self._num_events = state, len(self._run.events)
        whole = assembled({name: self._parts[name] for name in PARTS}, place)
        return with_loss_scale(whole, scale=loss_scale, has_button=False)  # it is in the strip above

    def _due(self) -> set[str]:
        num_turns = min(max(int((self._clock() - self._last_turn) / TURN_SECONDS), 1), len(TURNS))
        turns = [TURNS[(self._turn + place) % len(TURNS)] for place in range(num_turns)]
        self._turn += num_turns
        news = {"events"} if len(self._run.events) != self._num_events else set()
        return {"loss", *turns, *news}
