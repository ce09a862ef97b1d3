"""A thread that paints when it is notified of news, not too often, and never lets an error out."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

PAINT_INTERVAL_SECONDS = 0.4
QUIET_SECONDS = 3.0
LOOK_SECONDS = 0.05  # between two looks at whether the page is ready


class Painter:
    """Paints until its subject is over, or it is closed.

    Whoever has news only wakes it: a figure takes seconds to build the first time, and the watcher's thread has the
    hub to listen to.

    Args:
        name: of the subject, for the thread and the log.
        paint: brings everything up to date; its errors are logged.
        rest: called instead when nothing has come for some seconds.
        is_over: whether there will be no more news.
        finish: called once at the end, in any case.
        interval_seconds: the least time between two paintings.
        is_resting: whether the page still needs time for what was painted last, or for other things.
    """

    def __init__(
        self,
        name: str,
        *,
        paint: Callable[[], None],
        rest: Callable[[], None],
        is_over: Callable[[], bool],
        finish: Callable[[], None],
        interval_seconds: float = PAINT_INTERVAL_SECONDS,
        is_resting: Callable[[], bool] = lambda: False,
    ) -> None:
        self._name = name
        self._paint, self._rest, self._is_over, self._finish = paint, rest, is_over, finish
        self._interval = interval_seconds
        self._is_resting = is_resting
        self._changed = threading.Event()
        self._hurried = threading.Event()
        self._closed = threading.Event()
        self._is_failing = False
        # the cell's context: what the painter displays belongs to the cell that made it
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._keep_painting,), name=f"dnb-painter-{name}", daemon=True
        )

    def start(self) -> None:
        """Start to paint, once its owner is whole."""
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """True if it was stopped before its subject was over."""
        return self._closed.is_set()

    def wake(self, _source: object = None) -> None:
        """Note that there is news."""
        self._changed.set()

    def hurry(self) -> None:
        """Paint at once: somebody has pressed something."""
        self._changed.set()
        self._hurried.set()

    def close(self) -> None:
        """Stop painting."""
        self._closed.set()
        self.hurry()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the thread to end; return True if it did."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _keep_painting(self) -> None:
        while not (self._is_over() or self._closed.is_set()):
            self._changed.clear()
            self._hurried.clear()
            self._attempt(self._paint)
            # not before the interval is over, then as soon as there is news: what came last is painted too
            self._hurried.wait(self._interval)
            while self._is_resting() and not (self._is_over() or self._hurried.wait(LOOK_SECONDS)):
                pass
            if not self._changed.wait(QUIET_SECONDS):
                self._attempt(self._rest)
        self._attempt(self._finish)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            # a picture that fails must not hide the next one, nor reach the run; logged once, not three times a second
            if not self._is_failing:
                log.exception("the dashboard of run %r could not be painted", self._name)
            self._is_failing = True
        else:
            self._is_failing = False
