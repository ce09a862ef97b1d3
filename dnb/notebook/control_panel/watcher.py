"""The thread that keeps the control panel true, and the outputs in which the panel is shown."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable

import ipywidgets as widgets

log = logging.getLogger(__name__)

# How often the pool is asked although nothing is known to have changed: engines die without a word.
TICK_SECONDS = 2.0
LEAST_SECONDS = 0.2
FALLBACK = "The control panel of %dtrain: it lives as long as its kernel. Run %dtrain panel to open it again."


class PanelWatcher:
    """A thread that looks again and again, and at once when it is woken.

    Args:
        look: called in the thread.
        ended: likewise, when it has been closed.
    """

    def __init__(self, *, look: Callable[[], None], ended: Callable[[], None]) -> None:
        self._look = look
        self._ended = ended
        self._is_failing = False
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="dnb-panel", daemon=True)

    @property
    def is_closed(self) -> bool:
        """True once nothing is to be shown any more."""
        return self._closed.is_set()

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def wake(self) -> None:
        """Ask for the state soon."""
        self._wake.set()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._wake.set()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the thread; return True if it has ended."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _keep_looking(self) -> None:
        while not self.is_closed:
            try:
                self._look()
                self._is_failing = False
            except Exception:
                # the panel must go on with the next look; told once, not five times a second
                if not self._is_failing:
                    log.exception("the control panel could not be brought up to date")
                self._is_failing = True
            self._closed.wait(LEAST_SECONDS)
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()
        self._ended()


class PanelDisplays:
    """The outputs in which a panel is shown: each is a view of the same widgets.

    Args:
        publish: how output gets into the notebook.
    """

    def __init__(self, publish: Callable[..., None]) -> None:
        self._publish = publish
        self._ids: list[str] = []

    def show(self, box: widgets.Widget) -> None:
        """Show the widgets in the current cell, too."""
        display_id = f"dnb-panel-{uuid.uuid4().hex[:8]}"
        self._publish({**box._repr_mimebundle_(), "text/plain": FALLBACK}, display_id=display_id)
        self._ids.append(display_id)

    def close(self) -> None:
        """Leave a line of text in the place of each."""
        for display_id in self._ids:
            self._publish({"text/plain": FALLBACK}, display_id=display_id, update=True)
        self._ids.clear()
