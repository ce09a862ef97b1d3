"""A run as plain output: what a saved notebook keeps when neither kernel nor widgets are there."""

from __future__ import annotations

import base64
import math
import textwrap
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from IPython.display import display
from numpy.typing import NDArray

from dnb.notebook.charts import subplots
from dnb.notebook.charts.run_figure import figure
from dnb.notebook.charts.static_image import png
from dnb.notebook.text.summary import inert, last_value, number, status_sentence, summary
from dnb.notebook.views import RunView

PLOTLY_MIME = "application/vnd.plotly.v1+json"
_LONG_COLUMN = 64
_TITLE_PIXELS = 40
_TITLE_COLUMNS = 92
# plotly.js puts the top of a line at its place, but of several lines the first one's baseline (seen with 3.x).
_TITLE_TOP_PIXELS, _TITLE_BASELINE_PIXELS = 10, 19


def bundle(run: RunView, *, with_image: bool, x: str = "step", loss_scale: str = "linear") -> dict[str, Any]:
    """Return the run as a mime bundle: chart, words, and an image if asked.

    Args:
        run: drawn as it is now.
        x: what the x axes count: "step", "samples" or "time".
        loss_scale: "linear" or "log".
        with_image: also draw a PNG, for readers without plotly; left out if matplotlib is not installed.
    """
    drawing = _titled(figure(run, x=x, loss_scale=loss_scale), run=run)
    content = {PLOTLY_MIME: plotly_json(drawing), "text/plain": summary(run)}
    image = png(drawing) if with_image else None
    return content if image is None else {**content, "image/png": image}


def plotly_figure(run: RunView, *, x: str = "step", loss_scale: str = "linear") -> Any:
    """Return a run's figure as one of plotly, to be shown, changed or written; arguments as of `bundle`."""
    from plotly.graph_objects import Figure  # a second: not before somebody wants it

    drawing = _titled(figure(run, x=x, loss_scale=loss_scale), run=run)
    return Figure(data=drawing["data"], layout={**drawing["layout"], "template": "none"})


def new_display_id(run: RunView) -> str:
    """Return a unique name for one display of the run."""
    return f"dnb-{run.name}-{uuid.uuid4().hex[:8]}"


def publish(content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
    """Show a mime bundle, or put it in the place of an earlier one."""
    display(content, raw=True, display_id=display_id, update=update)


def plotly_json(drawing: subplots.Figure) -> dict[str, Any]:
    """Convert a figure to plain JSON.

    Long columns are base64, as in every figure of plotly 6: a notebook's file has a line for each number of a list.
    """
    return {
        "data": _plain(drawing["data"]),
        "layout": _plain(drawing["layout"]),
        # not responsive: JupyterLab's renderer resizes by itself, and would show nothing after a change of theme
        "config": {"displaylogo": False},
    }


def _titled(drawing: subplots.Figure, *, run: RunView) -> subplots.Figure:
    """Return the figure with the status as its title: the line that says it is missing in a saved notebook."""
    lines = _title_lines(run)
    pixels = _TITLE_PIXELS + 16 * (len(lines) - 1)
    layout = drawing["layout"]
    title = {
        "text": "<br>".join(inert(line) for line in lines),
        "x": 0.01,
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": _TITLE_TOP_PIXELS if len(lines) == 1 else _TITLE_BASELINE_PIXELS},
        "font": {"size": 13},
    }
    margin = {**layout["margin"], "t": layout["margin"]["t"] + pixels}
    height = layout["height"] + pixels
    return {**drawing, "layout": {**layout, "title": title, "margin": margin, "height": height}}


def _title_lines(run: RunView) -> list[str]:
    keys = ["loss", "val_loss", *sorted(k for k in run.history if k.startswith("val_"))]
    values = [f"{key} {number(value)}" for key in dict.fromkeys(keys) if (value := last_value(run, key)) is not None]
    words = ", ".join([f"{run.name}: {status_sentence(run)}", *values])
    return textwrap.wrap(words, _TITLE_COLUMNS, max_lines=3, placeholder=" …") or [run.name]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_short(item) for item in value.tolist()] if len(value) < _LONG_COLUMN else _packed(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _packed(column: NDArray[Any]) -> dict[str, str]:
    """Encode a column as plotly.js takes it; a number that is none is a gap."""
    kind = "i4" if column.dtype.kind == "i" else "f4"
    return {"dtype": kind, "bdata": base64.b64encode(column.astype(f"<{kind}").tobytes()).decode("ascii")}


def _short(value: float | int) -> float | int | None:
    """Round to six digits, more than a screen shows; None for NaN, which JSON has not."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
