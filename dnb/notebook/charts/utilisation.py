"""The use of engines' time over a run: a strip of stacked areas for each engine, a heat map of many. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnb.notebook.charts import subplots
from dnb.notebook.charts.subplots import SHARE_COLORS, SHARE_PATTERNS, SubplotArea, SubplotGroup, axis, heading, note
from dnb.notebook.charts.x_axis import Abscissa, Positions
from dnb.notebook.views import SHARES, RunView, has_ended
from dnb.planning.utilisation import Spans

# More engines than this are rows of a heat map: areas would be too thin to read.
MAX_STRIPS = 8
_STRIP_PIXELS = 14  # of an engine's areas, at least
_ROW_PIXELS = 5  # of a heat map, at least
MOST_PIXELS = 200
MAX_SPANS = 48
MAX_CELLS = 2400  # of a heat map, which travels as text
_FIRST_AREA_AXIS = 10  # y10, y11, ...: one engine each
_GAP_PIXELS = 3  # between two engines' areas
_LABEL_PIXELS = 13
# From little to much, also in grey and for the colour-blind: Nuñez, Anderton, Renslow, "cividis" (2018).
_HEAT = [[0.0, "#00224e"], [0.25, "#414d6b"], [0.5, "#7c7b78"], [0.75, "#bbae5b"], [1.0, "#fee838"]]


def is_heat(run: RunView) -> bool:
    """Return True if there are too many engines for a strip each."""
    return len(run.utilisation.engines) > MAX_STRIPS


def height_pixels(run: RunView, *, least: int) -> int:
    """Return the height that the subplot needs, and no less than the ones beside it."""
    num = len(run.utilisation.engines)
    return max(least, _STRIP_PIXELS * num if num <= MAX_STRIPS else min(_ROW_PIXELS * num, MOST_PIXELS))


def over_time_part(run: RunView, along: Abscissa, *, area: SubplotArea, pixels: float, legend_y: float) -> SubplotGroup:
    """Draw the shares over the run: for each engine one strip of stacked areas, or one row of a heat map.

    Args:
        run: as it is now.
        along: what the x axis counts; matched to the one of the loss.
        area: of all strips.
        pixels: how high that is.
        legend_y: where the legend of the shares has its lower edge, in parts of the plot's height.
    """
    engines = run.utilisation.engines
    is_many = is_heat(run)
    limit = min(MAX_SPANS, MAX_CELLS // max(len(engines), 1)) if is_many else MAX_SPANS
    spans = run.utilisation.spans(limit=limit)
    x = along.at_edges(spans.edges, spans.steps) if len(spans) else np.zeros(0, dtype=np.int32)
    if is_many:
        traces, axes, last = [_heat_over_time(spans, x)], _heat_rows(engines, area.y, pixels), "y10"
    else:
        traces, axes, last = _areas(spans, x), _area_axes(engines, area.y, pixels), _area_axis(max(len(engines), 1) - 1)
    text = "share computing" if is_many else "engines' time"
    x_axis = along.matched(anchor=last, domain=area.x, nticks=5, has_points=bool(len(spans)))
    return SubplotGroup(
        traces=traces,
        layout={
            **axes,
            "xaxis7": {**x_axis, "showgrid": False},
            "legend2": {**subplots.legend(x=1.0, xanchor="right"), "y": legend_y},
            "coloraxis": _scale(legend_y, is_shown=is_many),
        },
        notes=[heading(text, xref="x7 domain", yref="y10 domain"), *_missing(run, spans)],
    )


def _missing(run: RunView, spans: Spans) -> list[dict[str, Any]]:
    if len(spans) or not (run.step or has_ended(run)):
        return []
    return [note("not recorded" if has_ended(run) else "not recorded yet", xref="x7", yref="y10")]


def _scale(legend_y: float, *, is_shown: bool) -> dict[str, Any]:
    return {
        "cmin": 0,
        "cmax": 100,
        "colorscale": _HEAT,
        "showscale": is_shown,
        "colorbar": {
            "orientation": "h",
            "x": 1.0,
            "xanchor": "right",
            "len": 0.3,
            "y": legend_y,
            "yanchor": "bottom",
            "thickness": 9,
            "ypad": 0,
            "outlinewidth": 0,
            "tickvals": [0, 25, 50, 75, 100],
            "ticktext": ["0%", "25%", "50%", "75%", "100%"],
            "tickfont": {"size": 11},
        },
    }


# areas of a few engines


def _pattern(share: str) -> dict[str, Any]:
    return {
        "shape": SHARE_PATTERNS[share],
        "fillmode": "overlay",
        "fgcolor": "rgba(0, 0, 0, 0.38)",
        "size": subplots.PATTERN_SIZE,
        "solidity": subplots.PATTERN_SOLIDITY,
    }


def _area_axis(place: int) -> str:
    return f"y{_FIRST_AREA_AXIS + place}"


def _areas(spans: Spans, x: Positions) -> list[dict[str, Any]]:
    # without an engine, too, there is an empty strip: plotly makes no subplot for words alone
    engines = spans.engines or (0,)
    percents = _percents(spans.shares) if spans.engines else np.zeros((0, 1, len(SHARES)), dtype=np.uint8)
    return [
        _area(share, percents[:, row, column], x, engine=engine, row=row)
        for row, engine in enumerate(engines)
        for column, share in enumerate(SHARES)
    ]


def _percents(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return whole percents that add up to 100, or are all 0 where an engine did not take part: one byte each."""
    ends = np.rint(100 * np.cumsum(np.nan_to_num(shares), axis=2))
    return np.diff(ends, axis=2, prepend=0).astype(np.uint8)


def _area(share: str, percents: NDArray[np.uint8], x: Positions, *, engine: int, row: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": share,
        "legend": "legend2",
        "legendgroup": share,
        "showlegend": not row,
        "xaxis": "x7",
        "yaxis": _area_axis(row),
        "x": x,
        # a value holds until the next edge
        "y": np.append(percents, percents[-1:]),
        "mode": "lines",
        "line": {"width": 0, "shape": "hv"},
        "stackgroup": str(row),
        "fillcolor": SHARE_COLORS[share],
        "fillpattern": _pattern(share),
        "hovertemplate": f"%{{y}}%<extra>engine {engine}: {share}</extra>",
    }


def _area_axes(engines: Sequence[int], domain: tuple[float, float], pixels: float) -> dict[str, Any]:
    """Build the strips' axes, the first engine on top."""
    num = max(len(engines), 1)
    bottom, top = domain
    gap = (top - bottom) * _GAP_PIXELS / pixels
    height = (top - bottom - gap * (num - 1)) / num
    axes = {}
    for row in range(num):
        upper = top - row * (height + gap)
        axes[f"yaxis{_FIRST_AREA_AXIS + row}"] = axis(
            "",
            anchor="x7",
            # the lowest ends at `bottom`, not a rounding error below it: plotly refuses less than 0 and more than 1
            domain=[max(upper - height, bottom), min(upper, 1.0)],
            range=[0, 100],
            tickvals=[50] if engines else [],
            visible=bool(engines),
            ticktext=[f"engine {engine}" for engine in engines[row : row + 1]],
            ticks="",
            tickfont={"size": 10},
            showgrid=False,
            fixedrange=True,
        )
    return axes


# heat maps of many


def _heat_trace(z: list[list[int | None]], *, x_axis: str, y_axis: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "xaxis": x_axis,
        "yaxis": y_axis,
        "z": z,
        "coloraxis": "coloraxis",
        "hoverongaps": False,
        "xgap": 0,
        "ygap": 1 if len(z) <= 32 else 0,
        **properties,
    }


def _heat_over_time(spans: Spans, x: Positions) -> dict[str, Any]:
    z: list[list[int | None]] = [
        [None if np.isnan(share) else round(100 * share) for share in row] for row in spans.shares[:, :, 0].T.tolist()
    ]
    return _heat_trace(
        z,
        x_axis="x7",
        y_axis="y10",
        x=x,
        y=np.arange(len(spans.engines), dtype=np.int32),
        text=[[f"engine {engine}"] * len(spans) for engine in spans.engines] if len(z) <= 16 else None,
        hovertemplate="computing %{z}%<extra></extra>",
    )


def _heat_rows(engines: Sequence[int], domain: tuple[float, float], pixels: float) -> dict[str, Any]:
    return {"yaxis10": axis("", anchor="x7", domain=list(domain), **_rows(engines, pixels))}


def _rows(engines: Sequence[int], pixels: float) -> dict[str, Any]:
    """Build an axis of rows with as many names beside them as there is room for."""
    num = max(len(engines), 1)
    every = 1
    while num / every * _LABEL_PIXELS > pixels:
        every *= 2
    return {
        "range": [num - 0.5, -0.5],
        "tickvals": list(range(0, len(engines), every)),
        "ticktext": [f"engine {engine}" for engine in engines[::every]],
        "fixedrange": True,
        "showgrid": False,
        "ticks": "",
        "tickfont": {"size": 10},
    }
