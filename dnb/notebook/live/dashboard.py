"""The live view: one figure and a strip of controls, painted from one thread, replaced by plain output at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from dnb.engine.runtime.allocator import release_freed_memory
from dnb.notebook.charts.run_figure import WIDE_PIXELS
from dnb.notebook.charts.svg_image import behind_chart
from dnb.notebook.charts.x_axis import checked_kind
from dnb.notebook.live.controls import Controls
from dnb.notebook.live.live_drawing import LiveDrawing
from dnb.notebook.live.painter import PAINT_INTERVAL_SECONDS, Painter
from dnb.notebook.pages.snapshot import bundle, new_display_id, publish
from dnb.notebook.text.summary import progress_line
from dnb.notebook.views import RunView, has_ended

if TYPE_CHECKING:
    from dnb.notebook.charts.subplots import Figure
    from dnb.notebook.live.browser.live_figure import LiveFigure


class Dashboard:
    """The live view of one run; its painter ends with the run, or when its widgets were closed.

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
        self._ending = threading.Lock()
        self._is_over = False
        self._is_fitted = True
        self._was_kept = False
        self._display_ids: list[str] = []
        self._drawing = LiveDrawing(run)
        self._x, self._loss_scale = "step", "linear"
        self.controls = Controls(run, on_axis=self.choose_axis, on_loss_scale=self.choose_loss_scale)
        self.controls.engines.observe(self._fit_layout, names="page_width")
        self.controls.engines.on_gone(self._forget_widgets)
        self.figure: LiveFigure | None = None
        self.box = widgets.VBox([self.controls.box])
        self._painter = Painter(
            run.name,
            paint=self.paint,
            rest=self._fit_to_page,
            is_over=lambda: has_ended(run),
            finish=self._finish,
            interval_seconds=interval_seconds,
            is_resting=lambda: self.figure is not None and self.figure.is_resting,
        )
        self._listener = self._painter.wake  # one object: a bound method is another each time
        run.add_listener(self._listener)
        self._painter.start()

    @property
    def is_closed(self) -> bool:
        """True if it stopped before the run ended, as it or its widgets were closed; it cannot be shown again."""
        return self._painter.is_closed or (not self._is_over and self._has_lost_widgets())

    @property
    def is_owed(self) -> bool:
        """True until a cell keeps the chart of a run whose page was reloaded: the view's own output cannot."""
        return self.was_reloaded and not self._was_kept

    @is_owed.setter
    def is_owed(self, is_owed: bool) -> None:
        self._was_kept = not is_owed

    @property
    def was_reloaded(self) -> bool:
        """True if a page has asked for the figure again."""
        return self.figure is not None and self.figure.was_asked_again

    def show(self) -> None:
        """Display the view in the current cell; the strip is there at once, the chart follows."""
        display_id = new_display_id(self._run)
        with self._ending:
            if self._is_over:
                self._publish(self._plain(), display_id=display_id)
                return
            words = f"{progress_line(self._run)} when this view was opened: %dtrain dashboard shows the run as it is"
            view = {**self.box._repr_mimebundle_(), "text/plain": words}
            self._publish(view, display_id=display_id)
            self._display_ids.append(display_id)

    def choose_axis(self, kind: str) -> None:
        """Let the x axes count "step", "samples" or "time" from now on.

        Raises:
            ArgumentError: there is no such x axis.
        """
        self._x = checked_kind(kind)
        self._paint_soon()

    def choose_loss_scale(self, scale: str) -> None:
        """Let the loss be on a "linear" or "log" scale from now on."""
        self._loss_scale = scale
        self._paint_soon()

    def _fit_layout(self, _change: object) -> None:
        """Let the chart take the width that there is, in one column or two."""
        self._is_fitted = False
        self._paint_soon()

    def _paint_soon(self) -> None:
        self._painter.hurry()
        if self._is_over:  # a reloaded page still shows the widgets, and the painter is gone
            self.paint()

    def paint(self) -> None:
        """Bring the strip and the figure up to date, or close if the user has closed them."""
        if self._has_lost_widgets():
            self.close()
            return
        self.controls.refresh()
        if self.figure is None and has_ended(self._run):
            return  # nobody would see it
        is_wide = self.controls.engines.page_width >= WIDE_PIXELS
        drawing = self._drawing.draw(
            x=self._x, loss_scale=self._loss_scale, is_wide=is_wide, is_whole=has_ended(self._run)
        )
        if self.figure is None:
            self._add_figure(drawing)
        else:
            self.figure.paint(drawing)
            if not self._is_fitted:
                self.figure.fit_to_page()
        self._is_fitted = True

    def close(self) -> None:
        """Stop painting before the run ends; what is displayed stays as it is."""
        self._painter.close()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the painter to end; return True if it did."""
        return self._painter.join(timeout_seconds=timeout_seconds)

    def _has_lost_widgets(self) -> bool:
        """Return True if the user has closed one of them: it has no connection to the page any more."""
        return any(widget is not None and widget.comm is None for widget in (self.box, self.controls.box, self.figure))

    def _fit_to_page(self) -> None:
        if self.figure is not None:
            self.figure.fit_to_page()

    def _add_figure(self, drawing: Figure) -> None:
        from dnb.notebook.live.browser.live_figure import LiveFigure  # plotly: seconds, in this thread

        self.figure = LiveFigure(drawing)
        self.box.children = (self.controls.box, self.figure)

    def _finish(self) -> None:
        self._run.remove_listener(self._listener)
        if not has_ended(self._run) or self._has_lost_widgets():
            return
        try:
            self.paint()
        finally:  # whatever the widgets would not take, the notebook keeps a picture
            self._replace_by_plain_output()
            release_freed_memory()  # of drawing and of messages; a small server has other use for 20 MB

    def _replace_by_plain_output(self) -> None:
        plain = self._plain()
        with self._ending:
            self._is_over = True
            for display_id in self._display_ids:
                self._publish(plain, display_id=display_id, update=True)

    def _plain(self) -> dict[str, Any]:
        return behind_chart(bundle(self._run, with_image=True, x=self._x, loss_scale=self._loss_scale))

    def _forget_widgets(self) -> None:
        """Close the widgets once a page shows plain output in their place: they are 5 MB there, for nothing.

        A page that was reloaded has forgotten the display ids, and still shows them; one that was closed before the
        end has seen nothing of it, and is to find them when it is opened.
        """
        if self._is_over and not self.was_reloaded:
            self._close_widgets()

    def _close_widgets(self) -> None:
        for widget in (self.box, self.figure, *self.controls.widgets):
            if widget is not None:
                widget.close()
