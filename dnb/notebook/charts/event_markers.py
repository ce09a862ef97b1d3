"""A run's events as vertical markers through its subplots, labelled on the loss; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnb.notebook.charts.subplots import INK_ON_BARS, SubplotGroup
from dnb.notebook.charts.x_axis import Abscissa
from dnb.notebook.formatting import inert, one_line
from dnb.notebook.text.run_events import news_of
from dnb.notebook.views import EventView, RunView

# Events that are closer than a part of the axis share a marker: more than this many would hide the curve.
MAX_MARKERS = 24
# More of them than this do not go through the small subplots.
MOST_EVERYWHERE = 8
_LARGE = ("x", "x8")  # of losses and of metrics
# Of the events of one marker, as many are listed in full.
MAX_LISTED = 6
MAX_TEXT = 120
MAX_NAME = 20


@dataclass(frozen=True, slots=True)
class _MarkerLook:
    """The colour and dash of a kind of event: colour is never the only sign."""

    color: str
    dash: str


# Okabe and Ito's colours, as in `subplots`.
_STYLES = {
    "failed": _MarkerLook("#D55E00", "longdash"),
    "died": _MarkerLook("#D55E00", "solid"),
    "hung": _MarkerLook("#CC79A7", "solid"),
    "paused": _MarkerLook("#E69F00", "dashdot"),
    "left": _MarkerLook("#999999", "dash"),
    "joined": _MarkerLook("#009E73", "dash"),
    "recovered": _MarkerLook("#E69F00", "dashdot"),
    "chaos": _MarkerLook("#CC79A7", "dot"),
    "mended": _MarkerLook("#56B4E9", "dash"),
    "set": _MarkerLook("#56B4E9", "dashdot"),
    "checkpoint": _MarkerLook("#0072B2", "dot"),
}
# Of these the words say it better than the kind.
_NAMES = {"recovered": "hub restarted", "mended": "new loss", "chaos": "fault"}
_URGENCY = tuple(_STYLES)  # what a marker of several kinds looks like


@dataclass(frozen=True, slots=True)
class MarkerRange:
    """A subplot through which markers go: its x axis, and its range in parts of the plot's height."""

    x: str
    y: tuple[float, float]
    is_filled: bool = False  # with areas of all colours, which a marker crosses in a dark ink


def marker_part(run: RunView, along: Abscissa, *, ranges: Sequence[MarkerRange]) -> SubplotGroup:
    """Draw the markers of a run's events, on every axis of steps or time.

    Events before the first step are left out: those who join then are what was asked for.
    """
    if not run.step:
        return SubplotGroup()
    groups = _group(run.events, along, last_step=run.step)
    if len(groups) > MOST_EVERYWHERE:
        ranges = [each for each in ranges if each.x in _LARGE]
    elif not len(run.utilisation):
        ranges = [each for each in ranges if not each.is_filled]
    return SubplotGroup(
        notes=[_label(place, group) for place, group in groups],
        shapes=[line for place, group in groups for line in _lines(place, group, ranges)],
    )


def vertical(place: float, *, x: str, between: tuple[float, float], **properties: Any) -> dict[str, Any]:
    """Draw a line through all subplots that share an x axis."""
    first, last = between
    return {"type": "line", "xref": x, "yref": "paper", "x0": place, "x1": place, "y0": first, "y1": last, **properties}


def _group(events: Sequence[EventView], along: Abscissa, *, last_step: int) -> list[tuple[float, list[EventView]]]:
    """Group neighbours; widths are powers of two, so that markers do not jump while the axis grows."""
    shown = [event for event in news_of(events) if event.kind in _STYLES and event.step > 0]
    if not shown:
        return []
    places = along.at_events(shown).tolist()
    span = max([_last_place(along, last_step), *places])
    width = 2.0**-10 if along.kind == "time" else 1.0
    while span / width > MAX_MARKERS - 1:
        width *= 2
    groups: dict[int, tuple[float, list[EventView]]] = {}
    for place, event in sorted(zip(places, shown, strict=True), key=lambda pair: pair[0]):
        groups.setdefault(int(place / width), (place, []))[1].append(event)
    return [groups[number] for number in sorted(groups)]


def _last_place(along: Abscissa, last_step: int) -> float:
    return float(along.at(np.array([last_step]))[0])


def _kind(group: Sequence[EventView]) -> str:
    return min((event.kind for event in group), key=_URGENCY.index)


def _lines(place: float, group: Sequence[EventView], ranges: Sequence[MarkerRange]) -> list[dict[str, Any]]:
    style = _STYLES[_kind(group)]
    return [
        vertical(
            place,
            x=each.x,
            between=each.y,
            layer="above" if each.is_filled else "below",
            line={"color": INK_ON_BARS if each.is_filled else style.color, "width": 1, "dash": style.dash},
        )
        for each in ranges
    ]


def _label(place: float, group: Sequence[EventView]) -> dict[str, Any]:
    return {
        "text": _short(group),
        "hovertext": _hover_text(group),
        "showarrow": False,
        "textangle": -90,
        "x": place,
        "y": 1,
        "xref": "x",
        "yref": "y domain",
        "xanchor": "right",
        "yanchor": "top",
        "font": {"size": 10},
    }


def _short(group: Sequence[EventView]) -> str:
    """Name one event by its engine, several by their numbers: "died 1", "2 died, 1 joined"."""
    told = [event for event in group if event.kind != "chaos"] or group  # the fault is told by what came of it
    if len(told) == 1:
        (event,) = told
        return _name(event) if event.engine is None else f"{_name(event)} {event.engine}"
    counts = Counter(event.kind for event in told)
    if len(counts) == 1:
        (kind,) = counts
        engines = [event.engine for event in told]
        if len(told) <= 3 and None not in engines:
            return f"{_NAMES.get(kind, kind)} {', '.join(map(str, engines))}"
    return ", ".join(f"{counts[kind]} {_NAMES.get(kind, kind)}" for kind in _URGENCY if kind in counts)


def _name(event: EventView) -> str:
    if event.kind == "set":  # "lr=0.1 from step 7"
        return inert(one_line(event.text.partition(" from step ")[0], limit=MAX_NAME)) or event.kind
    return _NAMES.get(event.kind, event.kind)


def _hover_text(group: Sequence[EventView]) -> str:
    lines = [f"step {event.step:,}: {inert(one_line(event.text, limit=MAX_TEXT))}" for event in group[:MAX_LISTED]]
    more = len(group) - MAX_LISTED
    return "<br>".join([*lines, f"and {more} more"] if more > 0 else lines)
