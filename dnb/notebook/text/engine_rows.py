"""The engines of a run as rows of words, as the live view shows them. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dnb.notebook.formatting import one_line
from dnb.notebook.text.engine_heat import MARKS, MOST_ROWS, UNKNOWN_MARK, heat_map
from dnb.notebook.text.engine_text import (
    GONE,
    cpu_words,
    facts_of,
    hung_engines,
    late_words,
    place_words,
    share_words,
    stages_of,
    state_of,
)
from dnb.notebook.views import RunView, WorkerView, has_ended, shown_workers
from dnb.units import amount

# In the order in which a bar shows them: what is work comes first.
BAR_SHARES = ("compute", "data", "wait", "idle")
# States that need no word beside their mark.
_USUAL = frozenset({"busy", "ready"})

Row = dict[str, Any]


def engine_rows(run: RunView) -> list[Row]:
    """Write a row for each engine; none if there are so many that they share a heat map.

    Returns:
        Mappings with the keys engine (an id), kind (of its state), mark, word and is_news (a state that is worth a
        word), place, shares (whole percents of `BAR_SHARES`), cpu, memory, share, and more (pairs of name and words).
    """
    workers, hung, stages = shown_workers(run), hung_engines(run), stages_of(run)
    if len(workers) > MOST_ROWS:
        return []
    return [
        _row(worker, hung=hung, stages=stages, num_shards=run.num_shards, is_over=has_ended(run)) for worker in workers
    ]


def crowd_html(run: RunView) -> str:
    """Draw what stands in the place of rows: a heat map of many engines, or a sentence if there is none."""
    workers = shown_workers(run)
    if not workers:
        text = "nothing is known of its engines" if has_ended(run) else "no engine yet"
        return f'<p class="dnb-none">{text}</p>'
    return heat_map(workers, hung=hung_engines(run), is_over=has_ended(run)) if len(workers) > MOST_ROWS else ""


def _row(
    worker: WorkerView, *, hung: Collection[int], stages: Mapping[int, str], num_shards: int, is_over: bool
) -> Row:
    state = state_of(worker, hung=hung)
    if state == "ready" and worker.compute:  # between two steps
        state = "busy"
    is_gone = worker.state in GONE
    late = "" if is_gone or is_over else late_words(worker.heartbeat_age_seconds)
    facts = facts_of(worker, num_shards=num_shards, is_over=is_over)
    return {
        "engine": worker.engine,
        "kind": state if state in MARKS else "busy",
        "mark": MARKS.get(state, UNKNOWN_MARK),
        "word": one_line(state, limit=40),
        "is_news": state not in _USUAL,
        "place": late or place_words(worker),
        "shares": [round(100 * getattr(worker, share)) for share in BAR_SHARES],
        "cpu": "" if is_gone else cpu_words(worker),
        "memory": "" if is_gone or worker.rss_bytes is None else amount(worker.rss_bytes),
        "share": "" if is_gone else stages.get(worker.engine) or share_words(worker, num_shards=num_shards),
        "more": [
            ["host", f"{place_words(worker)}, process {worker.pid}"],
            *([fact.name, fact.words or "not known"] for fact in facts),
        ],
    }
