"""The loss of a run: each step, its running mean, and validation. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dnb.notebook.charts import subplots
from dnb.notebook.charts.curves import Curve, curve, decimate, running_mean
from dnb.notebook.charts.event_markers import MarkerRange, vertical
from dnb.notebook.charts.subplots import BLUE, FAINT, VERMILION, SubplotArea, SubplotGroup, axis, line, note
from dnb.notebook.charts.x_axis import Abscissa
from dnb.notebook.views import RunView, has_ended

MAX_RAW_POINTS = 800
MAX_VALIDATION_POINTS = 300


def loss_part(
    run: RunView, along: Abscissa, *, area: SubplotArea, ranges: Sequence[MarkerRange], button_y: float
) -> SubplotGroup:
    """Draw the subplot, and the x axis that those of all others match.

    Args:
        run: as it is now.
        along: what the x axis counts.
        area: of the loss.
        ranges: the subplots through which a loss that is no number is marked.
        button_y: where the button for a logarithmic scale has its lower edge, in parts of the plot's height.
    """
    training, validation = curve(run.history, "loss"), curve(run.history, "val_loss")
    last_step = max(training.last_step, validation.last_step)
    bad = training.at(np.flatnonzero(~np.isfinite(training.values)))
    notes = [] if len(training) or len(validation) else [_empty_note(run)]
    if len(bad):
        notes.append(_gap_note(bad, along))
    return SubplotGroup(
        traces=[*training_traces(training, along), validation_trace(validation, along)],
        layout={
            "xaxis": _steps_axis(along, last_step=last_step, domain=area.x),
            "yaxis": axis("loss", anchor="x", nticks=7, domain=list(area.y), **_drawn(last_step)),
            "updatemenus": [_log_button(y=button_y)] if last_step else [],
        },
        notes=notes,
        shapes=_gap_lines(bad, along, ranges) if len(bad) else [],
    )


def training_traces(training: Curve, along: Abscissa) -> list[dict[str, Any]]:
    """Draw the loss of each step, thin and light, and its running mean, thick."""
    means, window = running_mean(training)
    is_short = window == 1  # nothing to smooth: one line, with markers so that a lone step is seen
    raw = training.at(np.arange(0) if is_short else decimate(training.values, limit=MAX_RAW_POINTS))
    name = "training" if is_short else f"mean of {window} steps"
    return [
        line(
            "each step",
            raw,
            along.at(raw.steps),
            mode="lines",
            line={"color": FAINT, "width": 1},
            opacity=0.6,
        ),
        line(
            name,
            means,
            along.at(means.steps),
            mode="lines+markers" if is_short else "lines",
            line={"color": BLUE, "width": 3},
            marker={"color": BLUE, "size": 5},
        ),
    ]


def validation_trace(validation: Curve, along: Abscissa) -> dict[str, Any]:
    """Draw the validation loss: dashed, with a marker at each evaluation."""
    kept = validation.at(decimate(validation.values, limit=MAX_VALIDATION_POINTS))
    return line(
        "validation",
        kept,
        along.at(kept.steps),
        mode="lines+markers",
        line={"color": VERMILION, "width": 2, "dash": "dash"},
        marker={"color": VERMILION, "size": 7 if len(kept) < 60 else 5, "symbol": "diamond"},
    )


def _drawn(last_step: int) -> dict[str, Any]:
    """Return ticks and grid, or none of them while there is nothing to measure."""
    has_points = last_step > 0
    return {"showticklabels": has_points, "showgrid": has_points, "ticks": "outside" if has_points else ""}


def _steps_axis(along: Abscissa, *, last_step: int, domain: tuple[float, float]) -> dict[str, Any]:
    every_step = 1 if along.kind == "step" and last_step < 9 else None  # there is no step 2.5
    drawn = _drawn(last_step)
    return {
        **axis("", anchor="y", domain=list(domain), nticks=8, dtick=every_step, **drawn),
        **along.axis(),
    }


def with_loss_scale(drawing: subplots.Figure, *, scale: str, has_button: bool) -> subplots.Figure:
    """Return the figure of a run with its loss on this scale.

    Args:
        drawing: with a linear scale.
        scale: "linear" or "log".
        has_button: whether the figure has a button for the other scale. plotly.js lets no keyboard reach it, so that
            there should be another way if there can be.
    """
    layout = drawing["layout"]
    menus = [_log_button(y=menu["y"], scale=scale) for menu in layout["updatemenus"]] if has_button else []
    return {**drawing, "layout": {**layout, "yaxis": {**layout["yaxis"], "type": scale}, "updatemenus": menus}}


def _log_button(*, y: float, scale: str = "linear") -> dict[str, Any]:
    """Build a button of the figure itself: it works in a saved notebook, too."""
    toggle = [{"yaxis.type": "log"}], [{"yaxis.type": "linear"}]
    first, second = toggle if scale == "linear" else toggle[::-1]
    return {
        "type": "buttons",
        "x": 0,
        "xanchor": "left",
        "y": y,
        "yanchor": "bottom",
        "pad": {"b": 0, "t": 0, "l": 0, "r": 0},
        "showactive": False,
        "active": -1,  # else the first click would undo what has not been done
        "bgcolor": "rgba(128, 128, 128, 0.12)",
        "bordercolor": subplots.GRID,
        "font": {"size": 11, "color": subplots.INK},
        "buttons": [
            {
                "label": "log loss",
                "method": "relayout",
                "args": first,
                "args2": second,
            }
        ],
    }


def _empty_note(run: RunView) -> dict[str, Any]:
    is_stuck = has_ended(run) or (run.status == "paused" and bool(run.error))
    return note("no step was made" if is_stuck else "waiting for the first step")


def _gap_note(bad: Curve, along: Abscissa) -> dict[str, Any]:
    step = int(bad.steps[0])
    word = "nan" if np.isnan(bad.values[0]) else "infinite"
    more = f" and in {len(bad) - 1:,} more" if len(bad) > 1 else ""
    return {
        **note(f"loss is {word} at step {step:,}{more}"),
        "x": float(along.at(bad.steps[:1])[0]),
        "xref": "x",
        "y": 0.6,  # below the names of events
        "xanchor": "auto",
        "font": {"color": VERMILION, "size": 12},
    }


def _gap_lines(bad: Curve, along: Abscissa, ranges: Sequence[MarkerRange]) -> list[dict[str, Any]]:
    place = float(along.at(bad.steps[:1])[0])
    line = {"color": VERMILION, "width": 1.5, "dash": "dot"}
    return [vertical(place, x=each.x, between=each.y, line=line) for each in ranges]
