"""The timeline of one step as a Gantt chart: a row for each engine, a bar for each action.

Pure functions, in plotly's terms, like those of `subplots`. Nothing here imports plotly.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnb.notebook.charts import subplots
from dnb.notebook.text.pipeline_text import words_of
from dnb.notebook.text.summary import inert
from dnb.planning.step_timeline import Timeline
from dnb.protocol.measurements import Action, EngineTimeline, Prediction
from dnb.units import milliseconds

# What is one trace: its name, the kinds of actions in it, colour (Okabe and Ito), pattern, and the bars' width: what is
# no computing is thin, so that colour is not the only sign.
KINDS = (
    ("forward", ("forward",), "#56B4E9", "", 0.74),
    ("backward", ("backward", "backward-input"), "#009E73", "-", 0.74),
    ("gradients of weights", ("backward-weight",), "#F0E442", "+", 0.74),
    ("send", ("send",), "#CC79A7", "", 0.4),
    ("wait", ("wait",), "#E69F00", "", 0.14),
)
ROW_PIXELS = 42
MOST_ROW_PIXELS = 420  # of all rows
LEGEND_PIXELS = 30
WORDS_PIXELS = 20
WORDS_COLUMNS = 96
MARGIN_PIXELS = 84  # for the engines' names
# A narrower bar has no room for the number of its micro-batch.
MIN_LABELLED_SHARE = 0.018
# More bars than this are not sent to the browser: the shortest of those that are no computing go first.
MOST_BARS = 1200


def alone(timeline: Timeline) -> subplots.Figure:
    """Draw the chart as a figure of its own."""
    top = LEGEND_PIXELS + WORDS_PIXELS * len(word_lines(timeline)) + 8
    margin = {**subplots.MARGIN, "b": 46, "t": top, "l": MARGIN_PIXELS}
    plot_pixels = rows_pixels(timeline)
    return {
        "data": traces(timeline),
        "layout": {
            **subplots.frame(height=plot_pixels + margin["t"] + margin["b"], margin=margin),
            **axes(timeline, domain=(0.0, 1.0)),
            "legend3": legend(1.0, plot_pixels),
            "annotations": remarks(timeline, top=1.0, plot_pixels=plot_pixels),
        },
    }


def rows_pixels(timeline: Timeline) -> int:
    """Return the height of all rows together."""
    return min(MOST_ROW_PIXELS, ROW_PIXELS * max(len(timeline), 2))


def traces(timeline: Timeline) -> list[dict[str, Any]]:
    """Draw one trace for each kind of action, always as many."""
    shown = _shown(timeline)
    num_laps = -(-(1 if timeline.record is None else timeline.record.num_stages) // timeline.num_stage_engines)
    return [_trace(kind, shown, timeline, num_laps=num_laps) for kind in KINDS]


def _shown(timeline: Sequence[EngineTimeline]) -> list[tuple[int, EngineTimeline, Action]]:
    """List row, engine and action of every bar that is drawn."""
    bars = [(row, engine, action) for row, engine in enumerate(timeline) for action in engine.actions]
    if len(bars) <= MOST_BARS:
        return bars
    computing = [bar for bar in bars if bar[2].kind not in ("send", "wait")]
    others = [bar for bar in bars if bar[2].kind in ("send", "wait")]
    others.sort(key=lambda bar: bar[2].begin - bar[2].end)
    return [*computing, *others[: max(0, MOST_BARS - len(computing))]]


def _trace(
    kind: tuple[str, tuple[str, ...], str, str, float],
    shown: Sequence[tuple[int, EngineTimeline, Action]],
    timeline: Timeline,
    *,
    num_laps: int,
) -> dict[str, Any]:
    name, members, color, pattern, width = kind
    bars = [bar for bar in shown if bar[2].kind in members]
    begins = _milliseconds([action.begin for _, _, action in bars])
    is_labelled = name in ("forward", "backward", "gradients of weights")
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "legend": "legend3",
        "showlegend": bool(bars),
        "xaxis": "x3",
        "yaxis": "y3",
        "base": begins,
        "x": _milliseconds([action.end - action.begin for _, _, action in bars]),
        "y": np.array([row for row, _, _ in bars], dtype=np.float32),
        "width": width,
        "text": [_number(action, timeline.seconds) if is_labelled else "" for _, _, action in bars],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "constraintext": "none",
        "insidetextfont": {"color": subplots.INK_ON_BARS, "size": 11},
        "marker": {
            "color": color,
            # An engine's later stages are paler, as in Megatron-LM's figures.
            "opacity": 1.0 if num_laps == 1 else [_opacity(action, timeline, num_laps) for _, _, action in bars],
            "line": {"width": 0.6 if is_labelled else 0, "color": "rgba(0, 0, 0, 0.55)"},
            "pattern": {
                "shape": pattern,
                "fillmode": "overlay",
                "fgcolor": "rgba(0, 0, 0, 0.28)",
                "size": subplots.PATTERN_SIZE,
                "solidity": subplots.PATTERN_SOLIDITY,
            },
        },
        "hovertext": [_hover_text(engine, action) for _, engine, action in bars],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _milliseconds(seconds: Sequence[float]) -> NDArray[np.float32]:
    return (1e3 * np.array(seconds, dtype=np.float64)).astype(np.float32)


def _number(action: Action, seconds: float) -> str:
    is_wide = seconds > 0 and (action.end - action.begin) / seconds >= MIN_LABELLED_SHARE
    return str(action.micro_batch) if is_wide and action.micro_batch >= 0 else ""


def _opacity(action: Action, timeline: Timeline, num_laps: int) -> float:
    lap = max(action.stage, 0) // timeline.num_stage_engines
    return round(1.0 - 0.55 * lap / (num_laps - 1), 2)


def _hover_text(engine: EngineTimeline, action: Action) -> str:
    what = f", stage {action.stage}, micro-batch {action.micro_batch}" if action.stage >= 0 else ""
    return f"engine {engine.engine}: {action.kind}{what}, {milliseconds(action.end - action.begin)}"


def row_labels(timeline: Timeline) -> list[str]:
    """Return the labels beside the rows: the engine and its stages."""
    num_stages = 0 if timeline.record is None else timeline.record.num_stages
    size = timeline.num_stage_engines
    return [
        f"engine {engine.engine}<br>stage{'s' * (num_stages > size)} "
        f"{', '.join(map(str, range(engine.rank, num_stages, size)))}"
        for engine in timeline
    ]


def axes(timeline: Timeline, *, domain: tuple[float, float]) -> dict[str, Any]:
    """Build the axes: milliseconds along, engines down."""
    rows = max(len(timeline), 1)
    return {
        "xaxis3": subplots.axis(
            f"milliseconds in step {timeline.step:,}, until the last gradient",
            anchor="y3",
            domain=[0, 1],
            range=[0, 1e3 * timeline.seconds],
            nticks=10,
        ),
        "yaxis3": {
            **subplots.axis("", anchor="x3", domain=list(domain), range=[rows - 0.5, -0.5]),
            "tickvals": list(range(len(timeline))),
            "ticktext": row_labels(timeline),
            "fixedrange": True,
            "showgrid": False,
            "ticks": "",
        },
    }


def legend(top: float, plot_pixels: int) -> dict[str, Any]:
    """Place the legend just above the rows, which end at `top` of the plot's height."""
    return {**subplots.legend(x=0, xanchor="left"), "y": top + 4 / plot_pixels}


def word_lines(timeline: Timeline, prediction: Prediction | None = None) -> list[str]:
    """Return the words above the chart, on lines that a narrow page has room for."""
    return [line for words in words_of(timeline, prediction) for line in textwrap.wrap(words, WORDS_COLUMNS)]


def remarks(
    timeline: Timeline, prediction: Prediction | None = None, *, top: float, plot_pixels: int
) -> list[dict[str, Any]]:
    """Write the words above the legend, one line each."""
    lines = word_lines(timeline, prediction)
    return [
        {
            "text": inert(line),
            "showarrow": False,
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
            "y": top + (LEGEND_PIXELS + WORDS_PIXELS * (len(lines) - 1 - number)) / plot_pixels,
            "yanchor": "bottom",
            "yref": "paper",
            "font": {"size": 13 if number == 0 else 12},
        }
        for number, line in enumerate(lines)
    ]
