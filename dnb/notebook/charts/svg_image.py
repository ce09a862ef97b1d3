"""The image of a chart for pages that draw no plotly, kept where JupyterLab does not show it in the chart's place.

nbconvert knows no plotly, and would show the words. But of an output that has image/png beside plotly, JupyterLab shows
the image until the mouse is over it. An SVG that holds the image is passed over by JupyterLab and VS Code, and shown by
nbconvert's pages, without a network.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from html import escape
from typing import Any

SVG_MIME = "image/svg+xml"


def behind_chart(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mime bundle whose PNG, if it has one, is in an SVG."""
    rest = {kind: value for kind, value in content.items() if kind != "image/png"}
    if "image/png" not in content:
        return rest
    return {**rest, SVG_MIME: _svg(content["image/png"], words=content["text/plain"])}


def _svg(png: str, *, words: str) -> str:
    image = base64.b64decode(png)
    # width and height are the first two numbers of a PNG's first chunk: its specification, section 11.2.2
    width, height = struct.unpack(">II", image[16:24])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" style="max-width:100%;height:auto"><title>{escape(words)}</title>'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{png}"/></svg>'
    )
