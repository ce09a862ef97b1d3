"""A timeline as the value of a cell."""

from __future__ import annotations

from typing import Any

from dnb.notebook.charts import gantt
from dnb.notebook.charts.static_image import png
from dnb.notebook.pages.snapshot import PLOTLY_MIME, plotly_json
from dnb.notebook.text.pipeline_text import words_of
from dnb.planning.step_timeline import Timeline


def bundle(timeline: Timeline) -> dict[str, Any]:
    """Return a timeline as a mime bundle: the chart, the same as an image for readers without plotly, and in words."""
    if not timeline:
        return {"text/plain": "no timeline: there is one once a step of a divided model was looked at"}
    drawing = gantt.alone(timeline)
    content = {PLOTLY_MIME: plotly_json(drawing), "text/plain": "\n".join(words_of(timeline))}
    image = png(drawing)
    return content if image is None else {**content, "image/png": image}
