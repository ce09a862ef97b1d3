"""Words in a widget that a screen reader speaks when they are news."""

from __future__ import annotations

from html import escape

import ipywidgets as widgets

_TEXT = "line-height:1.4; font-variant-numeric:tabular-nums; color:var(--jp-ui-font-color1, inherit)"


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

    def say(self, text: str, *, strong: str, kind: object) -> None:
        """Show a text; what has not changed is not sent.

        Args:
            text: plain, which is never run as HTML.
            strong: a name before it.
            kind: of what it says; another one is news.
        """
        is_news = self._is_new or self._kind != kind
        html = as_html(text, strong=strong, live="polite" if is_news else "off")
        # what was spoken stays as it is until its words change: else it would be sent again as silent
        if is_news or html != self.html.value.replace('aria-live="polite"', 'aria-live="off"'):
            self.html.value = html
        self._kind, self._is_new = kind, False


def as_html(text: str, *, strong: str = "", live: str = "", role: str = "status") -> str:
    """Return plain text as HTML that shows it and never runs it."""
    name = f"<b>{escape(strong)}</b>: " if strong else ""
    spoken = f' role="{role}"' + f' aria-live="{live}"' * bool(live) if live or role == "alert" else ""
    return f'<div style="{_TEXT}"{spoken}>{name}{escape(text)}</div>'
