"""The image of a chart for pages that draw no plotly, kept where JupyterLab does not prefer it to the chart itself.

JupyterLab shows of one output what ranks first, and image/png ranks before plotly; nbconvert knows no plotly, and would
show the words. A script ranks behind plotly there and in VS Code, and is run by nbconvert's pages, without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SCRIPT_MIME = "application/javascript"


def behind_chart(content: Mapping[str, Any]) -> dict[str, Any]:
    """A mime bundle whose PNG, if it has one, is put into the page by a script."""
    rest = {kind: value for kind, value in content.items() if kind != "image/png"}
    if "image/png" not in content:
        return rest
    return {**rest, SCRIPT_MIME: _script(content["image/png"], words=content["text/plain"])}


def _script(image: str, *, words: str) -> str:
    # `element` is the output's own, or jQuery's wrapper of it: both append
    alt = json.dumps(words).replace("<", "\\u003c")  # stands in a script element, which "</script>" would end
    return (
        f'{{ const image = new Image(); image.src = "data:image/png;base64,{image}"; image.alt = {alt}; '
        'image.style.maxWidth = "100%"; element.append(image); }'
    )
