"""Any figure of ours as a PNG, drawn by matplotlib: for readers without plotly."""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dnb.notebook.charts import subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

log = logging.getLogger(__name__)

WIDTH_PIXELS = 760  # a page that shows it as it is has room for it
# A chart has a dozen colours and their shades at the edges; with these alone, it has a quarter of the bytes.
NUM_COLOURS = 64
_POINTS = 0.72  # of matplotlib, at 100 dots per inch, in one pixel
_HATCHES = {"": "", "-": "--", ".": "..", "+": "++"}
_DASHES: Mapping[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (9, 3))}
_SYMBOLS = {"diamond": "D", "square": "s", "triangle-up": "^", "x": "X", "cross": "P", "star": "*"}


def png(drawing: subplots.Figure) -> str | None:
    """Render a figure as a base64 PNG, or return None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ImportError:
        log.info("no image/png: matplotlib is not installed")
        return None
    height = drawing["layout"]["height"]
    picture = Picture(figsize=(WIDTH_PIXELS / 100, height / 100), dpi=100)
    FigureCanvasAgg(picture)  # never pyplot: its current figure belongs to the user
    _Drawing(picture, drawing).draw()
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", transparent=True)
    return base64.b64encode(_with_few_colours(buffer)).decode("ascii")


def _with_few_colours(png: io.BytesIO) -> bytes:
    from PIL import Image  # matplotlib needs it

    buffer = io.BytesIO()
    Image.open(png).convert("RGBA").quantize(
        NUM_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    ).save(buffer, "png", optimize=True)
    return buffer.getvalue()


class _Drawing:
    """One picture: plotly's subplots, each at its place."""

    def __init__(self, picture: Picture, drawing: subplots.Figure) -> None:
        self._picture = picture
        self._data = drawing["data"]
        self._layout = drawing["layout"]
        margin, height = self._layout["margin"], self._layout["height"]
        self._left, self._right = margin["l"] / WIDTH_PIXELS, 1 - margin["r"] / WIDTH_PIXELS
        self._bottom, self._top = margin["b"] / height, 1 - margin["t"] / height
        self._axes: dict[str, Axes] = {}

    def draw(self) -> None:
        for name in sorted((key for key in self._layout if key.startswith("yaxis")), key=_number):
            self._add_axes(name)
        ends: dict[str, np.ndarray[Any, Any]] = {}
        for trace in self._data:
            self._draw_trace(trace, ends)
        self._match_axes()
        for name, axes in self._axes.items():
            self._dress(name, axes)
        for line in self._layout.get("shapes", ()):
            self._draw_line_through(line)
        for note in self._layout.get("annotations", ()):
            self._write(note)
        self._draw_legends()
        self._write_title()

    def _match_axes(self) -> None:
        """Let all axes that match one have its range; not as shared ones of matplotlib: those have the same figures."""
        matched = [axes for y, axes in self._axes.items() if y == "yaxis" or "matches" in self._layout[self._x_of(y)]]
        drawn = [axes.get_xlim() for axes in matched if axes.has_data()]
        for axes in matched if drawn else ():
            axes.set_xlim(min(first for first, _ in drawn), max(last for _, last in drawn))

    def _x_of(self, y: str) -> str:
        """Return the x axis of a y axis: its own, or the one that it shares."""
        anchor = self._layout[y]["anchor"]
        return f"xaxis{anchor[1:]}"

    def _at(self, x: float, y: float) -> tuple[float, float]:
        """Convert parts of the plot to parts of the picture."""
        return self._left + x * (self._right - self._left), self._bottom + y * (self._top - self._bottom)

    def _add_axes(self, y: str) -> None:
        x = self._layout[self._x_of(y)]
        (first, low), (last, high) = (
            self._at(side, end)
            for side, end in zip(x.get("domain", (0, 1)), self._layout[y].get("domain", (0, 1)), strict=True)
        )
        shared = next((axes for name, axes in self._axes.items() if self._x_of(name) == self._x_of(y)), None)
        self._axes[y] = self._picture.add_axes((first, low, last - first, high - low), sharex=shared)

    def _axes_of(self, trace: Mapping[str, Any]) -> Axes:
        return self._axes[f"yaxis{trace.get('yaxis', 'y')[1:]}"]

    def _draw_trace(self, trace: Mapping[str, Any], ends: dict[str, np.ndarray[Any, Any]]) -> None:
        axes = self._axes_of(trace)
        if trace["type"] == "heatmap":
            _draw_heat(axes, trace, self._layout["coloraxis"])
        elif not len(trace["x"]):
            return
        elif trace["type"] == "bar":
            _draw_bars(axes, trace, ends)
        elif "stackgroup" in trace:
            _draw_area(axes, trace, ends)
        else:
            _draw_curve(axes, trace)

    def _dress(self, y: str, axes: Axes) -> None:
        """Set figures, names and grid as in the layout."""
        x, own = self._layout[self._x_of(y)], self._layout[y]
        is_lowest = x["anchor"].replace("y", "yaxis") == y
        axes.tick_params(colors=subplots.INK, labelsize=8, length=3)
        axes.spines[:].set_visible(False)
        if x.get("showgrid", True):
            axes.grid(axis="x", color="#808080", alpha=0.25)
        if own.get("showgrid", True) and own.get("visible", True):
            axes.grid(axis="y", color="#808080", alpha=0.25)
        axes.set_axisbelow(True)
        axes.set_ylabel(own["title"]["text"], color=subplots.INK, size=9)
        if is_lowest:
            axes.set_xlabel(x["title"]["text"].replace("<br>", "\n"), color=subplots.INK, size=9, parse_math=False)
        self._tick(axes, x=x, y=own, is_lowest=is_lowest)

    @staticmethod
    def _tick(axes: Axes, *, x: Mapping[str, Any], y: Mapping[str, Any], is_lowest: bool) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        if "range" in x:
            axes.set_xlim(*x["range"])
        if "tickvals" in x:
            axes.set_xticks(x["tickvals"], x["ticktext"])
        elif x.get("type") != "category":
            axes.xaxis.set_major_locator(MaxNLocator(nbins=x.get("nticks", 8) - 1, integer=x.get("tickformat") == ","))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        if y.get("type") == "log":
            axes.set_yscale("log")
        if "range" in y:
            axes.set_ylim(*y["range"])
        if y.get("rangemode") == "tozero" and axes.has_data():
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        if "tickvals" in y:
            axes.set_yticks(y["tickvals"], [label.replace("<br>", "\n") for label in y["ticktext"]])
        axes.tick_params(
            labelbottom=is_lowest and x.get("showticklabels", True),
            bottom=is_lowest and bool(x.get("ticks")),
            labelleft=y.get("showticklabels", True) and y.get("visible", True),
            left=bool(y.get("ticks")) and y.get("visible", True),
        )

    def _draw_line_through(self, shape: Mapping[str, Any]) -> None:
        """Draw one vertical line, in each subplot that it crosses."""
        style = shape["line"]
        for name, axes in self._axes.items():
            low, high = self._layout[name].get("domain", (0, 1))
            if self._x_of(name) == f"xaxis{shape['xref'][1:]}" and shape["y0"] <= low and high <= shape["y1"]:
                axes.axvline(
                    shape["x0"],
                    color=style["color"],
                    linestyle=_DASHES[style["dash"]],
                    linewidth=style["width"] * 0.8,
                    zorder=0.5 if shape.get("layer") == "below" else 3,
                )

    def _write(self, note: Mapping[str, Any]) -> None:
        xref, yref = str(note["xref"]), str(note["yref"])
        text = {
            "rotation": -note.get("textangle", 0),
            "color": note.get("font", {}).get("color", subplots.INK),
            "size": _POINTS * note.get("font", {}).get("size", 12),
            "ha": note.get("xanchor", "center") if note.get("xanchor") != "auto" else "right",
            "va": {"middle": "center"}.get(note.get("yanchor", "middle"), note.get("yanchor", "center")),
            "parse_math": False,
            "family": "monospace" if "monospace" in note.get("font", {}).get("family", "") else None,
        }
        words = html.unescape(note["text"]).replace("<br>", "\n")
        if xref == "paper":
            self._picture.text(*self._at(note["x"], note["y"]), words, **text)
            return
        axes = self._axes[f"yaxis{yref.removesuffix(' domain')[1:]}"]
        is_placed = xref.endswith(" domain")
        axes.text(
            note["x"], note["y"], words, transform=axes.transAxes if is_placed else axes.get_xaxis_transform(), **text
        )

    def _draw_legends(self) -> None:
        corners: Mapping[str, Any] = {"left": "lower left", "right": "lower right"}
        for key in ("legend", "legend2", "legend3", "legend4"):
            place = self._layout.get(key)
            drawn = [trace for trace in self._data if trace.get("legend", "legend") == key]
            named = {trace["name"]: trace for trace in drawn if trace.get("showlegend", True) and trace.get("name")}
            if place is None or not named:
                continue
            # matplotlib fills column by column, plotly row by row
            order = [*named][::2] + [*named][1::2] if "entrywidth" in place else [*named]
            handles = [_handle(named[name]) for name in order]
            x, y = self._at(place["x"], place["y"])
            self._picture.legend(
                handles=handles, labels=[html.unescape(name) for name in order], loc=corners[place["xanchor"]],
                bbox_to_anchor=(x, y), ncols=2 if "entrywidth" in place else 6, fontsize=8, labelcolor=subplots.INK,
                frameon=False, handlelength=1.8, columnspacing=1.2, borderaxespad=0.1,
            )  # fmt: skip
        self._draw_scale()

    def _draw_scale(self) -> None:
        """Draw the colour bar of a heat map."""
        scale = self._layout.get("coloraxis", {})
        if not scale.get("showscale"):
            return
        bar = scale["colorbar"]
        left, bottom = self._at(bar["x"] - bar["len"] / 2, bar["y"])
        width = bar["len"] * (self._right - self._left)
        axes = self._picture.add_axes((left, bottom + 0.02, width, 0.012))
        axes.imshow(np.linspace(0, 1, 101)[None], aspect="auto", cmap=_colors(scale), extent=(0, 100, 0, 1))
        axes.set_yticks([])
        axes.set_xticks(bar["tickvals"], bar["ticktext"])
        axes.tick_params(colors=subplots.INK, labelsize=7, length=2)
        axes.spines[:].set_visible(False)

    def _write_title(self) -> None:
        title = self._layout.get("title", {}).get("text", "")
        if title:
            self._picture.text(
                0.01, 1 - 10 / self._layout["height"], html.unescape(title.replace("<br>", "\n")), ha="left", va="top",
                fontsize=10, color=subplots.INK, parse_math=False,
            )  # fmt: skip


def _number(axis: str) -> int:
    return int(axis.removeprefix("yaxis") or 1)


def _draw_curve(axes: Axes, trace: Mapping[str, Any]) -> None:
    line, marker = trace["line"], trace.get("marker", {})
    has_markers = "markers" in trace["mode"]
    axes.plot(
        trace["x"],
        trace["y"],
        color=line["color"],
        linewidth=line["width"] * _POINTS,
        linestyle=_DASHES.get(line.get("dash", ""), "-"),
        alpha=trace.get("opacity", 1.0),
        marker=_SYMBOLS.get(marker.get("symbol", ""), "o") if has_markers else "",
        markersize=marker.get("size", 0) * _POINTS,
    )


def _draw_area(axes: Axes, trace: Mapping[str, Any], ends: dict[str, np.ndarray[Any, Any]]) -> None:
    """Draw one share on top of those before it in its engine's strip."""
    group = f"{trace['yaxis']} {trace['stackgroup']}"
    low = ends.get(group, np.zeros(len(trace["x"])))
    high = ends[group] = low + np.asarray(trace["y"], dtype=np.float64)
    axes.fill_between(
        trace["x"], low, high, step="post", facecolor=trace["fillcolor"], edgecolor=(0, 0, 0, 0.3), linewidth=0,
        hatch=_HATCHES[trace["fillpattern"]["shape"]],
    )  # fmt: skip


def _draw_bars(axes: Axes, trace: Mapping[str, Any], ends: dict[str, np.ndarray[Any, Any]]) -> None:
    """Draw bars that begin where the last ones ended, or at a base of their own."""
    from matplotlib.colors import to_rgba

    marker = trace["marker"]
    rows = np.arange(len(trace["x"])) if "base" not in trace else np.asarray(trace["y"])
    key = trace.get("yaxis", "y")
    begins = np.asarray(trace["base"]) if "base" in trace else ends.get(key, np.zeros(len(rows)))
    ends[key] = begins + np.asarray(trace["x"])
    bars = axes.barh(
        rows, trace["x"], left=begins, height=trace["width"], color=marker["color"],
        hatch=_HATCHES[marker["pattern"]["shape"]], edgecolor=(0, 0, 0, 0.3), linewidth=marker["line"]["width"],
    )  # fmt: skip
    for bar, opacity in zip(bars, np.broadcast_to(marker.get("opacity", 1.0), len(bars)), strict=True):
        bar.set_facecolor(to_rgba(marker["color"], float(opacity)))  # not set_alpha: that is the pattern's, too
    size = 8 if "base" not in trace else 7
    axes.bar_label(bars, trace["text"], label_type="center", color=subplots.INK_ON_BARS, size=size)
    if "base" not in trace:
        axes.set_yticks(rows, [label.replace("<br>", "\n") for label in trace["y"]])


def _draw_heat(axes: Axes, trace: Mapping[str, Any], scale: Mapping[str, Any]) -> None:
    if not len(trace["z"]):
        return
    z = np.array([[np.nan if value is None else value for value in row] for row in trace["z"]], dtype=np.float64)
    edges = trace["x"]
    is_named = len(edges) == z.shape[1]
    columns = np.arange(z.shape[1] + 1) - 0.5 if is_named else np.asarray(edges)
    axes.pcolormesh(
        columns, np.arange(len(z) + 1) - 0.5, np.ma.masked_invalid(z), cmap=_colors(scale), vmin=0, vmax=100
    )
    if is_named:
        axes.set_xticks(range(len(edges)), list(edges))


def _colors(scale: Mapping[str, Any]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("dnb", [tuple(stop) for stop in scale["colorscale"]])


def _handle(trace: Mapping[str, Any]) -> Any:
    """Build the legend's handle of a trace."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    filled = trace["marker"] if trace["type"] == "bar" else None
    if "stackgroup" in trace:
        filled = {"color": trace["fillcolor"], "pattern": trace["fillpattern"]}
    if filled is not None:
        hatch = _HATCHES[filled["pattern"]["shape"]]
        return Patch(facecolor=filled["color"], hatch=hatch, edgecolor=(0, 0, 0, 0.3), linewidth=0)
    line, marker = trace["line"], trace.get("marker", {})
    has_markers = "markers" in trace["mode"]
    return Line2D(
        [], [], color=line["color"], linewidth=line["width"] * _POINTS, alpha=trace.get("opacity", 1.0),
        linestyle=_DASHES.get(line.get("dash", ""), "-"),
        marker=_SYMBOLS.get(marker.get("symbol", ""), "o") if has_markers else "",
        markersize=marker.get("size", 0) * _POINTS,
    )  # fmt: skip
