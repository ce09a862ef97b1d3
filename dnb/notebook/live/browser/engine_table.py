"""The engines of a run in a page: a row each, or a heat map of many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

_CODE, _STYLE = (Path(__file__).with_suffix(suffix).read_text() for suffix in (".js", ".css"))


class EngineTable(anywidget.AnyWidget):
    """Rows of engines, of which each unfolds in the page alone; without a kernel, too.

    `rows` is as `dnb.notebook.text.engine_rows.engine_rows` returns them, `crowd` HTML that stands in their place. The
    page tells its width, in pixels, as `page_width`, 0 before there is a page.
    """

    _esm = _CODE
    _css = _STYLE
    rows: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    crowd = traitlets.Unicode().tag(sync=True)
    page_width = traitlets.Int(0).tag(sync=True)

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call back when a page no longer shows one of the views."""

        def hear(_table: object, content: dict[str, Any], _buffers: object) -> None:
            if content.get("dnb") == "gone":
                callback()

        self.on_msg(hear)
