"""Distributed training from a notebook: `%load_ext dnb`, then `%dtrain`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnb.api.runs.page_writer import write_pages_by
from dnb.api.runs.run_views import view_runs_by

if TYPE_CHECKING:
    from dnb.api.arguments.data import batches
    from dnb.api.launching import Pool
    from dnb.api.planner import plan
    from dnb.api.pools import attach, start
    from dnb.api.resuming import resume
    from dnb.api.runs.history import History as History
    from dnb.api.runs.run import Run
    from dnb.api.training import fit
    from dnb.errors import DnbError as DnbError
    from dnb.errors import RunError
    from dnb.job import Sum
    from dnb.notebook.live.display import show
    from dnb.planning.search.plans import Plan
    from dnb.pool.engines import Engine

__version__ = version("dnb")

__all__ = [
    "Engine",
    "Plan",
    "Pool",
    "Run",
    "RunError",
    "Sum",
    "attach",
    "batches",
    "fit",
    "plan",
    "resume",
    "show",
    "start",
]

# Where the public names live. They are imported when first used: the controller and the hub import this package
# too, and must not wait seconds for torch before they answer.
_HOMES = {
    "DnbError": "dnb.errors",
    "Engine": "dnb.pool.engines",
    "History": "dnb.api.runs.history",
    "Plan": "dnb.planning.search.plans",
    "Pool": "dnb.api.launching",
    "Run": "dnb.api.runs.run",
    "RunError": "dnb.errors",
    "Sum": "dnb.job",
    "attach": "dnb.api.pools",
    "batches": "dnb.api.arguments.data",
    "fit": "dnb.api.training",
    "plan": "dnb.api.planner",
    "resume": "dnb.api.resuming",
    "show": "dnb.notebook.live.display",
    "start": "dnb.api.pools",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dnb' has no attribute {name!r}")
    _open_notebook()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _open_notebook() -> None:
    """Let a kernel's cells show long work, and any shell of IPython draw plans and timelines."""
    if "ipykernel" in sys.modules:
        from dnb.progress import watch_all

        watch_all(_watch)
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
        from dnb.notebook.completion.matchers import register_matchers
        from dnb.notebook.live.run_values import register_run_values
        from dnb.notebook.pages.drawers import register_drawers

        register_drawers(shell.display_formatter)
        register_run_values(shell.display_formatter)
        register_matchers(shell)


def _watch(what: str) -> AbstractContextManager[Any]:
    from dnb.notebook.live.progress import watch  # not before something may take long

    return watch(what)


def load_ipython_extension(ipython: Any) -> None:
    """Register `%dtrain` and `%%dtrain`; called by `%load_ext dnb`."""
    from dnb.notebook.commands.magics import register

    _open_notebook()
    register(ipython)


def _write_page(run: Any, path: str | Path) -> Path:
    from dnb.notebook.pages.report import write_report  # not before somebody wants a page

    return write_report(run, path)


def _show_run(run: Any, *, display: str | None) -> None:
    from dnb.notebook.live.display import show  # not before somebody looks

    show(run, display=display)


def _show_new_run(run: Any, *, display: str | None) -> None:
    from dnb.notebook.live.display import show_new

    show_new(run, display=display)


def _check_display(display: str) -> None:
    from dnb.notebook.live.frontend import checked_display

    checked_display(display, source="display")


def _plot_run(run: Any, **options: Any) -> Any:
    from dnb.notebook.pages.snapshot import plotly_figure  # not before somebody wants a figure

    return plotly_figure(run, **options)


def _plot_history(history: Any, names: Sequence[str]) -> Any:
    from dnb.notebook.pages.history_drawing import history_figure  # not before somebody wants a figure

    return history_figure(history, names)


write_pages_by(_write_page)
view_runs_by(show=_show_run, plot=_plot_run, plot_history=_plot_history, begin=_show_new_run, check=_check_display)
