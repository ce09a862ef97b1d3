"""The views of a run: set from above, as only the notebook's floor draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_views: dict[str, Callable[..., Any]] = {}


def view_runs_by(
    *,
    show: Callable[..., None],
    plot: Callable[..., Any],
    plot_history: Callable[..., Any],
    begin: Callable[..., None],
    check: Callable[..., None],
) -> None:
    """Let these show every run from now on.

    Args:
        show: takes a run, and `display`.
        plot: takes a run, and options; returns a figure.
        plot_history: takes a history, and names of columns; returns a figure.
        begin: takes a run that has just begun, and `display`.
        check: refuses what is no display.
    """
    _views.update(show=show, plot=plot, plot_history=plot_history, begin=begin, check=check)


def check_display(display: str | None) -> None:
    """Refuse what is no display, before a run begins that would be shown so.

    Raises:
        ArgumentError: it is none.
    """
    if display is not None:
        _views["check"](display)


def show_run(run: Any, *, display: str | None) -> None:
    """Show a run in the current cell."""
    _views["show"](run, display=display)


def plot_run(run: Any, **options: Any) -> Any:
    """Return a run's figure."""
    return _views["plot"](run, **options)


def plot_columns(history: Any, names: Sequence[str]) -> Any:
    """Return a figure of some columns of a history."""
    return _views["plot_history"](history, names)


def show_new_run(run: Any, *, display: str | None) -> None:
    """Show a run that has just begun, where there is somebody to see it."""
    _views["begin"](run, display=display)
