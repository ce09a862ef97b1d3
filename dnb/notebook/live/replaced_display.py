"""A run as plain output that is replaced every few seconds: for front ends that show pictures and have no widgets."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from dnb.notebook.pages.snapshot import bundle, new_display_id, publish
from dnb.notebook.text.summary import progress_line
from dnb.notebook.views import RunView, has_ended

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
# Of a core, at most: the image of a refresh takes a quarter of a second to draw. The first one also imports matplotlib,
# for which the second shall not be late.
MOST_LOAD = 0.05
MOST_SECONDS = 10.0


def _draw(run: RunView) -> dict[str, Any]:
    return bundle(run, with_image=True)


class ReplacedDisplay:
    """Chart, image and words, painted anew from a thread until the run ends, in all the displays there are.

    The image is in every refresh, as front ends without widgets often draw no plotly either; so a refresh may take some
    time, and the pause after it grows with that.

    Args:
        run: watched until it ends.
        publish: how output gets into the notebook.
        draw: what is displayed of a run.
        clock: seconds of a core that this thread has had.
    """

    def __init__(
        self,
        run: RunView,
        *,
        publish: Callable[..., None] = publish,
        draw: Callable[[RunView], dict[str, Any]] = _draw,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._run = run
        self._publish = publish
        self._draw = draw
        self._clock = clock
        self._display_ids: list[str] = []
        self._ending = threading.Lock()
        self._is_over = False
        self._is_told = False
        self._changed = threading.Event()
        self._ended = threading.Event()
        # what the painter displays belongs to the cell that asked for it
        context = contextvars.copy_context()
        self._painter = threading.Thread(
            target=context.run, args=(self._keep_painting,), name=f"dnb-painter-{run.name}", daemon=True
        )

    def show(self) -> None:
        """Display a line in the current cell at once; the first time, start to paint."""
        display_id = new_display_id(self._run)
        with self._ending:
            if self._is_over:
                self._publish(self._draw(self._run), display_id=display_id)
                return
            self._publish({"text/plain": progress_line(self._run)}, display_id=display_id)
            self._display_ids.append(display_id)
        if self._painter.ident is None:
            self._run.add_listener(self._wake)
            self._run.add_wait_hook(self._end_in_waiting_cell)
            self._painter.start()
        self._changed.set()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the painter to end; return True if it did."""
        self._painter.join(timeout_seconds)
        return not self._painter.is_alive()

    def _wake(self, run: RunView) -> None:
        self._changed.set()
        if has_ended(run):
            self._ended.set()

    def _keep_painting(self) -> None:
        while not has_ended(self._run):
            began = self._clock()
            is_painted = self._paint()
            took = self._clock() - began
            self._ended.wait(pause_after(took))
            if is_painted:
                self._changed.wait()
            self._changed.clear()
        self._run.remove_listener(self._wake)
        self._end()

    def _end(self) -> None:
        with self._ending:
            self._is_over = True
            self._paint()

    def _end_in_waiting_cell(self, run: RunView) -> None:
        """Bring the end again, from the cell that waits: nbclient drops a display's update that comes from no cell."""
        if has_ended(run) and not self._is_told:
            self._is_told = True
            self._end()

    def _paint(self) -> bool:
        try:
            content = self._draw(self._run)
            for display_id in list(self._display_ids):
                self._publish(content, display_id=display_id, update=True)
        except Exception:  # a picture that fails must not hide the next one
            log.exception("run %r could not be painted", self._run.name)
            return False
        return True


def pause_after(paint_seconds: float) -> float:
    """Return the seconds without painting after a painting that took so long."""
    return min(max(INTERVAL_SECONDS, paint_seconds * (1 / MOST_LOAD - 1)), MOST_SECONDS)
