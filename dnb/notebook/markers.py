"""What happened to a run, as vertical markers on its loss panel; pure functions, like those of `panels`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dnb.notebook.text import inert, one_line
from dnb.notebook.views import EventView

# Events that are closer than a part of the axis share a marker: more than this many would hide the curve.
MAX_MARKERS = 24
# Of the events of one marker, as many are told in full.
MAX_TOLD = 6
MAX_TEXT = 120


@dataclass(frozen=True, slots=True)
class _Look:
    """How a kind of event is drawn: colour is never the only sign."""

    color: str
    dash: str


# Okabe and Ito's colours, as in `panels`.
_LOOKS = {
    "died": _Look("#D55E00", "solid"),
    "paused": _Look("#E69F00", "dashdot"),
    "left": _Look("#999999", "dash"),
    "joined": _Look("#009E73", "dash"),
    "checkpoint": _Look("#0072B2", "dot"),
}
_URGENCY = tuple(_LOOKS)  # what a marker of several kinds looks like


def event_markers(events: Sequence[EventView], *, last_step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Annotations and shapes of a plotly layout, at most `MAX_MARKERS` of each.

    Events before the first step are left out: those who join then are what was asked for.

    Args:
        events: of the run, in order.
        last_step: where the axis ends.
    """
    groups = _group([event for event in events if event.kind in _LOOKS and event.step > 0], last_step=last_step)
    return [_label(group) for group in groups], [_line(group) for group in groups]


def _group(events: Sequence[EventView], *, last_step: int) -> list[list[EventView]]:
    """Neighbours together; widths are powers of two, so that markers do not jump while the axis grows."""
    width = 1
    while -(-max(last_step, 1) // width) >= MAX_MARKERS:
        width *= 2
    groups: dict[int, list[EventView]] = {}
    for event in events:
        groups.setdefault(min(event.step, max(last_step, 1)) // width, []).append(event)
    return [groups[place] for place in sorted(groups)]


def _kind(group: Sequence[EventView]) -> str:
    return min((event.kind for event in group), key=_URGENCY.index)


def _line(group: Sequence[EventView]) -> dict[str, Any]:
    look = _LOOKS[_kind(group)]
    return {
        "type": "line",
        "xref": "x",
        "yref": "y domain",
        "x0": group[0].step,
        "x1": group[0].step,
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "line": {"color": look.color, "width": 1, "dash": look.dash},
    }


def _label(group: Sequence[EventView]) -> dict[str, Any]:
    return {
        "text": _short(group),
        "hovertext": _told(group),
        "showarrow": False,
        "textangle": -90,
        "x": group[0].step,
        "y": 1,
        "xref": "x",
        "yref": "y domain",
        "xanchor": "right",
        "yanchor": "top",
        "font": {"size": 10},
    }


def _short(group: Sequence[EventView]) -> str:
    """One event by its engine, several by their numbers: "died 1", "2 died, 1 joined"."""
    if len(group) == 1:
        (event,) = group
        return event.kind if event.engine is None else f"{event.kind} {event.engine}"
    counts = Counter(event.kind for event in group)
    if len(counts) == 1:
        (kind,) = counts
        engines = [event.engine for event in group]
        if len(group) <= 3 and None not in engines:
            return f"{kind} {', '.join(map(str, engines))}"
    return ", ".join(f"{counts[kind]} {kind}" for kind in _URGENCY if kind in counts)


def _told(group: Sequence[EventView]) -> str:
    lines = [f"step {event.step:,}: {inert(one_line(event.text, limit=MAX_TEXT))}" for event in group[:MAX_TOLD]]
    more = len(group) - MAX_TOLD
    return "<br>".join([*lines, f"and {more} more"] if more > 0 else lines)
