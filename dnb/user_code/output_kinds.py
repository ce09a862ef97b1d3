"""Kinds of printed lines: lines that differ only in numbers, or in the state of a progress bar, are of one kind."""

from __future__ import annotations

import re

# Events of a run that come of what user code prints: the first line of a kind, more lines of it that came whole, and
# how many more there were.
FIRST, REPEATED, COUNTED = OUTPUT_EVENTS = ("output", "repeated", "counted")
# Stands for all kinds beyond the number that is told apart.
OTHER_KINDS = ""
_LIKE = " more like "
_BEYOND = " more lines of other kinds"
# Bars of tqdm ("10%|#   | 1/10 [00:01<?, ?it/s]") differ in more than numbers, as do addresses of objects.
_VARYING = re.compile(r"\s*(?:\d+%\|.*|0x[0-9a-fA-F]+|[-+]?\d[\d.,:_]*(?:[eE][-+]?\d+)?(?:it/s|s/it)?|\?it/s)")


def kind_of_line(text: str) -> str:
    """Return what a text's first line has in common with all lines of its kind."""
    return _VARYING.sub("0", text.partition("\n")[0]).strip() or "0"


def write_count(number: int, first: str) -> str:
    """Say how many more lines there were like the first of their kind, or of kinds that were not told apart."""
    return f"{number:,}{_BEYOND}" if first == OTHER_KINDS else f"{number:,}{_LIKE}{first}"


def read_count(line: str) -> tuple[int, str]:
    """Read what `write_count` wrote: a number, and the first line of the kind, or `OTHER_KINDS`."""
    number, _, first = line.partition(_LIKE)
    digits = number.removesuffix(_BEYOND).replace(",", "")
    return int(digits) if digits.isdecimal() else 0, first
