"""Show a run in whatever looks at this kernel: live widgets, a display that is replaced, lines of text, or nothing."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython import get_ipython

from dnb.api.runs.run_folders import find_folder
from dnb.notebook import output
from dnb.notebook.charts.svg_image import behind_chart
from dnb.notebook.live.deferred_modules import deferred
from dnb.notebook.live.frontend import Display, checked_display, choose_display
from dnb.notebook.live.replaced_display import ReplacedDisplay
from dnb.notebook.pages.snapshot import bundle, new_display_id, publish
from dnb.notebook.text.script_progress import ScriptProgress
from dnb.notebook.text.summary import Stream, TextReporter, progress_line, summary
from dnb.notebook.views import RunView, has_ended

if TYPE_CHECKING:
    from dnb.notebook.live.dashboard import Dashboard

# By id(run): a second look at a run is a second view of the same widgets, for each figure costs the browser 5 MB.
# A dashboard holds its run, and its painter holds the dashboard until the run ends; then both may go.
_dashboards: weakref.WeakValueDictionary[int, Dashboard] = weakref.WeakValueDictionary()
_shown_in: dict[int, tuple[Any, str]] = {}  # by id(run): the cell that has shown it, and its name
_replaced: weakref.WeakValueDictionary[int, ReplacedDisplay] = weakref.WeakValueDictionary()


def show(run: RunView | str | Path, *, display: str | None = None) -> None:
    """Show a run in the current cell, and keep it up to date until it ends; in a plain script, tell it in words once.

    Args:
        run: a run, in any cell and as often as wanted; or the name or folder of one that has ended. One that has ended
            is shown as plain output.
        display: "widget", "display" (replaced every few seconds, without widgets), "text" or "none"; chosen by what
            this kernel is attached to if left out.

    Raises:
        ArgumentError: there is no such display, or no such run.
    """
    shell = get_ipython()
    kind: Display = choose_display(shell=shell) if display is None else checked_display(display, source="display")
    shown = read_run(run)
    _shown_in[id(shown)] = _cell_of(shell), shown.name
    if kind != "none" and (elsewhere := output.current()) is not None:
        elsewhere.show(shown)
        return
    if getattr(shell, "kernel", None) is None and (kind != "none" or _is_unasked(display)):
        _tell(shown, waits=kind != "none")
    elif kind != "none":
        _show_as(kind, shown)


def show_new(run: RunView, *, display: str | None = None) -> None:
    """Show a run that has just begun; in a script, let whoever waits for it see its progress.

    Raises:
        ArgumentError: there is no such display.
    """
    kind = "" if display is None else checked_display(display, source="display")
    if get_ipython() is not None:
        show(run, display=display)
    elif kind != "none" and os.environ.get("DNB_DISPLAY") != "none":
        run.add_wait_hook(ScriptProgress(run))


def show_value(run: RunView) -> None:
    """Show a run that is the value of a cell, unless that cell or a live view shows it already.

    Raises:
        NotImplementedError: its repr says enough: nothing shows widgets, or a view has the end of it.
    """
    shell = get_ipython()
    cell, name = _shown_in.get(id(run), (None, ""))
    was_shown = name == run.name
    if was_shown and cell == _cell_of(shell):
        return
    if choose_display(shell=shell) not in ("widget", "display") or (was_shown and has_ended(run)):
        raise NotImplementedError
    show(run)


def _cell_of(shell: Any) -> Any:
    """Return an id of the cell under way; its number stays the same where no history is kept, as by nbval."""
    parent = shell.get_parent() if hasattr(shell, "get_parent") else None
    message = (parent or {}).get("header", {}).get("msg_id")
    return message or getattr(shell, "execution_count", 0)


def keep(run: RunView) -> None:
    """Show a run as plain output in a cell that saw it end, if nothing else would be left of it in the notebook.

    A page that was reloaded has forgotten how to replace an output; what a live view was is then not in the file. The
    first cell that sees the end is enough.
    """
    dashboard = _dashboards.get(id(run))
    if has_ended(run) and dashboard is not None and dashboard.is_owed and output.current() is None:
        dashboard.is_owed = False
        publish(behind_chart(bundle(run, with_image=True)), display_id=new_display_id(run))


def read_run(run: Any) -> Any:
    """Return the run itself, or the one of that name or folder, read from disk.

    Raises:
        ArgumentError: there is none.
    """
    if not isinstance(run, str | Path):
        return run
    from dnb.api.runs.run import Run  # torch: not before somebody names a run

    return Run.open(find_folder(run))


def warm_up() -> None:
    """Import in a thread what the first dashboard needs: two seconds and more, while a pool starts anyway."""
    threading.Thread(target=_import_live_figure, name="dnb-warm-up", daemon=True).start()


def _import_live_figure() -> None:
    # plotly imports nbformat, and so jsonschema, which checks IRIs by a grammar: a second and 16 MB for what few ask.
    with deferred("rfc3987_syntax", functions=("is_valid_syntax",)):
        importlib.import_module("dnb.notebook.live.browser.live_figure")


def dashboard_of(run: RunView) -> Dashboard:
    """Return the one dashboard of a run."""
    from dnb.notebook.live.dashboard import Dashboard  # plotly: not before somebody looks

    dashboard = _dashboards.get(id(run))
    if dashboard is None or dashboard.is_closed:
        dashboard = _dashboards[id(run)] = Dashboard(run)
    return dashboard


def _show_as(kind: Display, run: RunView) -> None:
    if has_ended(run):
        content = bundle(run, with_image=True)
        publish(behind_chart(content) if kind == "widget" else content, display_id=new_display_id(run))
    elif kind == "widget":
        dashboard_of(run).show()
    elif kind == "display":
        _replaced.setdefault(id(run), ReplacedDisplay(run)).show()
    else:
        run.add_wait_hook(TextView(run))


def _tell(run: RunView, *, waits: bool) -> None:
    """Write the run in words, as there is no kernel: now, and in a terminal's IPython also while it is waited for."""
    sys.stdout.write(f"{summary(run) if has_ended(run) or not waits else progress_line(run)}\n")
    if waits and not has_ended(run):
        run.add_wait_hook(TextReporter(run))


def _is_unasked(display: str | None) -> bool:
    """Return True if nobody asked for "none"."""
    return display is None and not os.environ.get("DNB_DISPLAY")


class TextView:
    """A run as text: a display with a line, lines while a cell waits, and chart and summary at the end.

    Called as a wait hook, thus in the cell that waits: nbclient drops a display's update that comes from no cell.
    """

    def __init__(self, run: RunView, *, stream: Stream | None = None, publish: Callable[..., None] = publish) -> None:
        self._publish = publish
        self._display_id = new_display_id(run)
        self._report = TextReporter(run, stream=stream)
        self._drawn: tuple[str, int] | None = None
        self._publish({"text/plain": progress_line(run)}, display_id=self._display_id)

    def __call__(self, run: RunView) -> None:
        """Report; put the chart in the display when the run has ended or paused, for then waiting is over."""
        state = (run.status, run.step)
        if state != self._drawn and (has_ended(run) or run.status == "paused"):
            self._drawn = state
            self._publish(bundle(run, with_image=True), display_id=self._display_id, update=True)
        self._report(run)
