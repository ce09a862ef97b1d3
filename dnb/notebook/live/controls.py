"""The strip above the chart: place in the run, what can be done, how it is doing, and a row for each engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from html import escape

import ipywidgets as widgets

from dnb.notebook.live.browser.engine_table import EngineTable
from dnb.notebook.live.run_buttons import RunButtons
from dnb.notebook.live.spoken_text import SpokenText, as_html
from dnb.notebook.text.diagnosis import diagnosis
from dnb.notebook.text.engine_heat import MOST_ROWS
from dnb.notebook.text.engine_rows import crowd_html, engine_rows
from dnb.notebook.text.summary import (
    MEMBERSHIP,
    latest_values,
    pace,
    place_in_run,
    run_name,
    status_sentence,
    summary,
)
from dnb.notebook.views import RunView

AXES = ("step", "samples", "time")
# What takes room on the wire is sent no more often than this.
_SECONDS = {"engines": 0.5, "diagnosis": 2.0, "words": 2.0}
HEAT_MAP_SECONDS = 1.0
_BAR_STYLES = {"paused": "warning", "failed": "danger", "finished": "success"}
# The element opens and closes by itself, in a widget that is never sent again: one that came with each new text would
# close whenever it comes. What it opens is the widget behind it.
_STYLE = """<style>
.dnb-words:has(details:not([open]))>.dnb-words-text{display:none}
.dnb-words details>summary{cursor:pointer;color:var(--jp-ui-font-color1,inherit)}
.dnb-words-text ul{margin:0;padding-left:1.4em;line-height:1.5;overflow-wrap:anywhere;
color:var(--jp-ui-font-color1,inherit)}
.dnb-notice .widget-html-content:empty{display:none}
.dnb-progress .progress{margin:0;height:6px;border-radius:3px;width:100%}
.dnb-chosen .mod-active,.dnb-chosen.mod-active{font-weight:bold;text-decoration:underline}
</style>"""


class Controls:
    """Widgets that show how far a run is and how it is doing, and that steer it.

    Args:
        run: whose progress is shown.
        on_axis: called with "step", "samples" or "time" when another x axis is chosen.
        on_loss_scale: called with "linear" or "log" when the loss is to be on another scale.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        run: RunView,
        *,
        on_axis: Callable[[str], None] | None = None,
        on_loss_scale: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._clock = clock
        self._refreshing = threading.RLock()
        self._shown_status = ""
        self._due: dict[str, float] = {}
        self.progress = widgets.IntProgress(
            min=0, max=max(run.num_steps, 1), layout=widgets.Layout(width="auto", height="8px", margin="2px 8px")
        )
        self.progress.add_class("dnb-progress")
        self.pace = widgets.HTML(layout=widgets.Layout(flex="1 1 480px"))
        self.buttons = RunButtons(run, lock=self._refreshing, changed=self.refresh)
        self.status, self.diagnosis = SpokenText(), SpokenText()
        self.engines = EngineTable()
        self.words = widgets.HTML(layout=widgets.Layout(margin="0 8px"))
        self.choices = ChartChoices(on_axis=on_axis, on_loss_scale=on_loss_scale)
        self.box, self.widgets = self._laid_out()
        self.refresh()

    def refresh(self) -> None:
        """Show the run as it is now; what has not changed is not sent."""
        # by the painter, and by the threads of the buttons
        with self._refreshing:
            run = self._run
            if run.status != self._shown_status:
                self._shown_status = run.status
                self._due.clear()  # all of it may have changed at once
            self.progress.max = max(run.num_steps, run.step, 1)
            self.progress.value = run.step
            self.progress.bar_style = _BAR_STYLES.get(run.status, "info")
            known = " · ".join([*place_in_run(run), *latest_values(run), *pace(run)])
            self.pace.value = as_html(known, strong=run_name(run))
            self.buttons.show()
            is_bad = run.status == "failed" or (run.status == "paused" and bool(run.error))
            self.status.say(status_sentence(run), kind=_status_kind(run), is_error=is_bad)
            if self._is_due("diagnosis"):
                found = diagnosis(run)
                self.diagnosis.say(found.text, strong="diagnosis", kind=found.kind)
            if self._is_due("engines"):
                self.engines.crowd, self.engines.rows = crowd_html(run), engine_rows(run)
            if self._is_due("words"):
                self.words.value = _listed(summary(run))

    def _is_due(self, name: str) -> bool:
        now = self._clock()
        if now < self._due.get(name, now):
            return False
        is_crowd = name == "engines" and len(self._run.workers) > MOST_ROWS
        self._due[name] = now + (HEAT_MAP_SECONDS if is_crowd else _SECONDS[name])
        return True

    # how it looks

    def _laid_out(self) -> tuple[widgets.VBox, tuple[widgets.Widget, ...]]:
        """Lay out the box, and list all widgets that are to be closed with it."""
        buttons = widgets.HBox(self.buttons.row, layout=widgets.Layout(flex="0 0 auto"))
        row = widgets.HBox(
            [self.pace, buttons],
            layout=widgets.Layout(align_items="center", flex_flow="row wrap", margin="0 0 0 8px"),
        )
        style = widgets.HTML(_STYLE, layout=widgets.Layout(display="none"))
        head = widgets.HTML(
            "<details><summary>text summary</summary></details>",
            layout=widgets.Layout(margin="0 8px", flex="1 1 auto"),
        )
        choice = self.choices.box
        below = widgets.HBox([head, choice], layout=widgets.Layout(align_items="center", flex_flow="row wrap"))
        chart_in_words = widgets.VBox([below, self.words])
        chart_in_words.add_class("dnb-words")
        self.words.add_class("dnb-words-text")
        texts = self.status.html, self.buttons.notice, self.diagnosis.html
        parts = [style, row, self.progress, *texts, self.engines, chart_in_words]
        box = widgets.VBox(parts)
        inner = (row, buttons, chart_in_words, below, choice)
        return box, (box, *parts, *(child for each in inner for child in each.children))


class ChartChoices:
    """A row of buttons that choose the chart's axes.

    Args:
        on_axis: called with "step", "samples" or "time" when another x axis is chosen.
        on_loss_scale: called with "linear" or "log" when the loss is to be on another scale.
    """

    def __init__(self, *, on_axis: Callable[[str], None] | None, on_loss_scale: Callable[[str], None] | None) -> None:
        self.axis = widgets.ToggleButtons(
            options=AXES,
            tooltips=["by optimizer step", "by samples seen", "by time since the run was submitted"],
            style={"button_width": "92px"},
            layout=widgets.Layout(width="auto", margin="2px 8px"),
        )
        self.log_loss = widgets.ToggleButton(
            description="log loss",
            tooltip="the loss on a logarithmic scale",
            layout=widgets.Layout(width="92px", margin="2px 16px"),
        )
        for chosen in (self.axis, self.log_loss):
            chosen.add_class("dnb-chosen")
        if on_axis is not None:
            self.axis.observe(lambda change: on_axis(change["new"]), names="value")
        if on_loss_scale is not None:
            self.log_loss.observe(lambda change: on_loss_scale("log" if change["new"] else "linear"), names="value")
        label = widgets.HTML(as_html("x axis:"))
        self.box = widgets.HBox([self.log_loss, label, self.axis], layout=widgets.Layout(align_items="center"))


def _status_kind(run: RunView) -> object:
    """Return the part of a status that is news: not how long it took."""
    return run.status, run.error, sum(event.kind in MEMBERSHIP for event in run.events)


def _listed(text: str) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in text.splitlines())}</ul>"
