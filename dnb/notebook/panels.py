"""From a run's numbers to one figure: loss by step on the left, how each engine spends its time on the right.

Pure functions. A figure is a plain `{"data": [...], "layout": {...}}` in plotly's terms, with numpy arrays in it, so
that the live widget, the stored bundle and the image are drawn from the same facts. Nothing here imports plotly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dnb.notebook.markers import event_markers
from dnb.notebook.text import duration
from dnb.notebook.views import (
    SET_APART,
    SHARES,
    HistoryView,
    RunView,
    WorkerView,
    has_ended,
    shown_workers,
)

Figure = dict[str, Any]

HEIGHT_PIXELS = 320
MAX_POINTS = 1000
# The smooth line and the validation line need fewer points than the raw one: three full traces would break 20 kB.
MAX_SMOOTH_POINTS = 500
MAX_VALIDATION_POINTS = 400

# Okabe and Ito, "Color Universal Design" (2008).
BLUE, SKY_BLUE, VERMILION = "#0072B2", "#56B4E9", "#D55E00"
SHARE_COLORS = {"compute": "#009E73", "wait": "#E69F00", "data": "#56B4E9", "idle": "#999999"}
SHARE_PATTERNS = {"compute": "", "wait": "/", "data": ".", "idle": "x"}
# The grey with the best worst case on JupyterLab's white and its dark #111111: 4.3 to 1 on both.
INK = "#797979"
GRID = "rgba(128, 128, 128, 0.22)"
INK_ON_BARS = "#111111"
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

_LEFT_DOMAIN, _RIGHT_DOMAIN = (0.0, 0.55), (0.66, 1.0)
_MIN_TOLD_SHARE = 0.13  # a narrower part has no room for its figure
_MAX_TOLD_ENGINES = 12  # more bars are too thin for figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One column of a history, in types that travel to the browser as raw bytes.

    int64 and lists would go as text: some hundred times slower.
    """

    steps: NDArray[np.int32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_step(self) -> int:
        """0 if there is none yet."""
        return int(self.steps[-1]) if len(self) else 0

    def at(self, indices: NDArray[np.intp]) -> Curve:
        """Only the points at `indices`."""
        return Curve(steps=self.steps[indices], values=self.values[indices])


def curve(history: HistoryView, key: str) -> Curve:
    """A column as a curve; a value beyond float32 becomes what it is for a plot: infinite."""
    steps, values = history.column(key)
    with np.errstate(over="ignore"):
        return Curve(steps=steps.astype(np.int32), values=values.astype(np.float32))


def figure(run: RunView) -> Figure:
    """The whole figure for the run as it is now."""
    training, validation = curve(run.history, "loss"), curve(run.history, "val_loss")
    workers = shown_workers(run)
    return {
        "data": [
            *training_traces(training),
            validation_trace(validation),
            *share_traces(workers),
        ],
        "layout": {
            **frame(),
            **_loss_axes(last_step=max(training.last_step, validation.last_step)),
            **_share_axes(workers, title=time_axis_title(run)),
            **_remarks(run, training=training, validation=validation, workers=workers),
        },
    }


def decimate(values: NDArray[Any], *, limit: int = MAX_POINTS) -> NDArray[np.intp]:
    """Which points to keep so that spikes and gaps stay visible.

    Args:
        values: one number per step.
        limit: the most points to keep.

    Returns:
        Ascending indices: the first, the last, and of each bucket between them the lowest, the highest and, where there
        is one, a value that is not finite, so that a line drawn through the points still breaks there.
    """
    size = len(values)
    if size <= limit:
        return np.arange(size)
    per_bucket = 2 if np.isfinite(values).all() else 3
    width = -(-(size - 2) // ((limit - 2) // per_bucket))
    buckets = _in_rows(values[1:-1], width=width)
    finite = np.isfinite(buckets)
    starts = 1 + width * np.arange(len(buckets))
    lowest = starts + np.where(finite, buckets, np.inf).argmin(axis=1)
    highest = starts + np.where(finite, buckets, -np.inf).argmax(axis=1)
    gaps = (starts + (~finite).argmax(axis=1))[~finite.all(axis=1)]
    kept = np.concatenate([[0], lowest, highest, gaps, [size - 1]])
    # The padding of the last bucket looks like a gap that is not there.
    return np.unique(kept[kept < size])


def running_mean(curve: Curve, *, limit: int = MAX_SMOOTH_POINTS) -> tuple[Curve, int]:
    """The mean of the values around, at no more than `limit` of the steps, and of how many values.

    That many is a power of two, about a thirtieth of the run; at both ends half of them are missing. A mean of the
    last values would lag, and draw a falling training loss above the validation loss. Only values inside a window
    count for it: one huge loss leaves no trace in later means, as it would in a running sum. Values that are not
    finite are left out of a mean; where a whole stride of them is not finite the mean is NaN.
    """
    size = len(curve)
    if not size:
        return curve, 1
    stride = _power_of_two_from(size / limit)
    window = max(stride, _power_of_two_from(size / 40))
    blocks = _in_rows(curve.values.astype(np.float64), width=stride)
    finite = np.isfinite(blocks)
    sums = _sums_around(np.where(finite, blocks, 0.0).sum(axis=1), num=window // stride)
    nums = _sums_around(finite.sum(axis=1), num=window // stride)
    means = np.where(finite.any(axis=1), sums / np.maximum(nums, 1), np.nan)
    ends = np.minimum(stride * np.arange(1, len(blocks) + 1), size) - 1
    return Curve(steps=curve.steps[ends], values=means.astype(np.float32)), window


def training_traces(training: Curve) -> list[dict[str, Any]]:
    """The loss of each step, thin and light, and its running mean, thick."""
    means, window = running_mean(training)
    is_short = window == 1  # nothing to smooth: one line, with markers so that a lone step is seen
    kept = decimate(training.values)
    raw = _line(
        "each step",
        training.at(kept[:0] if is_short else kept),
        mode="lines",
        line={"color": SKY_BLUE, "width": 1},
        opacity=0.8,
    )
    smooth = _line(
        "training" if is_short else f"training, mean of {window} steps",
        means,
        mode="lines+markers" if is_short else "lines",
        line={"color": BLUE, "width": 3},
        marker={"color": BLUE, "size": 5},
    )
    return [raw, smooth]


def validation_trace(validation: Curve) -> dict[str, Any]:
    """The validation loss: dashed, with a marker at each evaluation."""
    return _line(
        "validation",
        validation.at(decimate(validation.values, limit=MAX_VALIDATION_POINTS)),
        mode="lines+markers",
        line={"color": VERMILION, "width": 2, "dash": "dash"},
        marker={"color": VERMILION, "size": 7, "symbol": "diamond"},
    )


def share_traces(workers: Sequence[WorkerView]) -> list[dict[str, Any]]:
    """One stacked bar per engine: a trace for each share of its time."""
    labels = [engine_label(worker, num_engines=len(workers)) for worker in workers]
    return [_share_trace(share, workers=workers, labels=labels) for share in SHARES]


def engine_label(worker: WorkerView, *, num_engines: int) -> str:
    """What stands beside an engine's bar; one that is dead, has left, or is a spare is called so."""
    if worker.state not in SET_APART:
        return f"engine {worker.engine}"
    return f"engine {worker.engine}<br>({worker.state})" if num_engines <= 6 else f"{worker.engine} ({worker.state})"


def time_axis_title(run: RunView) -> str:
    """Over which time the bars are meant."""
    if not has_ended(run):
        return "share of time, last seconds"
    return f"share of time, whole run of {duration(run.elapsed_seconds)}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `new` that differ from `old`: what a refresh has to send."""
    return {key: value for key, value in new.items() if not _is_same(old.get(key), value)}


def _in_rows(values: NDArray[Any], *, width: int) -> NDArray[Any]:
    """Rows of `width` values, the last one filled up with NaN."""
    num_rows = -(-len(values) // width)
    padded = np.full(num_rows * width, np.nan, dtype=values.dtype)
    padded[: len(values)] = values
    return padded.reshape(num_rows, width)


def _sums_around(values: NDArray[Any], *, num: int) -> NDArray[Any]:
    """For each value, the sum of the `num` values around it, as far as there are any."""
    before = num // 2
    padded = np.pad(values, (before, num - 1 - before))
    sums: NDArray[Any] = sliding_window_view(padded, num).sum(axis=1)
    return sums


def _power_of_two_from(value: float) -> int:
    """The smallest power of two that is at least `value`; powers keep a growing curve from trembling."""
    return 1 << max(0, int(np.ceil(np.log2(max(value, 1.0)))))


def _line(name: str, curve: Curve, **properties: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "x": curve.steps,
        "y": curve.values,
        "showlegend": bool(len(curve)),
        "connectgaps": False,
        "hovertemplate": "step %{x}: %{y:.4g}<extra>" + name + "</extra>",
        **properties,
    }


def _share_trace(share: str, *, workers: Sequence[WorkerView], labels: list[str]) -> dict[str, Any]:
    values = np.array([getattr(worker, share) for worker in workers], dtype=np.float32)
    is_told = len(workers) <= _MAX_TOLD_ENGINES
    return {
        "type": "bar",
        "orientation": "h",
        "name": share,
        "legend": "legend2",
        "xaxis": "x2",
        "yaxis": "y2",
        "x": values,
        "y": labels,
        "width": min(0.72, 0.22 * max(len(workers), 1)),  # one engine gets no wall of colour
        "text": [f"{v:.0%}" if is_told and v >= _MIN_TOLD_SHARE else "" for v in values],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "constraintext": "none",
        "insidetextfont": {"color": INK_ON_BARS, "size": 12},
        "marker": {
            "color": SHARE_COLORS[share],
            "line": {"width": 0},
            "pattern": {
                "shape": SHARE_PATTERNS[share],
                "fillmode": "overlay",
                "fgcolor": "rgba(0, 0, 0, 0.38)",
                "size": 7,
                "solidity": 0.22,
            },
        },
        "hovertemplate": "%{y}: " + share + " %{x:.1%}<extra></extra>",
    }


def axis(title: str, **properties: Any) -> dict[str, Any]:
    """One axis as all panels have it."""
    return {
        "title": {"text": title, "standoff": 6},
        "gridcolor": GRID,
        "linecolor": INK,
        "ticks": "outside",
        "tickcolor": INK,
        "zeroline": False,
        **properties,
    }


def frame() -> dict[str, Any]:
    """What never changes; colours that can be read on white and on black paper."""
    return {
        "height": HEIGHT_PIXELS,
        "autosize": True,
        "margin": {"l": 58, "r": 26, "t": 30, "b": 46},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": INK, "size": 12, "family": FONT},
        "uirevision": "dnb",  # constant: a refresh must not undo the user's zoom
        "barmode": "stack",
        "hovermode": "closest",
        "modebar": {
            "bgcolor": "rgba(0, 0, 0, 0)",
            "color": INK,
            "activecolor": BLUE,
            "orientation": "v",
            "remove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
        },
        "legend": legend(x=0, xanchor="left"),
        "legend2": legend(x=1, xanchor="right"),
    }


def _loss_axes(*, last_step: int) -> dict[str, Any]:
    has_points = last_step > 0
    ticks = "outside" if has_points else ""
    drawn = {"showticklabels": has_points, "showgrid": has_points, "ticks": ticks}
    every_step = 1 if last_step < 9 else None  # there is no step 2.5
    domain = list(_LEFT_DOMAIN)
    return {
        "xaxis": axis("step", anchor="y", domain=domain, tickformat=",", nticks=8, dtick=every_step, **drawn),
        "yaxis": axis("loss", anchor="x", nticks=7, **drawn),
    }


def _share_axes(workers: Sequence[WorkerView], *, title: str) -> dict[str, Any]:
    num_slots = max(len(workers), 1)
    return {
        "xaxis2": axis(
            title,
            anchor="y2",
            domain=list(_RIGHT_DOMAIN),
            range=[0, 1],
            tickvals=[0, 0.25, 0.5, 0.75, 1],
            ticktext=["0%", "25%", "50%", "75%", "100%"],
            fixedrange=True,
        ),
        "yaxis2": {
            **axis("", anchor="x2", type="category", range=[num_slots - 0.5, -0.5]),
            "fixedrange": True,
            "showgrid": False,
            "showticklabels": bool(workers),
            "ticks": "",
        },
    }


def legend(*, x: float, xanchor: str) -> dict[str, Any]:
    """One that lies above its panel."""
    return {
        "orientation": "h",
        "traceorder": "normal",
        "x": x,
        "xanchor": xanchor,
        "y": 1.02,
        "yanchor": "bottom",
        "bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"size": 12},
    }


def _remarks(run: RunView, *, training: Curve, validation: Curve, workers: Sequence[WorkerView]) -> dict[str, Any]:
    """What happened, and what is missing or not a number, said in the figure itself."""
    last_step = max(training.last_step, validation.last_step)
    annotations, shapes = event_markers(run.events if last_step else (), last_step=last_step)
    bad = training.at(np.flatnonzero(~np.isfinite(training.values)))
    if not len(training):
        words = "no step was committed" if has_ended(run) else "waiting for the first step"
        annotations.append(_note(words, axis=""))
    if len(bad):
        annotations.append(_gap_note(bad))
        shapes.append(_gap_line(int(bad.steps[0])))
    if not any(getattr(worker, share) for worker in workers for share in SHARES):
        annotations.append(_note("no engine has reported yet", axis="2"))
    return {"annotations": annotations, "shapes": shapes}


def _note(text: str, *, axis: str) -> dict[str, Any]:
    return {
        "text": text,
        "showarrow": False,
        "x": 0.5,
        "y": 0.5,
        "xref": f"x{axis} domain",
        "yref": f"y{axis} domain",
    }


def _gap_note(bad: Curve) -> dict[str, Any]:
    step = int(bad.steps[0])
    word = "nan" if np.isnan(bad.values[0]) else "infinite"
    more = f" and in {len(bad) - 1:,} more" if len(bad) > 1 else ""
    return {
        **_note(f"loss is {word} at step {step:,}{more}", axis=""),
        "x": step,
        "xref": "x",
        "y": 1,
        "xanchor": "right",
        "yanchor": "top",
        "font": {"color": VERMILION, "size": 12},
    }


def _gap_line(step: int) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "x",
        "yref": "y domain",
        "x0": step,
        "x1": step,
        "y0": 0,
        "y1": 1,
        "line": {"color": VERMILION, "width": 1.5, "dash": "dot"},
    }


def _is_same(old: object, new: object) -> bool:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return old.dtype == new.dtype and np.array_equal(old, new, equal_nan=True)
    return type(old) is type(new) and bool(old == new)
