"""The one figure widget. A module of its own: its import takes seconds, so the painter's thread does it."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Container
from pathlib import Path
from typing import Any

import plotly
import plotly.graph_objects as go
import traitlets
from plotly.basedatatypes import Undefined

from dnb.notebook.charts import subplots

# the last is what plotly 7.1 sends under a name that its Python side does not know
_DEFAULTS = frozenset({"_js2py_traceDeltas", "_js2py_layoutDelta", "_js2py_widget_layoutDelta"})

_LOADER = Path(__file__).with_suffix(".js")
_CODE = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"

# plotly.js draws all subplots anew at each change, for 50 to 150 ms. At most this share of a page's time goes into it.
_PAGE_SHARE = 0.25
# A page that has not said that it has drawn is waited for so long, then twice as long and so on: it is slow, or gone,
# or the kernel runs a cell and does not hear it.
_PATIENCE_SECONDS = 1.5
_MOST_PATIENCE_SECONDS = 6.0


class LiveFigure(go.FigureWidget):
    """A FigureWidget that a thread may paint and a reloaded page finds up to date."""

    _esm = _LOADER.read_text().replace("VERSION", plotly.__version__)
    _still_name = traitlets.Unicode().tag(sync=True)  # by which a reloaded page finds the picture that it left
    was_asked_again = False  # for its whole state, by a page that was reloaded

    def __init__(self, drawing: subplots.Figure) -> None:
        self._painting = threading.RLock()
        self._shown = drawing
        self._is_built = False
        self._sent: float | None = None  # when the page was told of what it has not drawn yet
        self._patience_seconds = _PATIENCE_SECONDS
        self._drawing_seconds = 0.0  # of the page, on average
        self._rested = 0.0  # when the page has had time for other things
        self._still_name = uuid.uuid4().hex
        super().__init__(data=drawing["data"], layout={**drawing["layout"], "template": "none"})
        self._config = {**self._config, "displaylogo": False}  # type: ignore[has-type]
        self._is_built = True
        self.on_msg(self._answer_page)
        self.open()

    def open(self) -> None:
        """Tell the page of the figure, not before it is whole.

        ipywidgets does it first of all. A page that still loads plotly.js then draws the empty figure that it was told
        of, and takes the traces that came a moment later for drawn: it stays blank.
        """
        if self._is_built:
            super().open()

    def _answer_page(self, _figure: object, content: dict[str, Any], _buffers: object) -> None:
        """Answer a page that asks for plotly.js, or that has loaded it and is sent all that was painted meanwhile."""
        match content:
            case {"dnb": "code"}:
                self.send({"dnb": "code"}, buffers=[_CODE.read_bytes()])
            case {"dnb": "loaded"}:
                with self._painting:
                    self.fit_to_page()  # changes the layout: else the page could not tell that the rest came
                    self.send_state(["_widget_data", "_widget_layout"])

    def paint(self, drawing: subplots.Figure) -> None:
        """Send what has changed since the last painting, in one message unless subplots came or went.

        Args:
            drawing: what is to be seen. If its x axis counts something else, the user's zoom has an end.
        """
        with self._painting:
            self._renew(drawing["data"])
            self._change(drawing)

    def _renew(self, traces: list[dict[str, Any]]) -> None:
        """Bring the traces that there are in line: a timeline comes after the first steps, an engine's areas later.

        A trace keeps its kind and axes for life; from the first that would have others all are made anew.
        """
        shown = self._shown["data"]
        pairs = zip(shown, traces, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: _place(pair[0]) == _place(pair[1]), pairs))
        if same < len(shown):
            self.data = self.data[:same]  # type: ignore[has-type]
        if same < len(traces):
            self.add_traces(traces[same:])
        self._shown = {**self._shown, "data": [*shown[:same], *traces[same:]]}

    def _change(self, drawing: subplots.Figure) -> None:
        old = self._shown["layout"]
        layout = subplots.changes(_without(old, _renewed(old, drawing["layout"])), drawing["layout"])
        whole = {key: value for key, value in layout.items() if isinstance(value, dict) or _is_of_dicts(value)}
        if whole:  # as many objects as before: plotly must make or forget them
            with self.batch_update():
                _assign(self.layout, whole)
        pairs = zip(self._shown["data"], drawing["data"], strict=True)
        traces = {place: subplots.changes(old, new) for place, (old, new) in enumerate(pairs)}
        self._update_page({place: new for place, new in traces.items() if new}, _without(layout, whole))
        if "height" in layout:  # plotly.js then takes the width of now for the one that is wanted
            self._send_relayout_msg({"autosize": True})
        self._shown = drawing

    def _update_page(self, traces: dict[int, dict[str, Any]], layout: dict[str, Any]) -> None:
        """Send one message; assigning to traces and layout would check each array again, twice, for milliseconds."""
        keys = dict.fromkeys(key for new in traces.values() for key in new)
        restyle = {key: [new.get(key, Undefined) for new in traces.values()] for key in keys}
        if restyle or layout:
            if self._sent is not None:
                self._patience_seconds = min(2 * self._patience_seconds, _MOST_PATIENCE_SECONDS)
            self._sent = time.monotonic()
            self.plotly_update(restyle, layout, trace_indexes=list(traces))

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
        self._measure_page(sync_data.get("_js2py_traceDeltas") or {})
        wanted = {key: value for key, value in sync_data.items() if key not in _DEFAULTS}
        if wanted:
            # ipywidgets holds back and merges messages meanwhile: one that `paint` sent would be lost
            with self._painting:
                super().set_state(wanted)

    def _measure_page(self, deltas: dict[str, Any]) -> None:
        """Measure the page by its answer when it has drawn; one that waited for a busy kernel says nothing of it."""
        if self._sent is None or deltas.get("trace_edit_id") != self._last_trace_edit_id:
            return
        sent, took = self._sent, time.monotonic() - self._sent
        self._sent, self._patience_seconds = None, _PATIENCE_SECONDS
        if took < _PATIENCE_SECONDS:
            self._drawing_seconds = 0.5 * self._drawing_seconds + 0.5 * took
            self._rested = sent + self._drawing_seconds / _PAGE_SHARE

    @property
    def is_resting(self) -> bool:
        """True while the page still draws what it was sent, or should not be busy with drawing alone."""
        now, sent = time.monotonic(), self._sent
        return now < self._rested if sent is None else now < sent + self._patience_seconds

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """Give the whole state, as a reloaded page asks for it.

        plotly brings `_widget_data` up to date only when a figure is displayed on its own.
        """
        if self.comm is not None and key is None:
            self.was_asked_again = True
            self._sent = None
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


def _without(values: dict[str, Any], others: Container[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in others}


def _is_of_dicts(value: object) -> bool:
    """Return True for annotations, shapes or buttons: a list of plotly's objects, or none of them any more."""
    return value is None or (isinstance(value, list) and (not value or isinstance(value[0], dict)))


def _renewed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Return the axes on which a user's zoom would mean something else: all, if x counts other things or units."""
    if old["xaxis"]["title"]["text"] != new["xaxis"]["title"]["text"]:
        return {key for key in old if key.startswith(("xaxis", "yaxis"))}
    return {"yaxis"} if old["yaxis"].get("type") != new["yaxis"].get("type") else set()


def _place(trace: dict[str, Any]) -> tuple[Any, ...]:
    return trace["type"], trace.get("xaxis"), trace.get("yaxis"), trace.get("stackgroup")
