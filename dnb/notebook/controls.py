"""The strip above the chart: progress, pace, one sentence of status, and the Stop button."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from html import escape

import ipywidgets as widgets

from dnb.notebook.abscissa import KINDS
from dnb.notebook.text import one_line, pace, status_sentence
from dnb.notebook.views import RunView, has_ended

log = logging.getLogger(__name__)

_BAR_STYLES = {"paused": "warning", "failed": "danger", "finished": "success"}
_TEXT = "line-height:1.4; font-variant-numeric:tabular-nums; color:var(--jp-ui-font-color1, inherit)"


class Controls:
    """Widgets that show how far a run is, and that can stop it.

    Args:
        run: whose progress is shown.
        on_axis: called with what the x axes are to count.
    """

    def __init__(self, run: RunView, on_axis: Callable[[str], None] = lambda _kind: None) -> None:
        self._run = run
        self._stop_failure = ""
        self.progress = widgets.IntProgress(
            min=0, max=max(run.num_steps, 1), layout=widgets.Layout(width="220px", margin="2px 8px")
        )
        self.pace = widgets.HTML(layout=widgets.Layout(flex="1 1 auto"))
        self.stop_button = widgets.Button(
            description="Stop",
            icon="stop",
            tooltip="End the run and keep its weights",
            layout=widgets.Layout(width="110px", flex="0 0 auto"),
        )
        self.status = widgets.HTML(layout=widgets.Layout(margin="0 8px"))
        self.stop_button.on_click(self._stop_soon)
        self.axis = widgets.ToggleButtons(
            options=KINDS, layout=widgets.Layout(width="auto"), style={"button_width": "auto"}
        )
        self.axis.observe(lambda change: on_axis(change["new"]), names="value")
        row = widgets.HBox(
            [self.progress, self.pace, self.axis, self.stop_button],
            layout=widgets.Layout(align_items="center", flex_flow="row wrap"),
        )
        self.box = widgets.VBox([row, self.status])
        self.widgets = (self.box, row, self.progress, self.pace, self.axis, self.stop_button, self.status)
        self.refresh()

    def refresh(self) -> None:
        """Show the run as it is now; what has not changed is not sent."""
        run = self._run
        self.progress.max = max(run.num_steps, run.step, 1)
        self.progress.value = run.step
        self.progress.bar_style = _BAR_STYLES.get(run.status, "info")
        self.pace.value = _html(", ".join([f"step {run.step:,} of {run.num_steps:,}", *pace(run)]))
        sentence = f"{status_sentence(run)}{self._stop_failure}"
        self.status.value = _html(sentence, strong=run.name)
        if has_ended(run):
            self.stop_button.description = "Stop"
            self.stop_button.disabled = True

    def _stop_soon(self, _button: object) -> None:
        # run.stop may wait for the hub: the kernel's main thread must not
        self.stop_button.disabled = True
        self.stop_button.description = "Stopping"
        threading.Thread(target=self._stop, name=f"dnb-stop-{self._run.name}", daemon=True).start()

    def _stop(self) -> None:
        try:
            self._run.stop()
        except Exception as error:  # a thread has nobody to raise to: said in the strip, and logged
            log.exception("run %s could not be stopped", self._run.name)
            self._stop_failure = f"; stop failed: {one_line(str(error))}"
            self.stop_button.description = "Stop"
            self.stop_button.disabled = has_ended(self._run)
            self.refresh()


def _html(text: str, *, strong: str = "") -> str:
    """Plain text as HTML that shows it and never runs it."""
    name = f"<b>{escape(strong)}</b>: " if strong else ""
    return f'<div style="{_TEXT}">{name}{escape(text)}</div>'
