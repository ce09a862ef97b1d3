"""Several runs in one figure: losses, samples per second and learning rates, one above the other. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dnb.notebook.charts import subplots
from dnb.notebook.charts.curves import Curve, curve, decimate, running_mean
from dnb.notebook.charts.subplots import SubplotGroup, axis, heading, line, note
from dnb.notebook.charts.x_axis import Abscissa, abscissa
from dnb.notebook.text.summary import inert, one_line
from dnb.notebook.views import RunView

LOSS_PIXELS, SMALL_PIXELS, GAP_PIXELS = 280, 84, 28
LEGEND_LINE_PIXELS = 20
MAX_POINTS = 300
MAX_SMALL_POINTS = 200
MAX_NAME = 30  # with what follows it, as much as half of a page of usual width has room for
_SMALL = (("samples_per_second", "samples per second", "y4"), ("lr", "learning rate", "y5"))


@dataclass(frozen=True, slots=True)
class _RunLook:
    """One run's colour, dash and symbol: colour is never the only sign."""

    color: str
    dash: str
    symbol: str


# Okabe and Ito's colours, the ones that can be seen on white and on black first.
_STYLES = (
    _RunLook("#0072B2", "solid", "circle"),
    _RunLook("#D55E00", "dash", "diamond"),
    _RunLook("#009E73", "dot", "square"),
    _RunLook("#CC79A7", "dashdot", "triangle-up"),
    _RunLook("#E69F00", "longdash", "x"),
    _RunLook("#56B4E9", "solid", "cross"),
    _RunLook("#999999", "dash", "star"),
)


def comparison(runs: Mapping[str, RunView], *, x: str = "step") -> subplots.Figure:
    """Draw the figure of several runs as they are now.

    Args:
        runs: by the label that each is to bear.
        x: what the x axis counts: "step", "samples" or "time".

    Raises:
        ArgumentError: there is no such x axis.
    """
    longest_seconds = max((run.elapsed_seconds for run in runs.values()), default=0.0)
    alongs = {label: abscissa(run, x, longest_seconds=longest_seconds) for label, run in runs.items()}
    plot_pixels = LOSS_PIXELS + len(_SMALL) * (GAP_PIXELS + SMALL_PIXELS)
    longest = max(alongs.values(), key=lambda along: len(along.title)) if alongs else None
    parts = [_loss(runs, alongs, bottom=1 - LOSS_PIXELS / plot_pixels)]
    for place, (key, text, name) in enumerate(_SMALL):
        top = 1 - (LOSS_PIXELS + GAP_PIXELS + place * (SMALL_PIXELS + GAP_PIXELS)) / plot_pixels
        parts.append(_small(runs, alongs, key, text, name, domain=(max(0.0, top - SMALL_PIXELS / plot_pixels), top)))
    if longest is not None:
        shared = {**axis("", anchor=_SMALL[-1][2], domain=[0, 1], nticks=10), **longest.axis()}
        parts.append(SubplotGroup(layout={"xaxis": shared}))
    margin = {**subplots.MARGIN, "t": 12 + LEGEND_LINE_PIXELS * max(len(runs), 1), "b": 46}
    return subplots.compose(parts, plot_pixels=plot_pixels, margin=margin)


def _loss(runs: Mapping[str, RunView], alongs: Mapping[str, Abscissa], *, bottom: float) -> SubplotGroup:
    traces = []
    for place, (label, run) in enumerate(runs.items()):
        traces += _losses(run, alongs[label], style=_STYLES[place % len(_STYLES)], label=shown_name(label))
    has_points = any(len(trace["x"]) for trace in traces)
    return SubplotGroup(
        traces=traces,
        layout={
            "yaxis": axis("loss", anchor="x", domain=[bottom, 1.0], nticks=8),
            # a line for each run
            "legend": {
                **subplots.legend(x=0, xanchor="left"),
                "y": 1.01,
                "entrywidth": 0.44,
                "entrywidthmode": "fraction",
            },
        },
        notes=[] if has_points else [note("no step was committed in any of these runs")],
    )


def _losses(run: RunView, along: Abscissa, *, style: _RunLook, label: str) -> list[dict[str, Any]]:
    means, window = running_mean(curve(run.history, "loss"), limit=MAX_POINTS)
    validation = curve(run.history, "val_loss")
    kept = validation.at(decimate(validation.values, limit=MAX_POINTS // 3))
    text = f"mean of {window} steps" if window > 1 else "training"
    training = line(
        f"{label}: {text}",
        means,
        along.at(means.steps),
        mode="lines+markers" if len(means) < 2 else "lines",
        line={"color": style.color, "width": 2.5, "dash": style.dash},
        marker={"color": style.color, "size": 6, "symbol": style.symbol},
    )
    checked = line(
        f"{label}: validation" if len(kept) else f"{label}: no validation",
        kept,
        along.at(kept.steps),
        mode="lines+markers",
        line={"color": style.color, "width": 1, "dash": style.dash},
        marker={"color": style.color, "size": 8, "symbol": style.symbol},
    )
    return [{**training, "showlegend": True}, {**checked, "showlegend": True}]


def _small(
    runs: Mapping[str, RunView],
    alongs: Mapping[str, Abscissa],
    key: str,
    text: str,
    name: str,
    *,
    domain: Sequence[float],
) -> SubplotGroup:
    traces = []
    for place, (label, run) in enumerate(runs.items()):
        style, kept = _STYLES[place % len(_STYLES)], _thinned(curve(run.history, key), is_noisy=key != "lr")
        traces.append(
            {
                **line(
                    f"{shown_name(label)}: {text}",
                    kept,
                    alongs[label].at(kept.steps),
                    mode="lines+markers" if len(kept) < 2 else "lines",
                    line={"color": style.color, "width": 1.8, "dash": style.dash},
                    marker={"color": style.color, "size": 5, "symbol": style.symbol},
                    yaxis=name,
                ),
                "showlegend": False,
            }
        )
    has_points = any(len(trace["x"]) for trace in traces)
    y = axis("", anchor="x", domain=list(domain), nticks=4, rangemode="tozero", exponentformat="e", visible=has_points)
    missing = [] if has_points else [note("not measured", yref=name)]
    return SubplotGroup(
        traces=traces,
        layout={f"yaxis{name[1:]}": y},
        notes=[heading(text, xref="x domain", yref=f"{name} domain"), *missing],
    )


def _thinned(values: Curve, *, is_noisy: bool) -> Curve:
    if is_noisy:
        return running_mean(values, limit=MAX_SMALL_POINTS)[0]
    return values.at(decimate(values.values, limit=MAX_SMALL_POINTS))


def shown_name(label: str) -> str:
    """Return a label as plotly shows it: one line, shortened, without markup."""
    return inert(one_line(label, limit=MAX_NAME))
