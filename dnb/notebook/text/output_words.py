"""The output of user code in a summary: the first line of each kind, and how many there are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dnb.notebook.formatting import counted, one_line
from dnb.notebook.views import EventView

# So many kinds are shown; the file of the run has the rest.
MOST_KINDS = 3
_NUMBER = re.compile(r"\d+(\.\d+)?([eE][-+]?\d+)?")


def output_lines(events: Sequence[EventView]) -> list[str]:
    """Describe what user code has printed on engines; lines that differ only in numbers are one kind."""
    firsts: dict[str, str] = {}
    num_lines = 0
    for event in events:
        if event.kind != "output":
            continue
        for line in event.text.split("\n"):
            num_lines += 1
            kind = _NUMBER.sub("0", line)
            firsts.setdefault(kind, f"output of engine {event.engine} after step {event.step:,}: {one_line(line)}")
    if not num_lines:
        return []
    amount = f"{counted(num_lines, 'line')} of {counted(len(firsts), 'kind')}"
    return [*list(firsts.values())[:MOST_KINDS], f"output: {amount}: run.output, or output.log in the run's folder"]
