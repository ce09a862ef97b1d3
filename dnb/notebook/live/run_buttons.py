"""The buttons that steer a run, and what is said of what they have brought about."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ipywidgets as widgets

from dnb.notebook.live.spoken_text import as_html
from dnb.notebook.text.summary import one_line
from dnb.notebook.views import RunView, has_ended

log = logging.getLogger(__name__)

# If a run does as many steps after it was asked to pause, somebody has let it go on.
PAUSE_STEPS = 2
_UNDER_WAY = {"pause": "Pausing", "resume": "Resuming", "stop": "Stopping", "checkpoint": "Writing"}


class RunButtons:
    """Pause or resume, stop and checkpoint; whoever presses does not wait for the hub.

    Args:
        run: that they steer.
        lock: held by whoever changes widgets.
        changed: shows the run as it is now, and these buttons with it.
    """

    def __init__(self, run: RunView, *, lock: AbstractContextManager[Any], changed: Callable[[], None]) -> None:
        self._run = run
        self._lock = lock
        self._changed = changed
        self._pending: dict[str, int | None] = {}  # what was pressed, and at which step the hub took it
        self._is_listening = False
        self.pause = _button("Pause", icon="pause", tooltip="Stand still after the step under way")
        self.stop = _button("Stop", icon="stop", tooltip="End the run and keep its weights")
        self.checkpoint = _button("Checkpoint", icon="save", tooltip="Write a checkpoint after the step under way")
        self.notice = widgets.HTML(layout=widgets.Layout(margin="0 8px"))
        self.notice.add_class("dnb-notice")
        self.pause.on_click(lambda _: self._act("resume" if self._run.status == "paused" else "pause"))
        self.stop.on_click(lambda _: self._act("stop"))
        self.checkpoint.on_click(lambda _: self._act("checkpoint"))

    @property
    def row(self) -> tuple[widgets.Button, ...]:
        """The buttons in their order."""
        return self.pause, self.stop, self.checkpoint

    def show(self) -> None:
        """Show what can be pressed now, and what is under way."""
        run = self._run
        self._forget_what_came_true()
        is_paused = run.status == "paused"
        can_go_on = run.status in ("running", "paused")
        self.pause.icon = "play" if is_paused else "pause"
        # a step that failed is computed again as it is: whether that helps, only its author knows
        again = "Retry" if run.error else "Resume"
        self._show(self.pause, again if is_paused else "Pause", when=can_go_on, verbs=("pause", "resume"))
        self._show(self.stop, "Stop", when=not has_ended(run), verbs=("stop",))
        self._show(self.checkpoint, "Checkpoint", when=can_go_on, verbs=("checkpoint",))

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

    def _act(self, verb: str) -> None:
        # it may wait for the hub: the kernel's main thread must not
        with self._lock:
            self._pending[verb] = None
            self.show()
            if not self._is_listening:
                self._is_listening = True
                self._run.add_listener(self._hear)
        threading.Thread(target=self._attempt, args=(verb,), name=f"dnb-{verb}-{self._run.name}", daemon=True).start()

    def _hear(self, run: RunView) -> None:
        """Show at once what a press has brought about: the painter may have painted just before."""
        with self._lock:
            self._changed()
            if not self._pending:
                self._is_listening = False
                run.remove_listener(self._hear)

    def _attempt(self, verb: str) -> None:
        try:
            result: Any = getattr(self._run, verb)()
        except Exception as error:  # a thread has nobody to raise to: said in the strip, and logged
            log.warning("%s of run %s failed", verb, self._run.name, exc_info=True)
            text, is_done = f"{verb} failed: {one_line(str(error)) or type(error).__name__}", True
        else:
            text = f"checkpoint written: {one_line(str(result))}" if verb == "checkpoint" else ""
            is_done = verb == "checkpoint"
        with self._lock:
            if is_done:
                self._pending.pop(verb, None)
            elif verb in self._pending:
                self._pending[verb] = self._run.step
            self.notice.value = as_html(text, role="alert") if text else ""
            self._changed()


def _button(description: str, *, icon: str, tooltip: str) -> widgets.Button:
    layout = widgets.Layout(width="auto", min_width="92px", flex="0 0 auto")
    return widgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
