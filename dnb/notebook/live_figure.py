"""The one figure widget. A module of its own: its import takes seconds, so the painter's thread does it."""

from __future__ import annotations

import threading
from typing import Any

import plotly.graph_objects as go

from dnb.notebook import panels

# the last is what plotly 7.1 sends under a name that its Python side does not know
_DEFAULTS = frozenset({"_js2py_traceDeltas", "_js2py_layoutDelta", "_js2py_widget_layoutDelta"})


class LiveFigure(go.FigureWidget):
    """A FigureWidget that a thread may paint and a reloaded page finds up to date."""

    was_asked_again = False  # for its whole state, by a page that was reloaded

    def __init__(self, drawing: panels.Figure) -> None:
        self._painting = threading.RLock()
        self._shown = drawing
        self._is_built = False
        super().__init__(data=drawing["data"], layout={**drawing["layout"], "template": "none"})
        self._is_built = True

    def paint(self, drawing: panels.Figure) -> None:
        """Send what has changed since the last painting, in one message."""
        with self._painting:
            self._add(drawing["data"][len(self.data) :])
            self._change(drawing)

    def _add(self, traces: list[dict[str, Any]]) -> None:
        """What came to the figure since: the timeline of a divided run, which is there only after its first steps."""
        if traces:
            self.add_traces(traces)
            self._shown = {**self._shown, "data": [*self._shown["data"], *traces]}

    def _change(self, drawing: panels.Figure) -> None:
        with self.batch_update():
            for trace, old, new in zip(self.data, self._shown["data"], drawing["data"], strict=True):
                _assign(trace, panels.changes(old, new))
            _assign(self.layout, panels.changes(self._shown["layout"], drawing["layout"]))
            self._shown = drawing

    def fit_to_page(self) -> None:
        """Let plotly.js take the width that there is: it does so only when something is sent.

        It draws before the page has given it a width, and does not notice a side bar that opens.
        """
        with self._painting, self.batch_update():
            self.layout.meta = (self.layout.meta or 0) + 1

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take what the browser sends, but for the defaults that plotly.js filled in.

        They come after each painting, 18 kB for seven traces, and ipywidgets would send them all back.
        """
        wanted = {key: value for key, value in sync_data.items() if key not in _DEFAULTS}
        if wanted:
            # ipywidgets holds back and merges messages meanwhile: one that `paint` sent would be lost
            with self._painting:
                super().set_state(wanted)

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """Give the whole state, as a reloaded page asks for it.

        plotly brings `_widget_data` up to date only when a figure is displayed on its own.
        """
        self.was_asked_again |= self._is_built and key is None
        with self._painting:
            state: dict[str, Any] = super().get_state(key=key, drop_defaults=drop_defaults)
            for trait, current in self._current().items() if self._is_built else ():
                if trait in state:
                    state[trait] = self.trait_metadata(trait, "to_json")(current, self)
        return state

    def _current(self) -> dict[str, Any]:
        return {"_widget_data": self._data, "_widget_layout": self._layout_obj._props}


def _assign(target: Any, values: dict[str, Any]) -> None:
    # not target.update(values): that merges lists, so that a remark once made would stay
    for key, value in values.items():
        target[key] = value
