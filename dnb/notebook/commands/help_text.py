"""Help on `%dtrain` in plain text: the table of verbs, and the page of one."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import groupby

from dnb.errors import ArgumentError, nearest
from dnb.notebook.commands.reference import FlagRecord, VerbRecord, reference

_MOST_COLUMNS, _LEAST_COLUMNS = 110, 60
_WIDEST_FLAG = 30  # a flag that is wider has a line of its own

_FOOT = """\
%dtrain VERB --help tells the flags of a verb, with an example.
%%dtrain [--on 0,2-3] [--local] on top of a cell runs the cell on the engines.
Words name variables of the notebook, or are expressions in braces: --batch-size {2 * n}."""


def help_on(verb: str = "") -> str:
    """Return the page of a verb; of none, the table of all.

    Raises:
        ArgumentError: there is no such verb.
    """
    records = {record.name: record for record in reference()}
    if not verb:
        return table_text(list(records.values()))
    if verb not in records:
        raise ArgumentError(f"%dtrain has no verb {verb!r}: {nearest(verb, records)}")
    return page_text(records[verb], columns=num_columns())


def table_text(records: Sequence[VerbRecord]) -> str:
    """Return all verbs with a line each, by groups."""
    width = max(len(record.name) for record in records)
    lines = ["usage: %dtrain VERB [WORDS] [FLAGS]"]
    for group, members in groupby(records, key=lambda record: record.group):
        lines += ["", group.capitalize(), *(f"  {record.name:<{width}}  {record.sentence}" for record in members)]
    return "\n".join([*lines, "", _FOOT])


def page_text(record: VerbRecord, *, columns: int) -> str:
    """Return usage, sentence, flags and example of a verb."""
    usage = [f"{'usage: ' if not index else ' ' * 7}{line}" for index, line in enumerate(record.usage)]
    lines = [*usage, "", record.sentence]
    flags = sorted(record.flags, key=lambda flag: not flag.is_positional)
    if flags:
        width = max((size for flag in flags if (size := len(_left(flag))) <= _WIDEST_FLAG), default=_WIDEST_FLAG)
        lines += ["", *(line for flag in flags for line in _flag_lines(flag, width=width, columns=columns))]
    return "\n".join([*lines, "", f"example: {record.example}"])


def num_columns() -> int:
    """Return the width of the text: that of a terminal, or what a notebook's cell shows without breaking lines."""
    columns = shutil.get_terminal_size(fallback=(100, 24)).columns
    return min(max(columns, _LEAST_COLUMNS), _MOST_COLUMNS)


def _flag_lines(flag: FlagRecord, *, width: int, columns: int) -> list[str]:
    left, indent = _left(flag), " " * (width + 4)
    told = flag.sentence + (f" Default: {flag.default}." if flag.default not in ("", "off") else "")
    wrapped = textwrap.wrap(told, columns - len(indent), break_long_words=False, break_on_hyphens=False)
    below = [f"{indent}{line}" for line in wrapped]
    if len(left) > width:
        return [f"  {left}", *below]
    return [f"  {left:<{width}}  {wrapped[0] if wrapped else ''}".rstrip(), *below[1:]]


def _left(flag: FlagRecord) -> str:
    return flag.spelling if flag.is_positional else f"{flag.spelling} {flag.type}".strip()
