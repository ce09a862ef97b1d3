"""The part of a cell before the cursor that is a line of `%dtrain`, and its words. Nothing here may take long."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CLOSING = {"{": "}", "(": ")", "[": "]"}
_CELL = re.compile(r"\s*%%dtrain(?:[ \t]+(?P<words>.*))?", re.DOTALL)
# `%dtrain fit`, `run = %dtrain fit`; without the percent sign, as IPython's automagic takes it, only alone on its line.
_LINE = re.compile(
    r"\s*(?:(?:[\w.,\[\]'\"()* ]+=\s*)?%dtrain|dtrain(?=[ \t]+(?:[\w-]|$)))[ \t]+(?P<words>.*)", re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TypedLine:
    """The words behind `%dtrain` up to the cursor."""

    words: tuple[str, ...]  # that are complete
    token: str  # that the cursor is in; "" behind a blank
    is_cell: bool = False  # behind %%dtrain


def read_typed(text: str) -> TypedLine | None:
    """Find the line of `%dtrain` at the end of a text; None if it ends in something else.

    Args:
        text: of a cell, up to the cursor.
    """
    cell = _CELL.fullmatch(text)
    if cell is not None:
        return _read_cell(cell["words"])
    joined = re.sub(r"\\\n", " ", text)  # IPython joins such lines, too
    line = _LINE.fullmatch(joined.rpartition("\n")[2])
    return None if line is None else _cut(line["words"], is_cell=False)


def _read_cell(words: str | None) -> TypedLine | None:
    """Read the first line of a cell magic; the lines below it, too, if a verb stands there and not a cell's flags."""
    if words is None:
        return None
    first, is_below, _ = words.partition("\n")
    if is_below and (not first.strip() or first.lstrip().startswith("-")):
        return None
    return _cut(words, is_cell=True)


def _cut(text: str, *, is_cell: bool) -> TypedLine:
    """Cut a text at blanks, but not inside quotes and brackets, of which the last may be open."""
    words: list[str] = []
    begin: int | None = None
    expected: list[str] = []
    quote = ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
            continue
        if character.isspace() and not expected:
            if begin is not None:
                words.append(text[begin:position])
            begin = None
            continue
        begin = position if begin is None else begin
        if character in "\"'":
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
    return TypedLine(words=tuple(words), token="" if begin is None else text[begin:], is_cell=is_cell)
