"""The figure of a run: loss and pace on the left, engines on the right, below them the timeline of a divided model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dnb.notebook.charts import gantt, subplots
from dnb.notebook.charts.event_markers import Ranges, marker_part
from dnb.notebook.charts.loss import loss_part, with_loss_scale
from dnb.notebook.charts.metrics import metrics_part
from dnb.notebook.charts.rates import norm_part, pace_part, rate_part
from dnb.notebook.charts.subplots import SubplotGroup
from dnb.notebook.charts.utilisation import is_heat, now_part, over_time_part
from dnb.notebook.charts.x_axis import Abscissa, abscissa
from dnb.notebook.text.metric_names import metric_names
from dnb.notebook.text.pipeline_text import words_of
from dnb.notebook.views import RunView

LOSS_PIXELS = 228
SMALL_PIXELS = 66  # samples per second, learning rate, gradient norm
GAP_PIXELS = 28  # above each of these: it has its name there
NOW_PIXELS = 172  # how engines spend their time now
AXIS_PIXELS = 46  # figures and title of an x axis
LEGEND_PIXELS = 24
METRICS_PIXELS = 120


@dataclass(frozen=True, slots=True)
class PlotLayout:
    """The places of subplots, in parts of the plot's height; given in pixels from its top."""

    below_pixels: int  # for the timeline, with the gap above it
    metrics_pixels: int = 0  # with the gap above them

    @property
    def upper_pixels(self) -> int:
        """The height of the subplots along steps."""
        return LOSS_PIXELS + self.metrics_pixels + 3 * (GAP_PIXELS + SMALL_PIXELS)

    @property
    def plot_pixels(self) -> int:
        """The height of all subplots together."""
        return self.upper_pixels + self.below_pixels

    def domain(self, first: float, last: float) -> tuple[float, float]:
        """Convert pixel `first` down to pixel `last` to plotly's range: upwards, and up to 1."""
        whole = self.plot_pixels
        return (whole - last) / whole, min(1.0, (whole - first) / whole)

    def small(self, place: int) -> tuple[float, float]:
        """Return the range of one of the small subplots below loss and metrics, counted from 0."""
        first = LOSS_PIXELS + self.metrics_pixels + GAP_PIXELS + place * (SMALL_PIXELS + GAP_PIXELS)
        return self.domain(first, first + SMALL_PIXELS)


def room(run: RunView) -> PlotLayout:
    """Return a layout with as much room as the run needs."""
    timeline = run.timeline
    metrics = GAP_PIXELS + METRICS_PIXELS if metric_names(run.history) else 0
    if not timeline:
        return PlotLayout(below_pixels=0, metrics_pixels=metrics)
    words = len(words_of(timeline, run.prediction)) * gantt.WORDS_PIXELS
    below = AXIS_PIXELS + LEGEND_PIXELS + GAP_PIXELS + words + gantt.LEGEND_PIXELS + gantt.rows_pixels(timeline)
    return PlotLayout(below, metrics)


def figure(run: RunView, *, x: str = "step", loss_scale: str = "linear") -> subplots.Figure:
    """Draw the whole figure for the run as it is now.

    Args:
        run: the run.
        x: what the x axes count: "step", "samples" or "time".
        loss_scale: "linear" or "log".

    Raises:
        ArgumentError: there is no such x axis.
    """
    along, place = abscissa(run, x), room(run)
    whole = assembled({name: part(run, along, place) for name, part in PARTS.items()}, place)
    return with_loss_scale(whole, scale=loss_scale, has_button=True)


def assembled(parts: dict[str, SubplotGroup], place: PlotLayout) -> subplots.Figure:
    """Compose the figure of all parts."""
    has_timeline = bool(place.below_pixels)
    margin = {**subplots.MARGIN, **({"b": AXIS_PIXELS, "l": gantt.MARGIN_PIXELS} if has_timeline else {})}
    return subplots.compose(parts.values(), plot_pixels=place.plot_pixels, margin=margin)


def structure(run: RunView) -> tuple[Any, ...]:
    """Return the facts that decide which subplots there are: when they change, all of them move."""
    timeline = run.timeline
    metrics = tuple(metric_names(run.history))
    return run.utilisation.engines, is_heat(run), len(timeline) if timeline else 0, bool(run.step), metrics


def _loss(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return loss_part(
        run,
        along,
        domain=place.domain(0, LOSS_PIXELS),
        anchor="y6",
        ranges=_ranges(place),
        button_y=place.domain(0, place.upper_pixels + AXIS_PIXELS + LEGEND_PIXELS)[0],
    )


def _metrics(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    if not place.metrics_pixels:
        return SubplotGroup()
    first = LOSS_PIXELS + GAP_PIXELS
    domain = place.domain(first, first + METRICS_PIXELS)
    return metrics_part(run, along, domain=domain, legend_y=domain[1])


def _now(run: RunView, _along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return now_part(run, domain=place.domain(0, NOW_PIXELS), pixels=NOW_PIXELS)


def _pace(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return pace_part(run, along, domain=place.small(0))


def _rate(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return rate_part(run, along, domain=place.small(1))


def _norm(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return norm_part(run, along, domain=place.small(2))


def _over_time(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    first = NOW_PIXELS + AXIS_PIXELS + GAP_PIXELS
    under_axis = place.domain(0, place.upper_pixels + AXIS_PIXELS + LEGEND_PIXELS)[0]
    return over_time_part(
        run,
        along,
        domain=place.domain(first, place.upper_pixels),
        pixels=place.upper_pixels - first,
        legend_y=under_axis,
    )


def _timeline(run: RunView, _along: Abscissa, place: PlotLayout) -> SubplotGroup:
    timeline = run.timeline
    if not timeline:
        return SubplotGroup()
    top = gantt.rows_pixels(timeline) / place.plot_pixels
    return SubplotGroup(
        traces=gantt.traces(timeline),
        layout={
            **gantt.axes(timeline, domain=(0.0, top)),
            "legend3": gantt.legend(top, place.plot_pixels),
        },
        notes=gantt.remarks(timeline, run.prediction, top=top, plot_pixels=place.plot_pixels),
    )


def _events(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return marker_part(run, along, ranges=_ranges(place))


def _ranges(place: PlotLayout) -> Ranges:
    first = NOW_PIXELS + AXIS_PIXELS + GAP_PIXELS
    return Ranges(left=place.domain(0, place.upper_pixels), right=place.domain(first, place.upper_pixels))


# In this order: what comes and goes is at the end.
PARTS = {
    "loss": _loss,
    "now": _now,
    "pace": _pace,
    "rate": _rate,
    "norm": _norm,
    "over_time": _over_time,
    "metrics": _metrics,
    "timeline": _timeline,
    "events": _events,
}
