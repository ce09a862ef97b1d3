"""A run as plain output: what a saved notebook keeps when neither kernel nor widgets are there."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import textwrap
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from IPython.display import display

from dnb.notebook import panels
from dnb.notebook.figures import figure
from dnb.notebook.text import inert, last_value, number, status_sentence, summary
from dnb.notebook.views import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

log = logging.getLogger(__name__)

PLOTLY_MIME = "application/vnd.plotly.v1+json"
_TITLE_PIXELS = 40
_TITLE_COLUMNS = 120
_HATCHES = {"": "", "/": "///", ".": "...", "x": "xxx"}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_SYMBOLS = {"diamond": "D"}


def bundle(run: RunView, *, with_image: bool) -> dict[str, Any]:
    """The run as a mime bundle: chart, words, and an image if asked.

    Args:
        run: drawn as it is now.
        with_image: also draw a PNG, for readers without plotly; left out if matplotlib is not installed.
    """
    drawing = _titled(figure(run), run=run)
    content = {PLOTLY_MIME: plotly_json(drawing), "text/plain": summary(run)}
    image = png(drawing) if with_image else None
    return content if image is None else {**content, "image/png": image}


def new_display_id(run: RunView) -> str:
    """A name for one display of the run, unlike any other."""
    return f"dnb-{run.name}-{uuid.uuid4().hex[:8]}"


def publish(content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
    """Show a mime bundle, or put it in the place of an earlier one."""
    display(content, raw=True, display_id=display_id, update=update)


def plotly_json(drawing: panels.Figure) -> dict[str, Any]:
    """A figure as plain JSON.

    Lists of short numbers, not plotly's base64 arrays: renderers that carry an older plotly.js show them too.
    """
    return {
        "data": _plain(drawing["data"]),
        "layout": _plain(drawing["layout"]),
        # not responsive: JupyterLab's renderer resizes by itself, and would show nothing after a change of theme
        "config": {"displaylogo": False},
    }


def png(drawing: panels.Figure) -> str | None:
    """A figure as a base64 PNG drawn by matplotlib, or None if that is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ImportError:
        log.info("no image/png: matplotlib is not installed")
        return None
    picture = Picture(figsize=(9, drawing["layout"]["height"] / 100), dpi=100)
    FigureCanvasAgg(picture)  # never pyplot: its current figure belongs to the user
    _draw(picture, drawing)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", transparent=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _titled(drawing: panels.Figure, *, run: RunView) -> panels.Figure:
    """The figure with the status as its title: the strip that says it is gone in a saved notebook."""
    lines = _title_lines(run)
    pixels = _TITLE_PIXELS + 16 * (len(lines) - 1)
    layout = drawing["layout"]
    title = {
        "text": "<br>".join(inert(line) for line in lines),
        "x": 0.01,
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 10},
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
        return [_short(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _short(value: float | int) -> float | int | None:
    """Six digits are more than a screen shows; JSON has no NaN."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _draw(picture: Picture, drawing: panels.Figure) -> None:
    layout = drawing["layout"]
    losses, shares, rows = _subplots(picture, layout)
    for trace in drawing["data"]:
        if trace["type"] == "scatter":
            _draw_line(losses, trace)
    _draw_bars(shares, [trace for trace in drawing["data"] if trace.get("xaxis") == "x2"])
    _draw_remarks(losses, shares, layout=layout)
    _name_axes(losses, x=layout["xaxis"], y=layout["yaxis"])
    _name_axes(shares, x=layout["xaxis2"], y=layout["yaxis2"])
    if rows is not None:
        _draw_rows(rows, [trace for trace in drawing["data"] if trace.get("xaxis") == "x3"], layout=layout)
    picture.suptitle(
        html.unescape(layout["title"]["text"].replace("<br>", "\n")),
        x=0.01, ha="left", fontsize=10, color=panels.INK, parse_math=False,
    )  # fmt: skip
    picture.tight_layout(w_pad=2.5)


def _subplots(picture: Picture, layout: Mapping[str, Any]) -> tuple[Axes, Axes, Axes | None]:
    """Two panels side by side, and below them, if there is one, the timeline."""
    if "xaxis3" not in layout:
        losses, shares = picture.subplots(1, 2, width_ratios=[0.6, 0.33])
        return losses, shares, None
    first, last = layout["yaxis3"]["domain"]
    named = picture.subplot_mosaic(
        [["losses", "shares"], ["rows", "rows"]],
        width_ratios=[0.6, 0.33],
        height_ratios=[layout["yaxis"]["domain"][1] - layout["yaxis"]["domain"][0], last - first],
    )
    return named["losses"], named["shares"], named["rows"]


def _draw_line(axes: Axes, trace: Mapping[str, Any]) -> None:
    if not len(trace["x"]):
        return
    line, marker = trace["line"], trace.get("marker", {})
    has_markers = "markers" in trace["mode"]
    axes.plot(
        trace["x"],
        trace["y"],
        label=trace["name"],
        color=line["color"],
        linewidth=line["width"] * 0.7,
        linestyle=_DASHES.get(line.get("dash", ""), "-"),
        alpha=trace.get("opacity", 1.0),
        marker=_SYMBOLS.get(marker.get("symbol", ""), "o") if has_markers else "",
        markersize=marker.get("size", 0) * 0.7,
    )


def _draw_bars(axes: Axes, traces: list[dict[str, Any]]) -> None:
    num_engines = len(traces[0]["x"])
    if not num_engines:
        return
    rows, left = np.arange(num_engines), np.zeros(num_engines)
    for trace in traces:
        marker = trace["marker"]
        bars = axes.barh(
            rows,
            trace["x"],
            left=left,
            height=trace["width"],
            label=trace["name"],
            color=marker["color"],
            hatch=_HATCHES[marker["pattern"]["shape"]],
            edgecolor=(0, 0, 0, 0.3),
            linewidth=0,
        )
        axes.bar_label(bars, trace["text"], label_type="center", color=panels.INK_ON_BARS, size=8)
        left += trace["x"]
    axes.set_yticks(rows, [label.replace("<br>", "\n") for label in traces[0]["y"]])


def _draw_rows(axes: Axes, traces: list[dict[str, Any]], *, layout: Mapping[str, Any]) -> None:
    """The timeline: bars that begin where their action did."""
    for trace in traces:
        marker = trace["marker"]
        if not len(trace["x"]):
            continue
        bars = axes.barh(
            trace["y"],
            trace["x"],
            left=trace["base"],
            height=trace["width"],
            label=trace["name"],
            color=marker["color"],
            hatch=_HATCHES[marker["pattern"]["shape"]],
            edgecolor=(0, 0, 0, 0.3),
            linewidth=marker["line"]["width"],
        )
        for bar, opacity in zip(bars, np.broadcast_to(marker["opacity"], len(bars)), strict=True):
            bar.set_alpha(float(opacity))
        axes.bar_label(bars, trace["text"], label_type="center", color=panels.INK_ON_BARS, size=7)
    _name_axes(axes, x=layout["xaxis3"], y=layout["yaxis3"])
    words = [note["text"] for note in layout["annotations"] if note["xref"] == "paper"]
    axes.set_title(html.unescape("\n".join(words)), loc="left", pad=18, fontsize=8, color=panels.INK, parse_math=False)


def _draw_remarks(losses: Axes, shares: Axes, *, layout: Mapping[str, Any]) -> None:
    for line in layout["shapes"]:
        axis_line = line["line"]
        losses.axvline(
            line["x0"],
            color=axis_line["color"],
            linestyle=_DASHES[axis_line["dash"]],
            linewidth=axis_line["width"] * 0.8,
        )
    for note in layout["annotations"]:
        if note["xref"] == "paper":
            continue  # of the timeline
        in_time = note["xref"] == "x"
        axes = shares if note["xref"].startswith("x2") else losses
        axes.text(
            note["x"],
            note["y"],
            note["text"] + ("  " if in_time else ""),
            transform=axes.get_xaxis_transform() if in_time else axes.transAxes,
            ha="right" if in_time else "center",
            va="top" if in_time else "center",
            rotation=-note.get("textangle", 0),
            color=note.get("font", {}).get("color", panels.INK),
            size=9 * note.get("font", {}).get("size", 12) / 12,
        )


def _name_axes(axes: Axes, *, x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
    axes.set_xlabel(x["title"]["text"], color=panels.INK, size=9)
    axes.set_ylabel(y["title"]["text"], color=panels.INK, size=9)
    axes.tick_params(colors=panels.INK, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.grid(axis="both" if y.get("showgrid", True) else "x", color="#808080", alpha=0.25)
    axes.set_axisbelow(True)
    if "range" in x:
        axes.set_xlim(*x["range"])
        if "tickvals" in x:
            axes.set_xticks(x["tickvals"], x["ticktext"])
    else:  # there is no step 2.5
        axes.locator_params("x", integer=True)
    if "range" in y:
        axes.set_ylim(*y["range"])
    if "tickvals" in y:
        axes.set_yticks(y["tickvals"], [label.replace("<br>", "\n") for label in y["ticktext"]])
    if not x.get("showticklabels", True):
        axes.set_xticks([])
    if not y.get("showticklabels", True):
        axes.set_yticks([])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8, labelcolor=panels.INK,
            frameon=False, handlelength=1.4, columnspacing=1.0, borderaxespad=0.2,
        )  # fmt: skip
