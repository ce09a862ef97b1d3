"""The drawers of values that floors below can only describe: plans and timelines, as values of cells."""

from __future__ import annotations

from typing import Any

from IPython.core.formatters import DisplayFormatter


def register_drawers(formatter: DisplayFormatter) -> None:
    """Register the drawers of plans and timelines; nothing of them is imported before one is shown."""
    bundles = formatter.mimebundle_formatter
    bundles.for_type_by_name("dnb.planning.search.plans", "Plan", _draw_plan)
    bundles.for_type_by_name("dnb.planning.step_timeline", "Timeline", _draw_timeline)


def _draw_plan(plan: Any) -> dict[str, Any]:
    from dnb.notebook.pages.plan_drawing import bundle

    return bundle(plan)


def _draw_timeline(timeline: Any) -> dict[str, Any]:
    from dnb.notebook.pages.timeline_drawing import bundle  # plotly's part: not before somebody looks

    return bundle(timeline)
