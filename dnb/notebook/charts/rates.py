"""Samples per second, learning rate and gradient norm of a run, below the loss. Pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from dnb.notebook.charts.curves import Curve, curve, decimate, running_mean
from dnb.notebook.charts.subplots import BLUE, SubplotArea, SubplotGroup, axis, heading, line, note
from dnb.notebook.charts.x_axis import Abscissa
from dnb.notebook.views import RunView, has_ended

MAX_POINTS = 240
# More values than this are drawn as a bare line.
MAX_MARKERS = 60

AXES = {"samples_per_second": "y4", "lr": "y5", "grad_norm": "y6"}
_FORMATS = {"samples_per_second": ",~r", "lr": "~g", "grad_norm": ",~g"}


def pace_part(run: RunView, along: Abscissa, *, area: SubplotArea) -> SubplotGroup:
    """Draw samples per second, as a mean over some steps: single ones tremble."""
    means, window = running_mean(curve(run.history, "samples_per_second"), limit=MAX_POINTS)
    over = f", mean of {window} steps" if window > 1 else ""
    text = f"samples/s{_now(means, ',.0f')}"
    return _part("samples_per_second", text, means, run, along, area=area, hover=f"samples per second{over}")


def rate_part(run: RunView, along: Abscissa, *, area: SubplotArea) -> SubplotGroup:
    """Draw the learning rate of the first group of parameters."""
    rates = curve(run.history, "lr")
    kept = rates.at(decimate(rates.values, limit=MAX_POINTS))
    return _part("lr", f"learning rate{_now(kept, '.3g')}", kept, run, along, area=area)


def norm_part(run: RunView, along: Abscissa, *, area: SubplotArea) -> SubplotGroup:
    """Draw the norm of the gradient before it is clipped, where it was measured."""
    norms = curve(run.history, "grad_norm")
    kept = norms.at(decimate(norms.values, limit=MAX_POINTS))
    return _part("grad_norm", f"gradient norm{_now(kept, '.3g')}", kept, run, along, area=area)


def _now(curve: Curve, form: str) -> str:
    return f": {curve.values[-1]:{form}}" if len(curve) else ""


def _part(
    key: str, text: str, kept: Curve, run: RunView, along: Abscissa, *, area: SubplotArea, hover: str = ""
) -> SubplotGroup:
    name = AXES[key]
    number, has_points = name[1:], bool(len(kept))
    return SubplotGroup(
        traces=[_trace(key, kept, along, hover=hover or text.partition(":")[0])],
        layout={
            f"xaxis{number}": along.matched(anchor=name, domain=area.x, nticks=5, has_points=has_points),
            f"yaxis{number}": _axis(key, area, has_points=has_points),
        },
        notes=[
            heading(text, xref=f"x{number} domain", yref=f"{name} domain"),
            *([] if has_points or not (run.step or has_ended(run)) else [_missing(run, number)]),
        ],
    )


def _missing(run: RunView, number: str) -> dict[str, Any]:
    return note("not measured" if has_ended(run) else "not measured yet", xref=f"x{number}", yref=f"y{number}")


def _trace(key: str, kept: Curve, along: Abscissa, *, hover: str) -> dict[str, Any]:
    finite = int(np.isfinite(kept.values).sum())
    has_markers = finite < 2 or (key == "grad_norm" and len(kept) <= MAX_MARKERS)
    return {
        **line(
            key,
            kept,
            along.at(kept.steps),
            mode="lines+markers" if has_markers else "lines",
            line={"color": BLUE, "width": 1.6},
            marker={"color": BLUE, "size": 4},
            xaxis=f"x{AXES[key][1:]}",
            yaxis=AXES[key],
            hovertemplate="%{y:,.4~g}<extra>" + hover + "</extra>",
        ),
        "showlegend": False,
    }


def _axis(key: str, area: SubplotArea, *, has_points: bool) -> dict[str, Any]:
    return axis(
        "",
        anchor=f"x{AXES[key][1:]}",
        domain=list(area.y),
        nticks=4,
        rangemode="tozero",
        tickfont={"size": 11},
        tickformat=_FORMATS[key],
        visible=has_points,
    )
