"""The output of user code in a summary: the first line of each kind, and how many there are."""

from __future__ import annotations

from collections.abc import Container, Sequence

from dnb.notebook.formatting import counted, one_line
from dnb.notebook.views import EventView
from dnb.user_code.output_kinds import COUNTED, FIRST, OTHER_KINDS, REPEATED, kind_of_line, read_count

# So many kinds are shown; events and the file of the run have the rest.
MOST_KINDS = 3


def output_lines(events: Sequence[EventView]) -> list[str]:
    """Describe what user code has printed; lines that differ only in numbers are one kind."""
    firsts: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for event in events:
        if event.kind == COUNTED:
            _add_counts(numbers, event.text)
        elif event.kind in (FIRST, REPEATED):
            for line in _heads(event.text, known=numbers):
                kind = kind_of_line(line)
                numbers[kind] = numbers.get(kind, 0) + 1
                firsts.setdefault(kind, f"output of {_who(event)} after step {event.step:,}: {one_line(line)}")
    if not numbers:
        return []
    shown = [f"{first}{_more(numbers[kind] - 1)}" for kind, first in list(firsts.items())[:MOST_KINDS]]
    others = " and more" if OTHER_KINDS in numbers else ""
    amount = f"{counted(sum(numbers.values()), 'line')} of {counted(len(firsts), 'kind')}{others}"
    return [*shown, f"output: {amount}: run.output, or output.log in the run's folder"]


def _add_counts(numbers: dict[str, int], text: str) -> None:
    for line in text.split("\n"):
        number, first = read_count(line)
        kind = kind_of_line(first) if first else OTHER_KINDS
        numbers[kind] = numbers.get(kind, 0) + number


def _heads(text: str, *, known: Container[str]) -> list[str]:
    """Return lines that begin something: an indented one of no known kind belongs to the one before."""
    first, *others = text.split("\n")
    return [first, *(line for line in others if line[:1] not in (" ", "\t") or kind_of_line(line) in known)]


def _who(event: EventView) -> str:
    return "the hub" if event.engine is None else f"engine {event.engine}"


def _more(number: int) -> str:
    return f" ({number:,} more like it)" if number > 0 else ""
