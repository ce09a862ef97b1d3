"""The live view: one figure and a strip of controls, painted from one thread, replaced by plain output at the end."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import ipywidgets as widgets

from dnb.notebook.controls import Controls
from dnb.notebook.figures import figure
from dnb.notebook.snapshot import bundle, new_display_id, publish
from dnb.notebook.still_image import behind_chart
from dnb.notebook.text import progress_line
from dnb.notebook.views import RunView, has_ended

if TYPE_CHECKING:
    from dnb.notebook.live_figure import LiveFigure

log = logging.getLogger(__name__)

PAINT_INTERVAL_SECONDS = 0.35
QUIET_SECONDS = 3.0


class Dashboard:
    """The live view of one run.

    The run's listener only wakes the painter: a figure takes seconds to build the first time, and the watcher's thread
    has the hub to listen to. The painter ends with the run.

    Args:
        run: watched until it ends.
        interval_seconds: the least time between two paintings.
        publish: how output gets into the notebook.
    """

    def __init__(
        self,
        run: RunView,
        *,
        interval_seconds: float = PAINT_INTERVAL_SECONDS,
        publish: Callable[..., None] = publish,
    ) -> None:
        self._run = run
        self._publish = publish
        self._interval = interval_seconds
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._is_over = False
        self._is_failing = False
        self._display_ids: list[str] = []
        self.controls = Controls(run)
        self.figure: LiveFigure | None = None
        self.box = widgets.VBox([self.controls.box])
        # the cell's context: what the painter displays belongs to the cell that made the dashboard
        context = contextvars.copy_context()
        self._painter = threading.Thread(
            target=context.run,
            args=(self._keep_painting,),
            name=f"dnb-painter-{run.name}",
            daemon=True,
        )
        run.add_listener(self._wake)
        self._painter.start()

    def show(self) -> None:
        """Display the view in the current cell; the strip is there at once, the chart follows."""
        display_id = new_display_id(self._run)
        with self._ending:
            if self._is_over:
                self._publish(behind_chart(bundle(self._run, with_image=True)), display_id=display_id)
                return
            view = {**self.box._repr_mimebundle_(), "text/plain": progress_line(self._run)}
            self._publish(view, display_id=display_id)
            self._display_ids.append(display_id)

    def paint(self) -> None:
        """Bring the strip and, once it is built, the figure up to date."""
        self.controls.refresh()
        if self.figure is not None:
            self.figure.paint(figure(self._run))

    def close(self) -> None:
        """Stop painting before the run ends; what is displayed stays as it is."""
        self._closed.set()
        self._changed.set()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the painter to end; whether it did."""
        self._painter.join(timeout_seconds)
        return not self._painter.is_alive()

    def _wake(self, _run: RunView) -> None:
        self._changed.set()

    def _keep_painting(self) -> None:
        while not (has_ended(self._run) or self._closed.is_set()):
            self._attempt(self._add_figure if self.figure is None else self.paint)
            # not before the interval is over, then as soon as there is news: what came last is painted too
            self._closed.wait(self._interval)
            if not self._changed.wait(QUIET_SECONDS) and self.figure is not None:
                self._attempt(self.figure.fit_to_page)
            self._changed.clear()
        self._run.remove_listener(self._wake)
        if has_ended(self._run):
            self._attempt(self.paint)
            self._attempt(self._replace_by_plain_output)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            # a picture that fails must not hide the next one, nor reach the run; told once, not three times a second
            if not self._is_failing:
                log.exception("the dashboard of run %r could not be painted", self._run.name)
            self._is_failing = True
        else:
            self._is_failing = False

    def _add_figure(self) -> None:
        from dnb.notebook.live_figure import LiveFigure  # plotly: seconds, in this thread

        self.controls.refresh()
        self.figure = LiveFigure(figure(self._run))
        self.box.children = (self.controls.box, self.figure)

    def _replace_by_plain_output(self) -> None:
        plain = behind_chart(bundle(self._run, with_image=True))
        with self._ending:
            self._is_over = True
            for display_id in self._display_ids:
                self._publish(plain, display_id=display_id, update=True)
        # a reloaded page has forgotten the display ids and still shows the widgets; else they are 5 MB for nothing
        if self.figure is not None and not self.figure.was_asked_again:
            self._close_widgets()

    def _close_widgets(self) -> None:
        for widget in (self.box, self.figure, *self.controls.widgets):
            if widget is not None:
                widget.close()
