"""Some columns of a history as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dnb.errors import ArgumentError, nearest
from dnb.notebook.charts import subplots
from dnb.notebook.charts.curves import curve, decimate
from dnb.notebook.charts.subplots import SubplotGroup, axis, line
from dnb.notebook.views import HistoryView

PLOT_PIXELS = 320
# Okabe and Ito's colours, the most distinct ones first.
COLOURS = ("#1E80C8", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LOSSES = ("loss", "val_loss")


def history_figure(history: HistoryView, names: Sequence[str] = ()) -> Any:
    """Return a plotly figure of columns over the steps.

    Args:
        history: the columns.
        names: of those to draw; losses if there are none.

    Raises:
        ArgumentError: one of them was not measured.
    """
    from plotly.graph_objects import Figure  # a second: not before somebody wants it

    known = list(history)
    for name in names:
        if name not in known:
            raise ArgumentError(f"{name!r} was not measured; {nearest(name, known) if known else 'nothing was yet'}")
    drawn = list(names) or [name for name in _LOSSES if name in known]
    part = SubplotGroup(
        traces=[_trace(history, name, COLOURS[place % len(COLOURS)]) for place, name in enumerate(drawn)],
        layout={"xaxis": axis("step", anchor="y", tickformat=","), "yaxis": axis(", ".join(drawn[:3]), anchor="x")},
    )
    drawing = subplots.compose([part], plot_pixels=PLOT_PIXELS)
    return Figure(data=drawing["data"], layout={**drawing["layout"], "template": "none"})


def _trace(history: HistoryView, name: str, colour: str) -> dict[str, Any]:
    whole = curve(history, name)
    kept = whole.at(decimate(whole.values))
    mode = "lines+markers" if len(kept) < 60 else "lines"
    return line(name, kept, kept.steps, mode=mode, line={"color": colour, "width": 2}, marker={"size": 5})
