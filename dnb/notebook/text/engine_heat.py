"""Many engines of a run as a heat map in HTML, and in words. Pure functions, no text in them is markup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from statistics import median

from dnb.notebook.formatting import counted, numbered
from dnb.notebook.text.engine_text import NOT_KNOWN, state_of
from dnb.notebook.views import SHARES, WorkerView

# More engines than this share a heat map.
MOST_ROWS = 12
# Ids of one row of a heat map.
PER_ROW = 10
# Colour is never the only sign: the mark, and the word.
MARKS = {"busy": "●", "ready": "○", "spare": "◇", "hung": "▲", "dead": "✕", "left": "←"}
UNKNOWN_MARK = "?"
# States in which an engine's share of computing says nothing.
_WITHOUT_SHARE = frozenset({"spare", "hung", "dead", "left"})
_NUM_SHADES = 5


def heat_map(workers: Sequence[WorkerView], *, hung: Collection[int] = (), is_over: bool = False) -> str:
    """Draw a table of ten engines a row: shares of computing, and the marks of those that do not take part.

    Args:
        workers: one cell each, at its id.
        hung: ids of those that are not heard.
        is_over: the run has ended, and sentences are about the past.
    """
    cells = {worker.engine: _cell(worker, state=state_of(worker, hung=hung)) for worker in workers}
    first_row, last_row = min(cells) // PER_ROW, max(cells) // PER_ROW
    head = "".join(f'<th scope="col">{digit}</th>' for digit in range(PER_ROW))
    rows = "".join(_row(PER_ROW * row, cells) for row in range(first_row, last_row + 1) if _has_any(row, cells))
    verb = "computed" if is_over else "computes"
    caption = f"{counted(len(workers), 'engine')}: share of its time, in %, that each {verb}"
    text = "; ".join(heat_words(workers, hung=hung))
    return (
        f'<div class="dnb-heat"><table><caption>{caption}</caption><thead><tr><th scope="col">engine</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table><p>{escape(text)}</p></div>"
    )


def heat_words(workers: Sequence[WorkerView], *, hung: Collection[int] = ()) -> list[str]:
    """Describe many engines: the median, the extremes, and those that do not take part."""
    states = {worker.engine: state_of(worker, hung=hung) for worker in workers}
    known = {w.engine: w.compute for w in workers if states[w.engine] not in _WITHOUT_SHARE and _has_shares(w)}
    lines = []
    if known:
        least, most = min(known, key=lambda e: known[e]), max(known, key=lambda e: known[e])
        lines.append(
            f"median {median(known.values()):.0%}, lowest {known[least]:.0%} (engine {least}), "
            f"highest {known[most]:.0%} (engine {most})".replace("%", " %")
        )
    for state in sorted(set(states.values()) & _WITHOUT_SHARE):
        lines.append(f"{MARKS[state]} {state}: {numbered([e for e, s in states.items() if s == state], limit=8)}")
    unknown = [engine for engine, state in states.items() if state not in _WITHOUT_SHARE and engine not in known]
    return [*lines, f"{UNKNOWN_MARK} {NOT_KNOWN}: {numbered(unknown, limit=8)}"] if unknown else lines


def crowd_lines(workers: Sequence[WorkerView], *, hung: Collection[int] = ()) -> list[str]:
    """Describe a heat map in words: the extremes, and every figure in it."""
    shares = [
        f"{worker.engine}: {100 * worker.compute:.0f}"
        for worker in workers
        if state_of(worker, hung=hung) not in _WITHOUT_SHARE and _has_shares(worker)
    ]
    lines = [f"{counted(len(workers), 'engine')}, computing: {'; '.join(heat_words(workers, hung=hung))}"]
    return [*lines, f"computing, in % of its time, engine {', '.join(shares)}"] if shares else lines


def _has_any(row: int, cells: dict[int, str]) -> bool:
    return any(PER_ROW * row + column in cells for column in range(PER_ROW))


def _row(first: int, cells: dict[int, str]) -> str:
    row = "".join(cells.get(first + column, '<td class="n"></td>') for column in range(PER_ROW))
    return f'<tr><th scope="row">{first} to {first + PER_ROW - 1}</th>{row}</tr>'


def _cell(worker: WorkerView, *, state: str) -> str:
    if state in _WITHOUT_SHARE:
        kind = "h" if state == "hung" else "x"
        return f'<td class="{kind}" aria-label="{state}">{MARKS[state]}</td>'
    if not _has_shares(worker):
        return f'<td class="x" aria-label="{NOT_KNOWN}">{UNKNOWN_MARK}</td>'
    shade = min(int(_NUM_SHADES * worker.compute), _NUM_SHADES - 1)
    return f'<td class="s{shade}">{100 * worker.compute:.0f}</td>'


def _has_shares(worker: WorkerView) -> bool:
    return any(getattr(worker, share) for share in SHARES)
