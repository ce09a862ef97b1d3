"""The style that all subplots share (colours, axes, text), and the composition of subplots into one figure.

Pure functions. A figure is a plain `{"data": [...], "layout": {...}}` in plotly's terms, with numpy arrays in it, so
that the live widget, the stored bundle and the image are drawn from the same facts. Nothing here imports plotly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dnb.notebook.charts.curves import Curve

Figure = dict[str, Any]

# After Okabe and Ito, "Color Universal Design" (2008); their blue is lighter here, to stand out on dark paper, too.
BLUE, VERMILION = "#1E80C8", "#D55E00"
FAINT = "#8C9BA8"  # of what trembles behind a mean, on white and on dark
# Computing stands out; the rest is quiet on white and on dark, so that the loss is the first to be seen.
SHARE_COLORS = {"compute": "#2E9E7B", "wait": "#A39B8B", "data": "#7FA9C9", "idle": "#8C8C8C"}
# Along the pixels: of slanted lines an image, which JupyterLab keeps of a chart in the notebook, is a third larger.
SHARE_PATTERNS = {"compute": "", "wait": "-", "data": ".", "idle": "+"}
PATTERN_SIZE, PATTERN_SOLIDITY = 8, 0.125
# The grey with the best worst case on JupyterLab's white and its dark #111111: 4.3 to 1 on both.
INK = "#797979"
GRID = "rgba(128, 128, 128, 0.22)"
INK_ON_BARS = "#111111"
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

MARGIN = {"l": 58, "r": 22, "t": 30, "b": 72}


@dataclass(frozen=True, slots=True)
class SubplotArea:
    """The place of a subplot, in parts of the plot's width and height."""

    x: tuple[float, float]
    y: tuple[float, float]


@dataclass(frozen=True, slots=True)
class SubplotGroup:
    """Some subplots of a figure: traces, and the parts of the layout that belong to them."""

    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)  # axes, legends, buttons
    notes: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)


def compose(parts: Iterable[SubplotGroup], *, plot_pixels: int, margin: Mapping[str, int] = MARGIN) -> Figure:
    """Compose one figure of several parts, whose plotting area is `plot_pixels` high."""
    parts = list(parts)
    layout = frame(height=plot_pixels + margin["t"] + margin["b"], margin=margin)
    for part in parts:
        layout |= part.layout
    return {
        "data": [trace for part in parts for trace in part.traces],
        "layout": {
            **layout,
            "annotations": [note for part in parts for note in part.notes],
            "shapes": [shape for part in parts for shape in part.shapes],
        },
    }


def frame(*, height: int, margin: Mapping[str, int] = MARGIN) -> dict[str, Any]:
    """Return the layout that never changes; its colours can be read on white and on black paper."""
    return {
        "height": height,
        "autosize": True,
        "margin": dict(margin),
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": INK, "size": 12, "family": FONT},
        "uirevision": "dnb",  # constant: a refresh must not undo the user's zoom
        "barmode": "stack",
        "hovermode": "closest",
        "modebar": {
            "bgcolor": "rgba(0, 0, 0, 0)",
            "color": INK,
            "activecolor": BLUE,
            "orientation": "h",
            "remove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
        },
        "legend": legend(x=0, xanchor="left"),
    }


def axis(title: str, **properties: Any) -> dict[str, Any]:
    """Build one axis in the style of all subplots."""
    return {
        "title": {"text": title, "standoff": 6},
        "gridcolor": GRID,
        "linecolor": INK,
        "ticks": "outside",
        "tickcolor": INK,
        "zeroline": False,
        **properties,
    }


def legend(*, x: float, xanchor: str) -> dict[str, Any]:
    """Build a legend that lies above its subplot."""
    return {
        "orientation": "h",
        "traceorder": "normal",
        "x": x,
        "xanchor": xanchor,
        "y": 1.0,
        "yanchor": "bottom",
        "bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"size": 12},
    }


def line(name: str, curve: Curve, x: Any, **properties: Any) -> dict[str, Any]:
    """Draw one curve through its points at `x`, broken where there is no number."""
    return {
        "type": "scatter",
        "name": name,
        "x": x,
        "y": curve.values,
        "showlegend": bool(len(curve)),
        "connectgaps": False,
        "hovertemplate": "%{x}: %{y:.4g}<extra>" + name + "</extra>",
        **properties,
    }


def note(text: str, *, xref: str = "x", yref: str = "y") -> dict[str, Any]:
    """Write words in the middle of a subplot that has nothing else to show."""
    return {
        "text": text,
        "showarrow": False,
        "x": 0.5,
        "y": 0.5,
        "xref": f"{xref} domain",
        "yref": f"{yref} domain",
    }


def heading(text: str, *, xref: str, yref: str) -> dict[str, Any]:
    """Write the name of a small subplot above its left corner."""
    return {
        "text": text,
        "showarrow": False,
        "x": 0,
        "xanchor": "left",
        "xref": xref,
        "y": 1,
        "yanchor": "bottom",
        "yref": yref,
        "font": {"size": 12},
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return the layout properties that a refresh has to send, by dotted path; None for those that are gone.

    Only what differs inside an axis is sent: the whole of it would undo a user's zoom.
    """
    return {} if old is new else dict(_changes(old, new, prefix))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in new.items():
        held = old.get(key)
        if held is value:
            continue
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            yield from _changes(held, value, f"{prefix}{key}.")
        elif _are_alike(held, value):
            for place, (before, after) in enumerate(zip(held or (), value, strict=True)):
                yield from _changes(before, after, f"{prefix}{key}[{place}].")
        elif not _is_same(held, value):
            yield f"{prefix}{key}", value
    for key in old.keys() - new.keys():
        yield f"{prefix}{key}", None


def _are_alike(old: object, new: object) -> bool:
    """Return True if both are lists of as many annotations or shapes, of which each may have changed a little."""
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and new):
        return False
    return all(isinstance(item, Mapping) for item in (*old, *new))


def _is_same(old: object, new: object) -> bool:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if old.dtype != new.dtype or old.shape != new.shape:
            return False
        return old.tobytes() == new.tobytes()  # bit by bit, thus also a NaN
    return type(old) is type(new) and bool(old == new)
