"""Runs as values of cells: each is its view."""

from __future__ import annotations

from typing import Any

from IPython.core.formatters import DisplayFormatter


def register_run_values(formatter: DisplayFormatter) -> None:
    """Let a run that is the value of a cell be shown; nothing is imported before one is."""
    formatter.ipython_display_formatter.for_type_by_name("dnb.api.runs.run", "Run", _show)


def _show(run: Any) -> None:
    from dnb.notebook.live.display import show_value

    show_value(run)
