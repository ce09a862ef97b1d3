"""`%dtrain panel`: pool, training and run by mouse or keyboard, every button with the line that it runs."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets

from dnb.api import pools
from dnb.notebook.charts.svg_image import behind_chart
from dnb.notebook.control_panel.form import TrainingForm
from dnb.notebook.control_panel.lanes import Lane, LineResult
from dnb.notebook.control_panel.lines import add_line, checkpoint_line, fit_line, remove_line, set_line, start_line
from dnb.notebook.control_panel.state import PanelState, look, obstacles, pool_sentence, run_sentence
from dnb.notebook.control_panel.widgets import PanelAction, field, grid, section, sentence, told, working
from dnb.notebook.live.display import dashboard_of
from dnb.notebook.live.frontend import choose_display
from dnb.notebook.output import say
from dnb.notebook.pages.plan_drawing import draw
from dnb.notebook.pages.snapshot import bundle, publish
from dnb.notebook.text.summary import progress_line
from dnb.notebook.views import RunView, has_ended
from dnb.planning.search.plans import Plan

log = logging.getLogger(__name__)

# How often the pool is asked although nothing is known to have changed: engines die without a word.
TICK_SECONDS = 2.0
LEAST_SECONDS = 0.2
_ROW = 400  # pixels that a button, its field and its line need
FALLBACK = "The control panel of %dtrain: it lives as long as its kernel. Run %dtrain panel to open it again."
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
        self._publish = publish
        self._display_ids: list[str] = []
        self._now = PanelState()
        self._run: RunView | None = None
        self._shown: RunView | None = None
        self._told: dict[str, str] = {}  # what came of the last line, by section
        self._is_filling = False
        self._is_failing = False
        self._painting = threading.RLock()
        self._looking = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._pool_lane, self._run_lane = (
            Lane(name, dtrain=dtrain, show=self._show_run, ended=self._take, progressed=self._repaint)
            for name in ("dnb-panel-pool", "dnb-panel-run")
        )
        self._make_widgets()
        self.refill()
        self._watcher = threading.Thread(target=self._keep_looking, name="dnb-panel", daemon=True)
        self._watcher.start()

    # what there is to see

    def _make_widgets(self) -> None:
        self.n = field("Engines", hint="one per core", width="170px")
        self.threads = field("Threads each", hint="shared out", width="190px")
        self.num_added = field("How many", hint="1", width="120px")
        self.leaving = widgets.SelectMultiple(
            description="Which", rows=2, style={"description_width": "initial"}, layout=widgets.Layout(width="200px")
        )
        self.lr = field("Learning rate", hint="from now on", width="200px")
        self.path = field("Folder", hint="of the run", width="200px")
        self.form = TrainingForm()
        in_pool, in_run = self._in_pool, self._in_run
        self.actions = {
            "start": PanelAction("Start", icon="power-off", press=in_pool, fields=[self.n, self.threads]),
            "add": PanelAction("Add", icon="plus", press=in_pool, fields=[self.num_added]),
            "remove": PanelAction("Remove", icon="minus", press=in_pool, fields=[self.leaving]),
            "shutdown": PanelAction(
                "Shut down", icon="power-off", press=in_pool, tooltip="End the pool and its engines"
            ),
            "plan": PanelAction("Plan", icon="sitemap", press=in_pool, tooltip="Predict how the model is best divided"),
            "fit": PanelAction("Fit", icon="play", press=in_pool, style="primary", tooltip="Start to train"),
            "pause": PanelAction("Pause", icon="pause", press=in_run),
            "resume": PanelAction("Resume", icon="play", press=in_run),
            "stop": PanelAction("Stop", icon="stop", press=in_run, tooltip="End the run and keep its weights"),
            "set": PanelAction("Set", icon="sliders", press=in_run, fields=[self.lr]),
            "checkpoint": PanelAction("Checkpoint", icon="save", press=in_run, fields=[self.path]),
            "attach": PanelAction("Attach", icon="link", press=in_pool, tooltip="Find the run that a pool holds"),
            "dashboard": PanelAction("Dashboard", icon="line-chart", press=in_run, tooltip="Show the run's view below"),
        }
        self.pool_state, self.run_state = widgets.HTML(), widgets.HTML()
        self.messages = {title: widgets.HTML() for title in ("Pool", "Training", "Run")}
        self.plan_view = widgets.HTML()
        self.run_view = widgets.VBox([])
        rows = [action.box for action in self.actions.values()]
        self.box = widgets.VBox(
            [
                section("Pool", [self.pool_state, grid(rows[:4], least=_ROW), self.messages["Pool"]]),
                section("Training", [self.form.box, *rows[4:6], self.messages["Training"], self.plan_view]),
                section("Run", [self.run_state, grid(rows[6:], least=_ROW), self.messages["Run"], self.run_view]),
            ]
        )
        inputs = (self.n, self.threads, self.num_added, self.leaving, self.lr, self.path)
        for each in (*inputs, *self.form.choosers, *self.form.fields):
            each.observe(self._changed, names="value")

    def show(self) -> None:
        """Display the panel in the current cell; every display is a view of the same widgets."""
        display_id = f"dnb-panel-{uuid.uuid4().hex[:8]}"
        self._publish({**self.box._repr_mimebundle_(), "text/plain": FALLBACK}, display_id=display_id)
        self._display_ids.append(display_id)

    def close(self) -> None:
        """Listen no more, and leave a line of text in place of the panel."""
        self._closed.set()
        self._wake.set()
        for display_id in self._display_ids:
            self._publish({"text/plain": FALLBACK}, display_id=display_id, update=True)
        self._display_ids.clear()
        with self._painting:
            self.run_view.children = ()  # may be shown elsewhere, too
            for widget in _tree(self.box):
                widget.close()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the lines under way and, once closed, for the watcher; whether all have ended."""
        lanes = [lane.join(timeout_seconds=timeout_seconds) for lane in (self._pool_lane, self._run_lane)]
        if self._closed.is_set():
            self._watcher.join(timeout_seconds)
        return all(lanes) and not (self._closed.is_set() and self._watcher.is_alive())

    # what the user does

    def refill(self, _result: object = None) -> None:
        """Offer what the notebook's variables are now; called in the main thread after every cell."""
        with self._painting:
            self._fill(lambda names: self.form.offer(names, hidden=self._hidden))
        self._wake.set()

    def _changed(self, _change: object) -> None:
        with self._painting:  # the watcher fills, too, and then its own changes are not the user's
            if not self._is_filling:
                self._fill(self.form.adapt)

    def _fill(self, fill: Callable[[Mapping[str, Any]], None]) -> None:
        self._is_filling = True
        try:
            fill(self._names())
        finally:
            self._is_filling = False
        self._paint()

    def _in_pool(self, line: str) -> None:
        self._begin(self._pool_lane, line)

    def _in_run(self, line: str) -> None:
        self._begin(self._run_lane, line)

    def _begin(self, lane: Lane, line: str) -> None:
        with self._painting:
            if lane.run(line):
                self._told = {}
            self._paint()

    # what comes of it

    def _take(self, lane: Lane, outcome: LineResult) -> None:
        """In the lane's thread: what the line has changed is seen before the next can be pressed."""
        try:
            self._look_again()
        finally:
            with self._painting:
                lane.clear()
                self._told = {_title_of(outcome.line): told(outcome)}
                if isinstance(outcome.value, Plan):
                    self.plan_view.value = draw(outcome.value)
                self._paint()

    def _show_run(self, run: RunView) -> None:
        view = _plain_view(run) if has_ended(run) else self._view_of(run)
        with self._painting:
            self._shown = None if isinstance(view, widgets.Output) else run
            self.run_view.children = (view,)
        self._wake.set()

    def _settle_view(self) -> None:
        """The dashboard closes its widgets when the run has ended: what stays in their place is plain."""
        shown = self._shown
        if shown is not None and has_ended(shown):
            view = _plain_view(shown)  # an image is drawn: not while others wait to paint
            with self._painting:
                if self._shown is shown and not self._closed.is_set():
                    self._shown = None
                    self.run_view.children = (view,)

    # keeping it true

    def _keep_looking(self) -> None:
        while not self._closed.is_set():
            try:
                self._look_again()
                self._settle_view()
                self._is_failing = False
            except Exception:
                # the panel must go on with the next look; told once, not five times a second
                if not self._is_failing:
                    log.exception("the control panel could not be brought up to date")
                self._is_failing = True
            self._closed.wait(LEAST_SECONDS)
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()
        self._follow(None)

    def _look_again(self) -> None:
        with self._looking:  # else an older look could come last
            pool = self._pool()
            now = look(pool)
            with self._painting:
                if self._closed.is_set():
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
        self._wake.set()

    def _repaint(self) -> None:
        with self._painting:
            self._paint()

    def _paint(self) -> None:
        """Bring all widgets up to date; what has not changed is not sent."""
        if self._closed.is_set():
            return
        now = self._now
        engines = now.engines or ()
        options = tuple((f"engine {engine} on {host}", engine) for engine, _, host in engines)
        if options != self.leaving.options:
            self._offer_engines(options)
        self.pool_state.value = sentence(pool_sentence(now))
        self.run_state.value = sentence(progress_line(self._run) if self._run is not None else run_sentence(now))
        self._paint_actions(now)
        lanes = [lane for lane in (self._pool_lane, self._run_lane) if lane.line]
        busy = {_title_of(lane.line): working(lane.line, progress=lane.progress) for lane in lanes}
        for title, message in self.messages.items():
            message.value = busy.get(title, self._told.get(title, ""))

    def _offer_engines(self, options: tuple[tuple[str, int], ...]) -> None:
        was_filling, self._is_filling = self._is_filling, True
        kept = [engine for engine in self.leaving.value if engine in {engine for _, engine in options}]
        self.leaving.options = options
        self.leaving.value = kept
        self.leaving.rows = min(max(len(options), 1), 4)
        self._is_filling = was_filling

    def _paint_actions(self, now: PanelState) -> None:
        in_way = obstacles(now, pool_line=self._pool_lane.line, run_line=self._run_lane.line)
        is_there = _visible(now)
        missing = self.form.missing
        for name, (line, lacks) in self._lines(now, missing).items():
            action = self.actions[name]
            action.show("" if lacks else line, obstacle=lacks or in_way[name], is_there=is_there[name])

    def _lines(self, now: PanelState, missing: str) -> dict[str, tuple[str, str]]:
        """By action: the line, and what has to be chosen or typed before it is one."""
        names, form = self._names(), self.form
        remove, new_lr = remove_line(self.leaving.value), set_line(self.lr.value)
        return {
            "start": (start_line(n=self.n.value, threads=self.threads.value), ""),
            "add": (add_line(self.num_added.value), ""),
            "remove": (remove, "" if remove else "choose engines"),
            "shutdown": ("shutdown", ""),
            "plan": ("" if missing else form.plan_line(names), missing),
            "fit": ("" if missing else fit_line(form.read()), missing),
            "pause": ("pause", ""),
            "resume": ("resume", ""),
            "stop": ("stop", ""),
            "set": (new_lr, "" if new_lr else "type a learning rate"),
            "checkpoint": (checkpoint_line(self.path.value, names=names), ""),
            "attach": ("attach" if now.steered_by is None else "attach --steer", ""),
            "dashboard": ("dashboard", ""),
        }


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


def _visible(now: PanelState) -> dict[str, bool]:
    """Which rows there are: what makes no sense at all now would only be in the way."""
    has_pool, has_run = now.engines is not None, now.is_held
    is_watched = now.steered_by is not None
    shown = {"start": not has_pool, "plan": True, "fit": True, "attach": not has_run or is_watched}
    shown |= dict.fromkeys(("add", "remove", "shutdown"), has_pool)
    shown |= dict.fromkeys(("stop", "set", "checkpoint"), has_run and now.is_active)
    is_paused = now.status == "paused"
    return shown | {
        "pause": has_run and now.is_active and not is_paused,
        "resume": has_run and is_paused,
        "dashboard": has_run,
    }


def _title_of(line: str) -> str:
    """The section in which a line's button stands."""
    verb = line.partition(" ")[0]
    if verb in ("plan", "fit"):
        return "Training"
    return "Pool" if verb in ("start", "add", "remove", "shutdown") else "Run"


def _plain_view(run: RunView) -> widgets.Output:
    content = {"output_type": "display_data", "data": behind_chart(bundle(run, with_image=True)), "metadata": {}}
    return widgets.Output(outputs=(content,))


def _tree(widget: widgets.Widget) -> list[widgets.Widget]:
    below = [each for child in getattr(widget, "children", ()) for each in _tree(child)]
    return [*below, widget]
