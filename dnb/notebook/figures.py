"""The figure of a run: loss and shares of time, and below them, if its model is divided, the timeline of a step."""

from __future__ import annotations

from dnb.notebook import gantt, panels
from dnb.notebook.views import RunView

# Between the upper panels and the timeline: their axis, as many lines of words as there may be, and a legend.
GAP_PIXELS = 56 + 4 * gantt.WORDS_PIXELS + gantt.LEGEND_PIXELS


def figure(run: RunView) -> panels.Figure:
    """The whole figure for the run as it is now."""
    drawing = panels.figure(run)
    timeline = run.timeline
    if not timeline:
        return drawing
    layout = drawing["layout"]
    margin = {**layout["margin"], "l": gantt.MARGIN_PIXELS}
    rows = gantt.rows_pixels(timeline)
    plot_pixels = layout["height"] - margin["t"] - margin["b"] + GAP_PIXELS + rows
    top = rows / plot_pixels
    upper = [(rows + GAP_PIXELS) / plot_pixels, 1.0]
    return {
        "data": [*drawing["data"], *gantt.traces(timeline)],
        "layout": {
            **layout,
            "height": layout["height"] + GAP_PIXELS + rows,
            "margin": margin,
            "yaxis": {**layout["yaxis"], "domain": upper},
            "yaxis2": {**layout["yaxis2"], "domain": upper},
            **gantt.axes(timeline, domain=(0.0, top)),
            "legend3": gantt.legend(top, plot_pixels),
            "annotations": [
                *layout["annotations"],
                *gantt.remarks(timeline, run.prediction, top=top, plot_pixels=plot_pixels),
            ],
        },
    }
