"""Show a run in whatever looks at this kernel: live widgets, lines of text, or nothing."""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from IPython import get_ipython

from dnb.notebook.frontend import Display, checked_display, choose_display
from dnb.notebook.snapshot import bundle, new_display_id, publish
from dnb.notebook.text import Stream, TextReporter, progress_line
from dnb.notebook.views import RunView, has_ended

if TYPE_CHECKING:
    from dnb.notebook.dashboard import Dashboard

# By id(run): a second look at a run is a second view of the same widgets, for each figure costs the browser 5 MB.
# A dashboard holds its run, and its painter holds the dashboard until the run ends; then both may go.
_dashboards: weakref.WeakValueDictionary[int, Dashboard] = weakref.WeakValueDictionary()


def show(run: RunView, *, display: str | None = None) -> None:
    """Show the run in the current cell, and keep it up to date until it ends.

    Args:
        run: the run; one that has ended is shown as plain output.
        display: "widget", "text" or "none"; chosen by what this kernel is attached to if None.

    Raises:
        ArgumentError: there is no such display.
    """
    shell = get_ipython()
    kind: Display = choose_display(shell=shell) if display is None else checked_display(display, source="display")
    if kind == "none":
        return
    if has_ended(run):
        publish(bundle(run, with_image=kind == "text"), display_id=new_display_id(run))
    elif kind == "widget":
        dashboard_of(run).show()
    else:
        run.add_wait_hook(TextView(run))


def warm_up() -> None:
    """Import in a thread what the first dashboard needs: two seconds and more, while a pool starts anyway."""
    name = "dnb.notebook.live_figure"
    threading.Thread(target=importlib.import_module, args=(name,), name="dnb-warm-up", daemon=True).start()


def dashboard_of(run: RunView) -> Dashboard:
    """The one dashboard of a run."""
    from dnb.notebook.dashboard import Dashboard  # plotly: not before somebody looks

    dashboard = _dashboards.get(id(run))
    if dashboard is None or dashboard.is_closed:
        dashboard = _dashboards[id(run)] = Dashboard(run)
    return dashboard


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
