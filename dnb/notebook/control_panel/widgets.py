"""Parts of the control panel: fields with labels, choices, and buttons that show the line that they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as widgets

from dnb.errors import RunError
from dnb.notebook.control_panel.choices import Choice
from dnb.notebook.control_panel.lanes import LineResult
from dnb.notebook.text.summary import one_line

LABEL_WIDTH = "104px"
_INK = "color:var(--jp-ui-font-color1, inherit);line-height:1.45"
_QUIET = "color:var(--jp-ui-font-color2, inherit)"
_CODE = (
    "font-family:var(--jp-code-font-family, monospace);font-size:12px;color:var(--jp-ui-font-color1, inherit);"
    "background:var(--jp-layout-color2, transparent);padding:2px 5px;border-radius:2px;"
    "white-space:pre-wrap;overflow-wrap:anywhere;user-select:all"
)
# Okabe and Ito's; the word that stands in front says the same.
_EDGES = {"Working": "#56B4E9", "Done": "#009E73", "Failed": "#D55E00"}
_GRID = "repeat(auto-fill, minmax(min(100%, {least}px), 1fr))"


class PanelAction:
    """A button, what belongs to it, and the very line that it runs.

    Args:
        word: on the button.
        icon: beside it.
        press: is given the line that was shown.
        fields: between button and line.
        tooltip: what it does, in more words.
        style: of the button, in ipywidgets' terms.
    """

    def __init__(
        self,
        word: str,
        *,
        icon: str,
        press: Callable[[str], None],
        fields: Sequence[widgets.Widget] = (),
        tooltip: str = "",
        style: str = "",
    ) -> None:
        self.line = ""
        self._press = press
        layout = widgets.Layout(width="116px", flex="0 0 auto")
        self.button = widgets.Button(
            description=word, icon=icon, tooltip=tooltip or word, button_style=style, layout=layout
        )
        self.button.on_click(self._pressed)
        self.shown = widgets.HTML(layout=widgets.Layout(flex="1 1 130px", min_width="0"))
        self.box = widgets.HBox(
            [self.button, *fields, self.shown],
            layout=widgets.Layout(flex_flow="row wrap", align_items="center"),
        )

    def show(self, line: str, *, obstacle: str = "", is_there: bool = True) -> None:
        """Show the line, and what stands in its way; what has not changed is not sent."""
        self.line = line
        self.button.disabled = bool(obstacle)
        reason = f' <span style="{_QUIET}">{escape(obstacle)}</span>' if obstacle else ""
        self.shown.value = f'<div style="{_INK}">{code(line) if line else ""}{reason}</div>'
        self.box.layout.display = "" if is_there else "none"

    def _pressed(self, _button: object) -> None:
        if self.line and not self.button.disabled:
            self._press(self.line)


def field(label: str, *, hint: str = "", width: str = "auto") -> widgets.Text:
    """Build a line of text with its label; blank is what the hint says.

    Args:
        label: in front of it.
        hint: seen while it is blank.
        width: of both; in a grid, as wide as its column.
    """
    return widgets.Text(
        description=label,
        placeholder=hint,
        style={"description_width": LABEL_WIDTH if width == "auto" else "initial"},
        layout=widgets.Layout(width=width, min_width="0"),
    )


def chooser(label: str) -> widgets.Dropdown:
    """Build a list to choose from, filled by `offer`."""
    return widgets.Dropdown(
        options=[("", "")],
        description=label,
        style={"description_width": LABEL_WIDTH},
        layout=widgets.Layout(width="auto", min_width="0"),
    )


def offer(dropdown: widgets.Dropdown, choices: Sequence[Choice], *, wish: str = "", nothing: str = "") -> None:
    """Offer these; what was chosen stays chosen as long as it is among them.

    Args:
        dropdown: whose options are set, if they differ.
        choices: the first one is chosen if what was is gone.
        wish: the words of the one that is chosen instead of the first.
        nothing: is said if there are none.
    """
    options = tuple((one_line(choice.label, limit=70), choice.words) for choice in choices) or ((nothing, ""),)
    if options == dropdown.options:
        return
    kept, words = dropdown.value, [option[1] for option in options]
    dropdown.options = options
    dropdown.value = kept if kept in words else wish if wish in words else words[0]


def grid(children: Sequence[widgets.Widget], *, least: int) -> widgets.GridBox:
    """Fields in as many columns as the page has room for, each at least so many pixels wide."""
    layout = widgets.Layout(grid_template_columns=_GRID.format(least=least), grid_gap="2px 12px", margin="0 0 4px")
    return widgets.GridBox(list(children), layout=layout)


def section(title: str, children: Sequence[widgets.Widget]) -> widgets.VBox:
    """Parts under a heading."""
    heading = widgets.HTML(f'<h4 style="margin:8px 0 2px;font-size:14px;{_INK}">{escape(title)}</h4>')
    return widgets.VBox([heading, *children], layout=widgets.Layout(margin="0 0 4px"))


def sentence(text: str) -> str:
    """Write plain text as HTML that shows it and never runs it."""
    return f'<div style="{_INK};font-variant-numeric:tabular-nums">{escape(text)}</div>'


def code(line: str) -> str:
    """Write a line as it is typed into a cell; one click chooses all of it."""
    return f'<code style="{_CODE}">{escape(f"%dtrain {line}")}</code>'


def working(line: str, *, progress: str) -> str:
    """Write the line that is under way, and its progress."""
    return _told("Working", line, f" {escape(progress)}")


def told(outcome: LineResult) -> str:
    """Write the result of a line: the verb's own words, or its error."""
    if outcome.error is None:
        return _told("Done", outcome.line, _lines(outcome.words))
    message, details = _message(outcome.error)
    more = f"<details><summary>traceback of the engine</summary>{_lines(details)}</details>" if details else ""
    return _told("Failed", outcome.line, f"{_lines(outcome.words)}<div>{escape(message)}</div>{more}")


def _message(error: BaseException) -> tuple[str, str]:
    details = error.remote_traceback if isinstance(error, RunError) else ""
    text = str(error).removesuffix(details).strip() if details else str(error)
    return f"{type(error).__name__}: {text}", details


def _told(word: str, line: str, more: str) -> str:
    edge = f"border-left:4px solid {_EDGES[word]};padding:2px 8px;margin:2px 0"
    role = "alert" if word == "Failed" else "status"
    return f'<div role="{role}" style="{_INK};{edge}"><b>{word}</b> {code(line)}{more}</div>'


def _lines(text: str) -> str:
    style = f"margin:4px 0;background:none;font-size:12px;white-space:pre;overflow-x:auto;{_INK}"
    return f'<pre style="{style}">{escape(text)}</pre>' if text else ""
