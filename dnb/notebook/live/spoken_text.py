"""Words in a widget that a screen reader speaks when they are news."""

from __future__ import annotations

from html import escape

import ipywidgets as widgets

_INK = "color:var(--jp-ui-font-color1, inherit)"
_ERROR_INK = "color:var(--jp-error-color1, #d32f2f); font-weight:600"
_TEXT = f"line-height:1.4; font-variant-numeric:tabular-nums; {_INK}"


class SpokenText:
    """A line of text; a screen reader speaks it when it is of another kind, not whenever a figure in it changes."""

    def __init__(self) -> None:
        self.html = widgets.HTML(layout=widgets.Layout(margin="0 8px"))
        self._kind: object = None
        self._is_new = True

    @property
    def value(self) -> str:
        """The HTML as it is shown."""
        shown: str = self.html.value
        return shown

    def say(self, text: str, *, kind: object, strong: str = "", is_error: bool = False) -> None:
        """Show a text; what has not changed is not sent.

        Args:
            text: plain, which is never run as HTML.
            kind: of what it says; another one is news.
            strong: a name before it.
            is_error: whether it is to look like one.
        """
        is_news = self._is_new or self._kind != kind
        html = as_html(text, strong=strong, live="polite" if is_news else "off", is_error=is_error)
        # what was spoken stays as it is until its words change: else it would be sent again as silent
        if is_news or html != self.html.value.replace('aria-live="polite"', 'aria-live="off"'):
            self.html.value = html
        self._kind, self._is_new = kind, False


def as_html(text: str, *, strong: str = "", live: str = "", role: str = "status", is_error: bool = False) -> str:
    """Return plain text as HTML that shows it and never runs it."""
    name = f"<b>{escape(strong)}</b>: " if strong else ""
    spoken = f' role="{role}"' + f' aria-live="{live}"' * bool(live) if live or role == "alert" else ""
    style = _TEXT.replace(_INK, _ERROR_INK) if is_error else _TEXT
    return f'<div style="{style}"{spoken}>{name}{escape(text)}</div>'
