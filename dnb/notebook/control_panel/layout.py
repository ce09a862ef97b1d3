"""All widgets of the control panel, and the lines that its buttons stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets

from dnb.notebook.control_panel.form import FormWidgets
from dnb.notebook.control_panel.lines import add_line, checkpoint_line, fit_line, remove_line, set_line, start_line
from dnb.notebook.control_panel.state import PanelState
from dnb.notebook.control_panel.widgets import PanelAction, field, grid, section

# What the live view has buttons for, too, or what waits for the run's end anyway and would push the chart down.
_IN_VIEW = ("pause", "resume", "stop", "dashboard", "plan", "fit")
_ROW = 400  # pixels that a button, its field and its line need


class PanelWidgets:
    """All that there is to see and to press; `box` holds it.

    Args:
        press_pool: takes the line of a button that changes the pool, or begins a run.
        press_run: takes the line of a button that steers the run.
    """

    def __init__(self, *, press_pool: Callable[[str], None], press_run: Callable[[str], None]) -> None:
        self.n = field("Engines", hint="one per core", width="170px")
        self.threads = field("Threads each", hint="shared out", width="190px")
        self.num_added = field("How many", hint="1", width="120px")
        self.leaving = widgets.SelectMultiple(
            description="Which", rows=2, style={"description_width": "initial"}, layout=widgets.Layout(width="200px")
        )
        self.lr = field("Learning rate", hint="from now on", width="200px")
        self.path = field("Folder", hint="of the run", width="200px")
        self.form = FormWidgets()
        self.actions = self._make_actions(in_pool=press_pool, in_run=press_run)
        self.pool_state, self.run_state = widgets.HTML(), widgets.HTML()
        self.messages = {title: widgets.HTML() for title in ("Pool", "Training", "Run")}
        self.plan_view = widgets.HTML()
        self.run_view = widgets.VBox([])
        self.choices = widgets.Accordion([self.form.box], titles=("Choices",), selected_index=0)
        rows = [action.box for action in self.actions.values()]
        self.box = widgets.VBox(
            [
                section("Pool", [self.pool_state, grid(rows[:4], least=_ROW), self.messages["Pool"]]),
                section("Training", [self.choices, *rows[4:6], self.messages["Training"], self.plan_view]),
                section("Run", [self.run_state, grid(rows[6:], least=_ROW), self.messages["Run"], self.run_view]),
            ]
        )

    @property
    def inputs(self) -> list[widgets.Widget]:
        """All that the user may change."""
        return [self.n, self.threads, self.num_added, self.leaving, self.lr, self.path, *self.form.inputs]

    def offer_engines(self, options: tuple[tuple[str, int], ...]) -> None:
        """Offer engines that may leave; those that are chosen and still there stay so."""
        kept = [engine for engine in self.leaving.value if engine in {engine for _, engine in options}]
        self.leaving.options = options
        self.leaving.value = kept
        self.leaving.rows = min(max(len(options), 1), 4)

    def show_actions(
        self, now: PanelState, *, names: Mapping[str, Any], obstacles: Mapping[str, str], has_view: bool
    ) -> None:
        """Show each action's line, or what is missing for it, or in its way.

        Args:
            now: pool and run.
            names: the notebook's variables.
            obstacles: by action.
            has_view: the run's live view is shown below, which has buttons of its own.
        """
        is_there = _visible(now) | (dict.fromkeys(_IN_VIEW, False) if has_view else {})
        for name, (line, lacks) in self._lines(now, names).items():
            shown = "" if lacks else line
            self.actions[name].show(shown, obstacle=lacks or obstacles[name], is_there=is_there[name])

    def make_room(self) -> None:
        """Fold the choices, so that a run's view below them is in sight; a click unfolds them."""
        self.choices.selected_index = None

    def close(self) -> None:
        """Close every widget but the run's view, which may be shown elsewhere, too."""
        self.run_view.children = ()
        for widget in _tree(self.box):
            widget.close()

    def _make_actions(self, *, in_pool: Callable[[str], None], in_run: Callable[[str], None]) -> dict[str, PanelAction]:
        action = PanelAction
        return {
            "start": action("Start", icon="power-off", press=in_pool, fields=[self.n, self.threads]),
            "add": action("Add", icon="plus", press=in_pool, fields=[self.num_added]),
            "remove": action("Remove", icon="minus", press=in_pool, fields=[self.leaving]),
            "shutdown": action("Shut down", icon="power-off", press=in_pool, tooltip="End the pool and its engines"),
            "plan": action("Plan", icon="sitemap", press=in_pool, tooltip="Predict how the model is best divided"),
            "fit": action("Fit", icon="play", press=in_pool, style="primary", tooltip="Start to train"),
            "pause": action("Pause", icon="pause", press=in_run),
            "resume": action("Resume", icon="play", press=in_run),
            "stop": action("Stop", icon="stop", press=in_run, tooltip="End the run and keep its weights"),
            "set": action("Set", icon="sliders", press=in_run, fields=[self.lr]),
            "checkpoint": action("Save to", icon="save", press=in_run, fields=[self.path]),
            "attach": action("Attach", icon="link", press=in_pool, tooltip="Find the run that a pool holds"),
            "dashboard": action("Dashboard", icon="line-chart", press=in_run, tooltip="Show the run's view below"),
        }

    def _lines(self, now: PanelState, names: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Return by action its line, and the choice or field that is missing before it is one."""
        form, missing = self.form, self.form.missing
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


def _visible(now: PanelState) -> dict[str, bool]:
    """Say by row if it is shown: one that makes no sense at all now would only be in the way."""
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


def _tree(widget: widgets.Widget) -> list[widgets.Widget]:
    below = [each for child in getattr(widget, "children", ()) for each in _tree(child)]
    return [*below, widget]
