"""The metrics of a run below its loss: of training, of validation, and where the best was. Pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from dnb.notebook.charts.curves import Curve, curve, decimate, running_mean
from dnb.notebook.charts.subplots import SubplotArea, SubplotGroup, axis, legend, line
from dnb.notebook.charts.x_axis import Abscissa
from dnb.notebook.text.metric_names import VALIDATION, best_of, metric_names
from dnb.notebook.views import RunView

MAX_POINTS = 240
# Each has a line for training and one for validation; more are told in the summary.
MAX_METRICS = 5
# Okabe and Ito's colours but for those of the loss, the most distinct ones first.
_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00")
X_AXIS = "x8"
AXIS = "y90"  # behind those of engines, of which each has one


def metrics_part(run: RunView, along: Abscissa, *, area: SubplotArea) -> SubplotGroup:
    """Draw all metrics in one subplot.

    Args:
        run: as it is now.
        along: what the x axis counts.
        area: of the subplot; its legend is above it.
    """
    names = metric_names(run.history)[:MAX_METRICS]
    traces = [trace for place, name in enumerate(names) for trace in _traces(run, along, name, _COLORS[place])]
    return SubplotGroup(
        traces=traces,
        layout={
            f"yaxis{AXIS[1:]}": axis("metrics", anchor=X_AXIS, domain=list(area.y), nticks=6),
            f"xaxis{X_AXIS[1:]}": along.matched(anchor=AXIS, domain=area.x, nticks=8),
            "legend4": {**legend(x=area.x[0], xanchor="left"), "y": area.y[1]},
        },
    )


def _traces(run: RunView, along: Abscissa, name: str, color: str) -> list[dict[str, Any]]:
    training, window = running_mean(curve(run.history, name), limit=MAX_POINTS)
    validation = curve(run.history, f"{VALIDATION}{name}")
    kept = validation.at(decimate(validation.values, limit=MAX_POINTS))
    best = best_of(name, validation.values)
    return [
        _line(
            f"{name}, mean of {window} steps" if window > 1 else name,
            training,
            along,
            mode="lines" if len(training) > 1 else "lines+markers",
            line={"color": color, "width": 2},
            marker={"color": color, "size": 4},
        ),
        _line(
            f"{VALIDATION}{name}",
            kept,
            along,
            mode="lines+markers",
            line={"color": color, "width": 2, "dash": "dash"},
            marker={"color": color, "size": 6 if len(kept) < 60 else 4, "symbol": "diamond"},
        ),
        _line(
            f"best {VALIDATION}{name}",
            validation.at(np.array([] if best is None else [best], dtype=np.intp)),
            along,
            mode="lines+markers",
            line={"color": color, "width": 1},
            marker={"color": color, "size": 13, "symbol": "star"},
            showlegend=False,
        ),
    ]


def _line(name: str, kept: Curve, along: Abscissa, **properties: Any) -> dict[str, Any]:
    return {**line(name, kept, along.at(kept.steps), xaxis=X_AXIS, yaxis=AXIS, **properties), "legend": "legend4"}
