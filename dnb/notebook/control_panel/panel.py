"""`%dtrain panel`: pool, training and run by mouse or keyboard, every button with the line that it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ipywidgets as widgets

from dnb.api import pools
from dnb.notebook.charts.svg_image import behind_chart
from dnb.notebook.control_panel.lanes import Lane, LineResult
from dnb.notebook.control_panel.layout import PanelWidgets
from dnb.notebook.control_panel.state import PanelState, look, obstacles, pool_sentence, run_sentence
from dnb.notebook.control_panel.watcher import PanelDisplays, PanelWatcher
from dnb.notebook.control_panel.widgets import sentence, told, working
from dnb.notebook.live.display import dashboard_of
from dnb.notebook.live.frontend import choose_display
from dnb.notebook.output import say
from dnb.notebook.pages.plan_drawing import draw
from dnb.notebook.pages.snapshot import bundle, publish
from dnb.notebook.text.summary import progress_line
from dnb.notebook.views import RunView, has_ended
from dnb.planning.search.plans import Plan

WITHOUT_WIDGETS = """\
the control panel needs widgets, and this front end shows none. The same by hand:
  %dtrain start -n 2    status    add 1    remove 1    shutdown
  %dtrain plan model batch    fit model train --val val --loss cross_entropy
  %dtrain pause    resume    stop    set lr=1e-4    checkpoint    attach"""

_panel: ControlPanel | None = None
_events: Any = None  # of the shell whose cells it hears


class ControlPanel:
    """The widgets, and what keeps them true.

    Cells change variables and pool: the choices are read again after each. A thread asks the pool and listens to the
    run; lines run in lanes of their own, so that a run can be steered while engines are started.

    Args:
        dtrain: the magic: takes what stands behind `%dtrain`.
        names: gives all variables of the notebook.
        hidden: those that were there before the first cell.
        pool: gives the kernel's pool, also one that was lost, or None.
        view_of: gives the live view of a run.
        publish: how output gets into the notebook.
    """

    def __init__(
        self,
        dtrain: Callable[[str], Any],
        *,
        names: Callable[[], Mapping[str, Any]],
        hidden: Mapping[str, Any],
        pool: Callable[[], Any] = pools.last_pool,
        view_of: Callable[[RunView], widgets.Widget] = lambda run: dashboard_of(run).box,
        publish: Callable[..., None] = publish,
    ) -> None:
        self._names = names
        self._hidden = hidden
        self._pool = pool
        self._view_of = view_of
        self._displays = PanelDisplays(publish)
        self._now = PanelState()
        self._run: RunView | None = None
        self._shown: RunView | None = None
        self._told: dict[str, str] = {}  # what came of the last line, by section
        self._is_filling = False
        self._painting = threading.RLock()
        self._looking = threading.Lock()
        self._lanes = {
            name: Lane(
                f"dnb-panel-{name}", dtrain=dtrain, show=self._show_run, ended=self._take, progressed=self._repaint
            )
            for name in ("pool", "run")
        }
        self.widgets = PanelWidgets(press_pool=partial(self._begin, "pool"), press_run=partial(self._begin, "run"))
        self._watcher = PanelWatcher(look=self._look_and_settle, ended=lambda: self._follow(None))
        for each in self.widgets.inputs:
            each.observe(self._changed, names="value")
        self.refill()
        self._watcher.start()

    def show(self) -> None:
        """Display the panel in the current cell; every display is a view of the same widgets."""
        self._displays.show(self.widgets.box)

    def close(self) -> None:
        """Stop listening, and leave a line of text in place of the panel."""
        self._watcher.close()
        self._displays.close()
        with self._painting:
            self.widgets.close()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the lines under way and, once closed, for the watcher; return True if all have ended."""
        lanes = [lane.join(timeout_seconds=timeout_seconds) for lane in self._lanes.values()]
        has_ended = not self._watcher.is_closed or self._watcher.join(timeout_seconds=timeout_seconds)
        return all(lanes) and has_ended

    # what the user does

    def refill(self, _result: object = None) -> None:
        """Offer the notebook's variables as they are now; called in the main thread after every cell."""
        with self._painting:
            self._fill(lambda names: self.widgets.form.offer(names, hidden=self._hidden))
        self._watcher.wake()

    def _changed(self, _change: object) -> None:
        with self._painting:  # the watcher fills, too, and then its own changes are not the user's
            if not self._is_filling:
                self._fill(self.widgets.form.adapt)

    def _fill(self, fill: Callable[[Mapping[str, Any]], None]) -> None:
        self._is_filling = True
        try:
            fill(self._names())
        finally:
            self._is_filling = False
        self._paint()

    def _begin(self, lane: str, line: str) -> None:
        with self._painting:
            if self._lanes[lane].run(line):
                self._told = {}
            self._paint()

    # what comes of it

    def _take(self, lane: Lane, outcome: LineResult) -> None:
        """Ask for the state that the line has changed before the next can be pressed; called in the lane's thread."""
        try:
            self._look_again()
        finally:
            with self._painting:
                lane.clear()
                self._told = {_title_of(outcome.line): told(outcome)}
                if isinstance(outcome.value, Plan):
                    self.widgets.plan_view.value = draw(outcome.value)
                self._paint()

    def _show_run(self, run: RunView) -> None:
        view = _plain_view(run) if has_ended(run) else self._view_of(run)
        with self._painting:
            self._shown = None if isinstance(view, widgets.Output) else run
            self.widgets.run_view.children = (view,)
            self.widgets.make_room()
        self._watcher.wake()

    def _settle_view(self) -> None:
        """Put plain output in place of the widgets that the dashboard closes when the run has ended."""
        shown = self._shown
        if shown is not None and has_ended(shown):
            view = _plain_view(shown)  # an image is drawn: not while others wait to paint
            with self._painting:
                if self._shown is shown and not self._watcher.is_closed:
                    self._shown = None
                    self.widgets.run_view.children = (view,)
                    self._paint()  # the rows that the live view had in its place

    # keeping it true

    def _look_and_settle(self) -> None:
        self._look_again()
        self._settle_view()

    def _look_again(self) -> None:
        with self._looking:  # else an older look could come last
            pool = self._pool()
            now = look(pool)
            with self._painting:
                if self._watcher.is_closed:
                    return
                self._now = now
                if pool is not None:  # else the last run stays: how it ended is still of interest
                    self._follow(pool.run)
                self._paint()

    def _follow(self, run: RunView | None) -> None:
        """Listen to this run and to no other."""
        if run is not self._run:
            if self._run is not None:
                self._run.remove_listener(self._heard)
            if run is not None:
                run.add_listener(self._heard)
            self._run = run

    def _heard(self, _run: RunView) -> None:
        self._watcher.wake()

    def _repaint(self) -> None:
        with self._painting:
            self._paint()

    def _paint(self) -> None:
        """Bring all widgets up to date; what has not changed is not sent."""
        if self._watcher.is_closed:
            return
        now = self._now
        engines = now.engines or ()
        options = tuple((f"engine {engine} on {host}", engine) for engine, _, host in engines)
        if options != self.widgets.leaving.options:
            was_filling, self._is_filling = self._is_filling, True
            self.widgets.offer_engines(options)
            self._is_filling = was_filling
        self.widgets.pool_state.value = sentence(pool_sentence(now))
        has_view = self._shown is not None and self._shown is self._run
        told_run = progress_line(self._run) if self._run is not None else run_sentence(now)
        self.widgets.run_state.value = "" if has_view else sentence(told_run)  # the view counts its steps itself
        pool_line, run_line = self._lanes["pool"].line, self._lanes["run"].line
        in_way = obstacles(now, pool_line=pool_line, run_line=run_line)
        self.widgets.show_actions(now, names=self._names(), obstacles=in_way, has_view=has_view)
        lanes = [lane for lane in self._lanes.values() if lane.line]
        busy = {_title_of(lane.line): working(lane.line, progress=lane.progress) for lane in lanes}
        for title, message in self.widgets.messages.items():
            message.value = busy.get(title, self._told.get(title, ""))


def open_panel(shell: Any, *, dtrain: Callable[[str], Any]) -> None:
    """Show the kernel's one control panel in the current cell; without widgets, say what does the same."""
    global _panel, _events
    if choose_display(shell=shell) != "widget":
        say(WITHOUT_WIDGETS)
        return
    if _panel is None:
        _panel = ControlPanel(dtrain, names=lambda: dict(shell.user_ns), hidden=shell.user_ns_hidden)
        _events = shell.events
        _events.register("post_run_cell", _refill)
    _panel.show()


def close_panel() -> None:
    """Close the panel, if there is one."""
    global _panel
    if _panel is not None:
        _events.unregister("post_run_cell", _refill)
        _panel.close()
        _panel = None


def _refill(result: object) -> None:
    if _panel is not None:
        _panel.refill(result)


def _title_of(line: str) -> str:
    """Return the section in which a line's button stands."""
    verb = line.partition(" ")[0]
    if verb in ("plan", "fit"):
        return "Training"
    return "Pool" if verb in ("start", "add", "remove", "shutdown") else "Run"


def _plain_view(run: RunView) -> widgets.Output:
    content = {"output_type": "display_data", "data": behind_chart(bundle(run, with_image=True)), "metadata": {}}
    return widgets.Output(outputs=(content,))
