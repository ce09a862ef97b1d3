"""The use of engines' time: now as bars, over the run as stacked areas; heat maps for many. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnb.notebook.charts import subplots
from dnb.notebook.charts.subplots import SHARE_COLORS, SHARE_PATTERNS, SubplotGroup, axis, heading, note
from dnb.notebook.charts.x_axis import Abscissa, Positions
from dnb.notebook.text.summary import duration
from dnb.notebook.views import SET_APART, SHARES, RunView, WorkerView, has_ended, shown_workers
from dnb.planning.utilisation import Spans

# More engines than this are rows of a heat map: areas and bars would be too thin to read.
MAX_BARS = 8
MAX_SPANS = 48
MAX_CELLS = 2400  # of a heat map, which travels as text
_FIRST_AREA_AXIS = 10  # y10, y11, ...: one engine each
_GAP_PIXELS = 5  # between two engines' areas
_MIN_LABELLED_SHARE = 0.13  # a narrower part has no room for its figure
_MAX_LISTED_STATES = 6
_LABEL_PIXELS = 13
# From little to much, also in grey and for the colour-blind: Nuñez, Anderton, Renslow, "cividis" (2018).
_HEAT = [[0.0, "#00224e"], [0.25, "#414d6b"], [0.5, "#7c7b78"], [0.75, "#bbae5b"], [1.0, "#fee838"]]


def is_heat(run: RunView) -> bool:
    """Return True if there are too many engines for a bar each."""
    return max(len(shown_workers(run)), len(run.utilisation.engines)) > MAX_BARS


def now_part(run: RunView, *, domain: tuple[float, float], pixels: float) -> SubplotGroup:
    """Draw the shares of the last seconds, or of a whole run that has ended: a bar or a row per engine."""
    workers = shown_workers(run)
    is_many = is_heat(run)
    is_known = any(getattr(worker, share) for worker in workers for share in SHARES)
    title = time_axis_title(run)
    layout = _heat_axes(workers, title, pixels) if is_many else _bar_axes(workers, title)
    layout["xaxis2"] |= {"domain": list(subplots.RIGHT)}
    layout["yaxis2"] |= {"domain": list(domain), "showticklabels": bool(workers)}
    return SubplotGroup(
        traces=[_heat_now(workers)] if is_many else share_traces(workers),
        layout=layout,
        notes=[] if is_known else [note("no engine has reported yet", xref="x2", yref="y2")],
    )


def share_traces(workers: Sequence[WorkerView]) -> list[dict[str, Any]]:
    """Draw one stacked bar per engine: a trace for each share of its time."""
    labels = [engine_label(worker, num_engines=len(workers)) for worker in workers]
    return [_share_trace(share, workers=workers, labels=labels) for share in SHARES]


def engine_label(worker: WorkerView, *, num_engines: int) -> str:
    """Return the label beside an engine's bar; one that is dead, has left, or is a spare is called so."""
    if worker.state not in SET_APART:
        return f"engine {worker.engine}"
    return f"engine {worker.engine}<br>({worker.state})" if num_engines <= 5 else f"{worker.engine} ({worker.state})"


def time_axis_title(run: RunView) -> str:
    """Return the bars' axis title, which names the time that they cover."""
    if not has_ended(run):
        return "share of time, last seconds"
    return f"share of time, whole run of {duration(run.elapsed_seconds)}"


def over_time_part(
    run: RunView, along: Abscissa, *, domain: tuple[float, float], pixels: float, legend_y: float
) -> SubplotGroup:
    """Draw the shares over the run: for each engine one strip of stacked areas, or one row of a heat map.

    Args:
        run: as it is now.
        along: what the x axis counts; matched to the one of the loss.
        domain: of all strips, in parts of the plot's height.
        pixels: how high that is.
        legend_y: where the legend of the shares has its lower edge, likewise.
    """
    engines = run.utilisation.engines
    is_many = is_heat(run)
    limit = min(MAX_SPANS, MAX_CELLS // max(len(engines), 1)) if is_many else MAX_SPANS
    spans = run.utilisation.spans(limit=limit)
    x = along.at_edges(spans.edges, spans.steps) if len(spans) else np.zeros(0, dtype=np.int32)
    if is_many:
        traces, axes, last = [_heat_over_time(spans, x)], _heat_rows(engines, domain, pixels), "y10"
    else:
        traces, axes, last = _areas(spans, x), _area_axes(engines, domain, pixels), _area_axis(max(len(engines), 1) - 1)
    text = "share computing" if is_many else "share of time"
    return SubplotGroup(
        traces=traces,
        layout={**axes, **_shared(along, anchor=last, legend_y=legend_y, is_heat=is_many, has_spans=bool(len(spans)))},
        notes=[heading(f"{text}, over the run", xref="x7 domain", yref="y10 domain"), *_missing(run, spans)],
    )


def _missing(run: RunView, spans: Spans) -> list[dict[str, Any]]:
    if len(spans) or not (run.step or has_ended(run)):
        return []
    return [note("not recorded" if has_ended(run) else "not recorded yet", xref="x7", yref="y10")]


def _shared(along: Abscissa, *, anchor: str, legend_y: float, is_heat: bool, has_spans: bool) -> dict[str, Any]:
    right = {**subplots.legend(x=subplots.RIGHT[1], xanchor="right"), "y": legend_y}
    x = {
        **axis("", anchor=anchor, domain=list(subplots.RIGHT), nticks=5, matches="x"),
        **along.axis(),
        "title": {"text": along.short, "standoff": 6},
        "showticklabels": has_spans,
        "showgrid": False,
        "ticks": "outside" if has_spans else "",
    }
    scale = {
        "cmin": 0,
        "cmax": 100,
        "colorscale": _HEAT,
        "showscale": is_heat,
        "colorbar": {
            "orientation": "h",
            "x": sum(subplots.RIGHT) / 2,
            "xanchor": "center",
            "len": subplots.RIGHT[1] - subplots.RIGHT[0],
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
    return {"xaxis7": x, "legend2": right, "coloraxis": scale}


# bars and areas of a few engines


def _share_trace(share: str, *, workers: Sequence[WorkerView], labels: list[str]) -> dict[str, Any]:
    values = np.array([getattr(worker, share) for worker in workers], dtype=np.float32)
    return {
        "type": "bar",
        "orientation": "h",
        "name": share,
        "legend": "legend2",
        "legendgroup": share,
        "xaxis": "x2",
        "yaxis": "y2",
        "x": values,
        "y": labels,
        "width": min(0.72, 0.3 * max(len(workers), 1)),  # one engine gets no wall of colour
        "text": [f"{v:.0%}" if v >= _MIN_LABELLED_SHARE else "" for v in values],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "constraintext": "none",
        "insidetextfont": {"color": subplots.INK_ON_BARS, "size": 12},
        "marker": {"color": SHARE_COLORS[share], "line": {"width": 0}, "pattern": _pattern(share)},
        "hovertemplate": "%{y}: " + share + " %{x:.1%}<extra></extra>",
    }


def _pattern(share: str) -> dict[str, Any]:
    return {
        "shape": SHARE_PATTERNS[share],
        "fillmode": "overlay",
        "fgcolor": "rgba(0, 0, 0, 0.38)",
        "size": subplots.PATTERN_SIZE,
        "solidity": subplots.PATTERN_SOLIDITY,
    }


def _bar_axes(workers: Sequence[WorkerView], title: str) -> dict[str, Any]:
    x = axis(
        title,
        anchor="y2",
        range=[0, 1],
        tickvals=[0, 0.25, 0.5, 0.75, 1],
        ticktext=["0%", "25%", "50%", "75%", "100%"],
        fixedrange=True,
    )
    y = axis("", anchor="x2", type="category", range=[max(len(workers), 1) - 0.5, -0.5], fixedrange=True)
    return {"xaxis2": x, "yaxis2": {**y, "showgrid": False, "ticks": ""}}


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
        "legendgroup": share,
        "showlegend": False,
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
        "hovertemplate": f"engine {engine}: {share} %{{y}}%<extra></extra>",
    }


def _area_axes(engines: Sequence[int], domain: tuple[float, float], pixels: float) -> dict[str, Any]:
    """Build the strips' axes, the first engine on top, as among the bars."""
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


def _heat_now(workers: Sequence[WorkerView]) -> dict[str, Any]:
    z = [[round(100 * getattr(worker, share)) for share in SHARES] for worker in workers]
    known: list[list[int | None]] = [[share if any(row) else None for share in row] for row in z]
    hover = [[f"engine {worker.engine}"] * len(SHARES) for worker in workers]
    return _heat_trace(
        known,
        x_axis="x2",
        y_axis="y2",
        x=list(SHARES),
        y=np.arange(len(z), dtype=np.int32),
        text=hover,
        hovertemplate="%{text}: %{x} %{z}%<extra></extra>",
    ) | {"xgap": 2}


def _heat_axes(workers: Sequence[WorkerView], title: str, pixels: float) -> dict[str, Any]:
    apart = [f"{worker.engine} {worker.state}" for worker in workers if worker.state in SET_APART]
    more = [f"and {len(apart) - _MAX_LISTED_STATES} more"] if len(apart) > _MAX_LISTED_STATES else []
    text = f"<br>engines {', '.join([*apart[:_MAX_LISTED_STATES], *more])}" if apart else ""
    x = axis(f"{title}{text}", anchor="y2", type="category", fixedrange=True, showgrid=False)
    y = axis("", anchor="x2", **_rows([worker.engine for worker in workers], pixels))
    return {"xaxis2": {**x, "ticks": ""}, "yaxis2": y}


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
        "tickfont": {"size": 11},
    }
