"""The figure of a run: losses and metrics, below them pace and the engines' time, below these a timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dnb.notebook.charts import gantt, subplots
from dnb.notebook.charts.event_markers import MarkerRange, marker_part
from dnb.notebook.charts.loss import loss_part, with_loss_scale
from dnb.notebook.charts.metrics import metrics_part
from dnb.notebook.charts.rates import norm_part, pace_part, rate_part
from dnb.notebook.charts.subplots import SubplotArea, SubplotGroup
from dnb.notebook.charts.utilisation import height_pixels, is_heat, over_time_part
from dnb.notebook.charts.x_axis import Abscissa, abscissa
from dnb.notebook.text.metric_names import metric_names
from dnb.notebook.views import RunView

LOSS_PIXELS = 200
METRICS_PIXELS = 120  # below the loss; beside it they are as high
SMALL_PIXELS = 62  # samples per second, learning rate, gradient norm
AXIS_PIXELS = 44  # figures and title of an x axis
FIGURES_PIXELS = 22  # figures alone
HEADING_PIXELS = 24  # above a subplot: its name, or its legend
LEGEND_PIXELS = 34
# A page that is narrower has one column; in one that is wide as much, names and figures have just enough room.
WIDE_PIXELS = 1000
# The places of subplots from left to right, in parts of the plot's width.
_BESIDE = ((0.0, 0.47), (0.54, 1.0))
_STRIP = ((0.0, 0.175), (0.24, 0.415), (0.48, 0.655), (0.73, 1.0))
_PAIRS = ((0.0, 0.43), (0.57, 1.0))
_WHOLE = (0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotLayout:
    """The places of subplots: losses and metrics, below them the slim ones, below these the timeline.

    Args:
        is_wide: metrics are beside the loss, and all slim ones in a row; else in one column and in pairs.
        has_metrics: whether there are any.
        slim_pixels: the height of the row in which the engines' time is.
        below_pixels: for the timeline, with the gap above it.
    """

    is_wide: bool = False
    has_metrics: bool = False
    slim_pixels: int = SMALL_PIXELS
    below_pixels: int = 0

    @property
    def upper_pixels(self) -> int:
        """The height of the subplots along steps."""
        return self._slim(3)[0] + self.slim_pixels

    @property
    def plot_pixels(self) -> int:
        """The height of all subplots together."""
        return self.upper_pixels + self.below_pixels

    @property
    def button_y(self) -> float:
        """The lower edge of legend and button below the slim subplots, in parts of the plot's height."""
        return self._share(self.upper_pixels + FIGURES_PIXELS + LEGEND_PIXELS)

    @property
    def loss(self) -> SubplotArea:
        """The place of losses."""
        return self._area(_BESIDE[0] if self.is_wide and self.has_metrics else _WHOLE, 0, LOSS_PIXELS)

    @property
    def metrics(self) -> SubplotArea:
        """The place of metrics."""
        if self.is_wide:
            return self._area(_BESIDE[1], 0, LOSS_PIXELS)
        return self._area(_WHOLE, LOSS_PIXELS + AXIS_PIXELS + HEADING_PIXELS, METRICS_PIXELS)

    def slim(self, place: int) -> SubplotArea:
        """Return the place of one of the slim subplots, counted from 0: the engines' time is the last."""
        columns = _STRIP if self.is_wide else _PAIRS * 2
        first, pixels = self._slim(place)
        return self._area(columns[place], first, pixels)

    def _slim(self, place: int) -> tuple[int, int]:
        """Return first pixel and height of a slim subplot."""
        first = LOSS_PIXELS + AXIS_PIXELS + HEADING_PIXELS
        if self.is_wide:
            return first, self.slim_pixels
        if self.has_metrics:
            first += METRICS_PIXELS + FIGURES_PIXELS + HEADING_PIXELS
        if place < 2:
            return first, SMALL_PIXELS
        return first + SMALL_PIXELS + FIGURES_PIXELS + HEADING_PIXELS, self.slim_pixels

    def _area(self, columns: tuple[float, float], first: int, pixels: int) -> SubplotArea:
        return SubplotArea(columns, (self._share(first + pixels), min(1.0, self._share(first))))

    def _share(self, pixel: int) -> float:
        """Convert a pixel, counted from the top, to plotly's range: upwards, and up to 1."""
        return (self.plot_pixels - pixel) / self.plot_pixels


def room(run: RunView, *, is_wide: bool = False) -> PlotLayout:
    """Return a layout with as much room as the run needs."""
    timeline, below = run.timeline, 0
    if timeline:
        words = len(gantt.word_lines(timeline, run.prediction)) * gantt.WORDS_PIXELS
        below = FIGURES_PIXELS + LEGEND_PIXELS + HEADING_PIXELS + words + gantt.LEGEND_PIXELS
        below += gantt.rows_pixels(timeline)
    return PlotLayout(
        is_wide=is_wide,
        has_metrics=bool(metric_names(run.history)),
        slim_pixels=height_pixels(run, least=SMALL_PIXELS),
        below_pixels=below,
    )


def figure(run: RunView, *, x: str = "step", loss_scale: str = "linear", is_wide: bool = False) -> subplots.Figure:
    """Draw the whole figure for the run as it is now.

    Args:
        run: the run.
        x: what the x axes count: "step", "samples" or "time".
        loss_scale: "linear" or "log".
        is_wide: for a page of `WIDE_PIXELS` or more; else in one column, which fits on every page.

    Raises:
        ArgumentError: there is no such x axis.
    """
    along, place = abscissa(run, x), room(run, is_wide=is_wide)
    whole = assembled({name: part(run, along, place) for name, part in PARTS.items()}, place)
    return with_loss_scale(whole, scale=loss_scale, has_button=True)


def assembled(parts: dict[str, SubplotGroup], place: PlotLayout) -> subplots.Figure:
    """Compose the figure of all parts."""
    has_timeline = bool(place.below_pixels)
    bottom = AXIS_PIXELS if has_timeline else FIGURES_PIXELS + LEGEND_PIXELS + 4
    margin = {**subplots.MARGIN, "b": bottom, **({"l": gantt.MARGIN_PIXELS} if has_timeline else {})}
    whole = subplots.compose(parts.values(), plot_pixels=place.plot_pixels, margin=margin)
    # of a bar of the timeline its own facts are told, of curves all values at one step
    whole["layout"]["hovermode"] = "closest" if has_timeline else "x unified"
    return whole


def structure(run: RunView) -> tuple[Any, ...]:
    """Return the facts that decide which subplots there are: when they change, all of them move."""
    timeline = run.timeline
    metrics = tuple(metric_names(run.history))
    return run.utilisation.engines, is_heat(run), len(timeline) if timeline else 0, bool(run.step), metrics


def _loss(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return loss_part(run, along, area=place.loss, ranges=_ranges(place), button_y=place.button_y)


def _metrics(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return metrics_part(run, along, area=place.metrics) if place.has_metrics else SubplotGroup()


def _pace(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return pace_part(run, along, area=place.slim(0))


def _rate(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return rate_part(run, along, area=place.slim(1))


def _norm(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return norm_part(run, along, area=place.slim(2))


def _over_time(run: RunView, along: Abscissa, place: PlotLayout) -> SubplotGroup:
    return over_time_part(run, along, area=place.slim(3), pixels=place.slim_pixels, legend_y=place.button_y)


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


def _ranges(place: PlotLayout) -> list[MarkerRange]:
    metrics = [MarkerRange("x8", place.metrics.y)] if place.has_metrics else []
    slim = [MarkerRange(f"x{4 + number}", place.slim(number).y) for number in range(3)]
    return [MarkerRange("x", place.loss.y), *metrics, *slim, MarkerRange("x7", place.slim(3).y, is_filled=True)]


# In this order: what comes and goes is at the end.
PARTS = {
    "loss": _loss,
    "pace": _pace,
    "rate": _rate,
    "norm": _norm,
    "over_time": _over_time,
    "metrics": _metrics,
    "timeline": _timeline,
    "events": _events,
}
