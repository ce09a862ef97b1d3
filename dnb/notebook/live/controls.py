"""The strip above the chart: progress, pace, what can be done, how the run is doing, its engines, all in words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets

from dnb.notebook.text import engine_cards as cards
from dnb.notebook.text.diagnosis import diagnosis
from dnb.notebook.text.summary import MEMBERSHIP, one_line, pace, run_name, status_sentence, summary
from dnb.notebook.views import RunView, has_ended

log = logging.getLogger(__name__)

AXES = ("step", "samples", "time")
# What takes room on the wire is sent no more often than this.
_SECONDS = {"cards": 0.5, "diagnosis": 2.0, "words": 2.0}
HEAT_MAP_SECONDS = 1.0
# If a run does as many steps after it was told to pause, somebody has let it go on.
PAUSE_STEPS = 2

_UNDER_WAY = {"pause": "Pausing", "resume": "Resuming", "stop": "Stopping", "checkpoint": "Writing"}
_BAR_STYLES = {"paused": "warning", "failed": "danger", "finished": "success"}
_TEXT = "line-height:1.4; font-variant-numeric:tabular-nums; color:var(--jp-ui-font-color1, inherit)"
# The element opens and closes by itself, in a widget that is never sent again: one that came with each new text would
# close whenever it comes. What it opens is the widget behind it.
_STYLE = """<style>
.dnb-words:has(details:not([open]))>.dnb-words-text{display:none}
.dnb-words details>summary{cursor:pointer;color:var(--jp-ui-font-color1,inherit)}
.dnb-words-text ul{margin:0;padding-left:1.4em;line-height:1.5;overflow-wrap:anywhere;
color:var(--jp-ui-font-color1,inherit)}
.dnb-notice .widget-html-content:empty{display:none}
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
        self._on_axis = on_axis
        self._on_loss_scale = on_loss_scale
        self._clock = clock
        self._refreshing = threading.RLock()
        self._shown_status = ""
        self._due: dict[str, float] = {}
        self._spoken: dict[widgets.HTML, object] = {}
        self._pending: dict[str, int | None] = {}  # what was pressed, and at which step the hub took it
        self._is_listening = False
        self.progress = widgets.IntProgress(
            min=0, max=max(run.num_steps, 1), layout=widgets.Layout(width="220px", margin="2px 8px")
        )
        self.pace = widgets.HTML(layout=widgets.Layout(flex="1 1 auto"))
        self.pause_button = _button("Pause", icon="pause", tooltip="Stand still after the step under way")
        self.stop_button = _button("Stop", icon="stop", tooltip="End the run and keep its weights")
        self.checkpoint_button = _button(
            "Checkpoint", icon="save", tooltip="Write a checkpoint after the step under way"
        )
        self.status = _text()
        self.notice = _text()
        self.diagnosis = _text()
        self.cards = widgets.HTML()
        self.words = _text()
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
        self.box, self.widgets = self._laid_out()
        self.pause_button.on_click(lambda _: self._act("resume" if self._run.status == "paused" else "pause"))
        self.stop_button.on_click(lambda _: self._act("stop"))
        self.checkpoint_button.on_click(lambda _: self._act("checkpoint"))
        self.axis.observe(lambda change: self._on_axis and self._on_axis(change["new"]), names="value")
        self.log_loss.observe(self._change_scale, names="value")
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
            self.pace.value = _html(", ".join([f"step {run.step:,} of {run.num_steps:,}", *pace(run)]))
            self._show_buttons()
            self._say(self.status, status_sentence(run), strong=run_name(run), kind=_status_kind(run))
            if self._is_due("diagnosis"):
                found = diagnosis(run)
                self._say(self.diagnosis, found.text, strong="diagnosis", kind=found.kind)
            self._send(self.cards, "cards", lambda: cards.engines_html(run))
            self._send(self.words, "words", lambda: _listed(summary(run)))

    def _send(self, target: widgets.HTML, name: str, make: Callable[[], str]) -> None:
        if self._is_due(name):
            target.value = make()

    def _is_due(self, name: str) -> bool:
        now = self._clock()
        if now < self._due.get(name, now):
            return False
        is_crowd = name == "cards" and len(self._run.workers) > cards.MOST_CARDS
        self._due[name] = now + (HEAT_MAP_SECONDS if is_crowd else _SECONDS[name])
        return True

    def _say(self, target: widgets.HTML, text: str, *, strong: str, kind: object) -> None:
        """Words that a screen reader speaks when they are of another kind, not whenever a figure in them changes."""
        is_news = self._spoken.get(target) != kind
        html = _html(text, strong=strong, live="polite" if is_news else "off")
        # what was spoken stays as it is until its words change: else it would be sent again as silent
        if is_news or html != target.value.replace('aria-live="polite"', 'aria-live="off"'):
            target.value = html
        self._spoken[target] = kind

    # what can be done

    def _show_buttons(self) -> None:
        run = self._run
        self._forget_what_came_true()
        is_paused = run.status == "paused"
        resting = "Resume" if is_paused else "Pause"
        self.pause_button.icon = "play" if is_paused else "pause"
        self._show(self.pause_button, resting, when=run.status in ("running", "paused"), verbs=("pause", "resume"))
        self._show(self.stop_button, "Stop", when=not has_ended(run), verbs=("stop",))
        self._show(
            self.checkpoint_button, "Checkpoint", when=run.status in ("running", "paused"), verbs=("checkpoint",)
        )

    def _show(self, button: widgets.Button, resting: str, *, when: bool, verbs: tuple[str, ...]) -> None:
        under_way = next((verb for verb in verbs if verb in self._pending), None)
        button.description = resting if under_way is None else _UNDER_WAY[under_way]
        button.disabled = not when or under_way is not None

    def _forget_what_came_true(self) -> None:
        run, taken = self._run, self._pending.get("pause")
        if run.status != "running" or (taken is not None and run.step > taken + PAUSE_STEPS):
            self._pending.pop("pause", None)
        if run.status != "paused":
            self._pending.pop("resume", None)
        if has_ended(run):
            self._pending.clear()

    def _change_scale(self, change: dict[str, Any]) -> None:
        if self._on_loss_scale is not None:
            self._on_loss_scale("log" if change["new"] else "linear")

    def _act(self, verb: str) -> None:
        # it may wait for the hub: the kernel's main thread must not
        with self._refreshing:
            self._pending[verb] = None
            self._show_buttons()
            if not self._is_listening:
                self._is_listening = True
                self._run.add_listener(self._hear)
        threading.Thread(target=self._attempt, args=(verb,), name=f"dnb-{verb}-{self._run.name}", daemon=True).start()

    def _hear(self, run: RunView) -> None:
        """Show at once what a press has brought about: the painter may have painted just before."""
        with self._refreshing:
            self.refresh()
            if not self._pending:
                self._is_listening = False
                run.remove_listener(self._hear)

    def _attempt(self, verb: str) -> None:
        try:
            result = getattr(self._run, verb)()
        except Exception as error:  # a thread has nobody to raise to: said in the strip, and logged
            log.warning("%s of run %s failed", verb, self._run.name, exc_info=True)
            told, is_done = f"{verb} failed: {one_line(str(error)) or type(error).__name__}", True
        else:
            told = f"checkpoint written: {one_line(str(result))}" if verb == "checkpoint" else ""
            is_done = verb == "checkpoint"
        with self._refreshing:
            if is_done:
                self._pending.pop(verb, None)
            elif verb in self._pending:
                self._pending[verb] = self._run.step
            self.notice.value = _html(told, role="alert") if told else ""
            self.refresh()

    # how it looks

    def _laid_out(self) -> tuple[widgets.VBox, tuple[widgets.Widget, ...]]:
        """The box, and all widgets that are to be closed with it."""
        buttons = (self.pause_button, self.stop_button, self.checkpoint_button)
        row = widgets.HBox(
            [self.progress, self.pace, *buttons], layout=widgets.Layout(align_items="center", flex_flow="row wrap")
        )
        style = widgets.HTML(cards.STYLE + _STYLE, layout=widgets.Layout(display="none"))
        head = widgets.HTML(
            "<details><summary>this chart in words</summary></details>",
            layout=widgets.Layout(margin="0 8px", flex="1 1 auto"),
        )
        label = widgets.HTML(_html("x axis:"))
        choice = widgets.HBox([self.log_loss, label, self.axis], layout=widgets.Layout(align_items="center"))
        below = widgets.HBox([head, choice], layout=widgets.Layout(align_items="center", flex_flow="row wrap"))
        chart_in_words = widgets.VBox([below, self.words])
        chart_in_words.add_class("dnb-words")
        self.words.add_class("dnb-words-text")
        for chosen in (self.axis, self.log_loss):
            chosen.add_class("dnb-chosen")
        self.notice.add_class("dnb-notice")
        parts = [style, row, self.status, self.notice, self.diagnosis, self.cards, chart_in_words]
        box = widgets.VBox(parts)
        inner = (row, chart_in_words, below, choice)
        return box, (box, *parts, *(child for each in inner for child in each.children))


def _button(description: str, *, icon: str, tooltip: str) -> widgets.Button:
    layout = widgets.Layout(width="auto", min_width="110px", flex="0 0 auto")
    return widgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)


def _text() -> widgets.HTML:
    return widgets.HTML(layout=widgets.Layout(margin="0 8px"))


def _status_kind(run: RunView) -> object:
    """What is news of a status: not the hash that is in its sentence, nor how long it took."""
    return run.status, run.error, sum(event.kind in MEMBERSHIP for event in run.events)


def _html(text: str, *, strong: str = "", live: str = "", role: str = "status") -> str:
    """Plain text as HTML that shows it and never runs it."""
    name = f"<b>{escape(strong)}</b>: " if strong else ""
    spoken = f' role="{role}"' + f' aria-live="{live}"' * bool(live) if live or role == "alert" else ""
    return f'<div style="{_TEXT}"{spoken}>{name}{escape(text)}</div>'


def _listed(text: str) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in text.splitlines())}</ul>"
