"""The engines of a run as HTML: a card each, or a heat map of many. Pure functions, no text in them is markup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from statistics import median

from dnb.notebook.formatting import counted, numbered, one_line
from dnb.notebook.text.engine_text import NOT_KNOWN, device_words, facts_of, host_words, hung_engines, state_of
from dnb.notebook.views import SHARES, RunView, WorkerView, has_ended, shown_workers

# More engines than this share a heat map.
MOST_CARDS = 12
# Ids of one row of a heat map.
PER_ROW = 10
# Colour is never the only sign: the mark, and the word.
MARKS = {"busy": "●", "ready": "○", "spare": "◇", "hung": "▲", "dead": "✕", "left": "←"}
_UNKNOWN_MARK = "?"
# States in which an engine's share of computing says nothing.
_WITHOUT_SHARE = frozenset({"spare", "hung", "dead", "left"})
_NUM_SHADES = 5

# Okabe and Ito's colours on the edges; text only in the theme's own inks. Shades of the heat map from none to all of
# the time on computing, every one of them light enough for black figures (5.5 to 1 and more).
STYLE = """<style>
.dnb-cards{list-style:none;margin:4px 8px;padding:0;display:grid;gap:8px;
grid-template-columns:repeat(auto-fill,minmax(min(15.5em,100%),1fr));color:var(--jp-ui-font-color1,inherit);
font-size:var(--jp-ui-font-size1,13px);line-height:1.45;font-variant-numeric:tabular-nums}
.dnb-cards li{margin:0;padding:6px 10px;border:1px solid var(--jp-border-color1,#999);border-left:5px solid #009E73;
border-radius:3px;background:var(--jp-layout-color1,transparent);overflow-wrap:anywhere}
.dnb-cards li.dnb-ready{border-left-color:#56B4E9}
.dnb-cards li.dnb-spare{border-left-color:#0072B2;border-left-style:dotted}
.dnb-cards li.dnb-hung{border:2px dashed #E69F00;border-left-width:5px}
.dnb-cards li.dnb-dead,.dnb-cards li.dnb-left{border-color:#8c8c8c;border-style:dashed;background:none;
color:var(--jp-ui-font-color2,inherit)}
.dnb-dead b,.dnb-dead .dnb-host>:first-child{text-decoration:line-through}
.dnb-top{display:flex;flex-wrap:wrap;justify-content:space-between;column-gap:1em}
.dnb-host,.dnb-cards dt{color:var(--jp-ui-font-color2,inherit)}
.dnb-cards dl{margin:2px 0 0;display:grid;grid-template-columns:max-content 1fr;column-gap:.8em}
.dnb-cards dt,.dnb-cards dd{margin:0;padding:0;font-weight:normal;width:auto;float:none}
.dnb-none{font-style:italic;color:var(--jp-ui-font-color2,inherit);text-decoration:underline dotted}
.dnb-heat{margin:4px 8px;overflow-x:auto;color:var(--jp-ui-font-color1,inherit);
font-size:var(--jp-ui-font-size1,13px);line-height:1.45;font-variant-numeric:tabular-nums}
.dnb-heat table{border-collapse:separate;border-spacing:2px;margin:0}
.dnb-heat caption{caption-side:top;text-align:left;padding:0 0 4px}
.dnb-heat th{font-weight:normal;padding:0 6px;text-align:right;white-space:nowrap}
.dnb-heat td{min-width:2.6em;padding:2px 0;text-align:center;color:#111;border:1px solid transparent;border-radius:2px}
.dnb-heat td.s0{background:#fff;border-color:#8c8c8c}.dnb-heat td.s1{background:#cdeee2}
.dnb-heat td.s2{background:#93d8bf}.dnb-heat td.s3{background:#4fbd98}.dnb-heat td.s4{background:#009E73}
.dnb-heat td.x{color:inherit;background:none;border:1px dashed #8c8c8c}
.dnb-heat td.h{color:inherit;background:none;border:2px dashed #E69F00;font-weight:bold}
.dnb-heat td.n{border:0}
.dnb-heat p{margin:4px 0 0}
</style>"""


def engines_html(run: RunView) -> str:
    """Draw all engines of a run, without `STYLE`: cards, a heat map of more than 12, or a sentence if there is none."""
    workers = shown_workers(run)
    hung = hung_engines(run)
    if not workers:
        text = "nothing is known of its engines" if has_ended(run) else "no engine yet"
        return f'<p class="dnb-cards"><span class="dnb-none">{text}</span></p>'
    if len(workers) > MOST_CARDS:
        return heat_map(workers, hung=hung, is_over=has_ended(run))
    return cards(workers, hung=hung, num_shards=run.num_shards, is_over=has_ended(run))


def cards(
    workers: Sequence[WorkerView], *, hung: Collection[int] = (), num_shards: int = 0, is_over: bool = False
) -> str:
    """Draw a list of cards.

    Args:
        workers: one card each.
        hung: ids of those that are not heard.
        num_shards: of a batch; 0 if that is not known.
        is_over: the run has ended.
    """
    items = [
        _card(worker, state=state_of(worker, hung=hung), num_shards=num_shards, is_over=is_over) for worker in workers
    ]
    return f'<ul class="dnb-cards" role="list" aria-label="engines">{"".join(items)}</ul>'


def _card(worker: WorkerView, *, state: str, num_shards: int, is_over: bool) -> str:
    facts = facts_of(worker, num_shards=num_shards, is_over=is_over)
    mark, word = MARKS.get(state, _UNKNOWN_MARK), escape(one_line(state, limit=40))
    rows = "".join(f"<dt>{fact.name}</dt><dd>{_value(fact.words)}</dd>" for fact in facts)
    return (
        f'<li class="dnb-{state if state in MARKS else "busy"}">'
        f'<div class="dnb-top"><b>engine {worker.engine}</b>'
        f'<span><span aria-hidden="true">{mark}</span> {word}</span></div>'
        f'<div class="dnb-host">{_place(worker)}</div><dl>{rows}</dl></li>'
    )


def _place(worker: WorkerView) -> str:
    unknown = f'<span class="dnb-none">{NOT_KNOWN}</span>'
    return f"<span>{escape(host_words(worker))}</span>, {escape(device_words(worker)).replace(NOT_KNOWN, unknown)}"


def _value(words: str) -> str:
    return escape(words) if words else f'<span class="dnb-none">{NOT_KNOWN}</span>'


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
    return [*lines, f"{_UNKNOWN_MARK} {NOT_KNOWN}: {numbered(unknown, limit=8)}"] if unknown else lines


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
        return f'<td class="x" aria-label="{NOT_KNOWN}">{_UNKNOWN_MARK}</td>'
    shade = min(int(_NUM_SHADES * worker.compute), _NUM_SHADES - 1)
    return f'<td class="s{shade}">{100 * worker.compute:.0f}</td>'


def _has_shares(worker: WorkerView) -> bool:
    return any(getattr(worker, share) for share in SHARES)
