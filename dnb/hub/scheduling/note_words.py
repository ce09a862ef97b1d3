"""The words of a coordinator's notes: the one place where their facts become sentences."""

from __future__ import annotations

from collections.abc import Mapping

from dnb.hub.scheduling.events import Note, Reason
from dnb.hub.scheduling.failures import describe_causes, name_engines
from dnb.protocol.run import Failure

# `who` is the engine or team that a note is about, `other` the one that takes its shards.
_SENTENCES: dict[Reason, str] = {
    "told": "{detail}",
    "loaded": "{who} joined",
    "loaded as a spare": "{who} joined as a standby",
    "woken": "{who}, a spare until now, takes part",
    "silent at the start": "{who} is silent: the run begins without it",
    "busy at the start": "{who} still loads, or is in another call: the run begins without it",
    "begins": "{count} engines, {num_shards} shards",
    "found": "{who} {detail}",
    "held up its team": "{who} {detail}: it is killed, as the others of its team wait for it",
    "in a call": "{who} is at work in a call that lets no other thread run, not even its heartbeat",
    "heard": "{who} is heard again",
    "left, as asked": "{who} left, as asked",
    "could not load": "{who} could not load the run: {causes}",
    "lost": "{count} shards of {who} go to others",
    "late": "{count} shards of {who} are late: {other} computes them too",
    "silent": "{count} shards of {who} wait for it: {other} computes them too",
    "paused, as asked": "paused after step {step}, as asked",
    "nobody came": "paused after step {step}: no engine has come within {detail}. %dtrain add, then %dtrain resume",
    "the last one left": "paused after step {step}: the last engine left. %dtrain add, then %dtrain resume",
    "refused": (
        "paused at step {step}: {detail}; nothing of this step was applied. "
        "run.set(lr=...) and run.resume() try it again, run.stop() keeps what was trained"
    ),
    "step failed": (
        "paused at step {step}: {causes}; nothing of this step was applied. "
        "Fix it, then run.resume(loss=fixed) or run.resume(step=fixed), or run.stop() keeps what was trained"
    ),
    "evaluation failed": (
        "paused at the evaluation after step {step}: {causes}; nothing of this evaluation was applied. "
        "Fix it, then run.resume(loss=fixed) or run.resume(step=fixed), or run.stop() keeps what was trained"
    ),
    "resumed": "resumed after step {step}",
    "commit failed": "step {step}: {causes}",
    "nobody could load": "loading{causes}",
    "nobody is left": "no engine is left at step {step}: {cause}",
    "ended": "{kind} after step {step} of {count}",
}
_NOBODY: Mapping[int, str] = {}


def text_of(note: Note, names: Mapping[int, str] = _NOBODY) -> str:
    """Put a note into words.

    Args:
        note: its facts.
        names: of teams, by the numbers that stand for engines in the note.
    """
    return _SENTENCES[note.reason].format(
        kind=note.kind,
        who="" if note.engine is None else name_engines([note.engine], names),
        other="" if note.other is None else name_engines([note.other], names),
        detail=note.detail,
        step=note.step,
        count=note.count,
        num_shards=note.num_shards,
        causes=_causes(note, names),
        cause="" if note.cause is None else text_of(note.cause, names),
    )


def traceback_of(note: Note, names: Mapping[int, str] = _NOBODY) -> str:
    """Return the tracebacks of a note's failures: one per cause."""
    if not note.failures:
        return note.traceback
    return describe_causes(note.failures, names)[1]


def _causes(note: Note, names: Mapping[int, str]) -> str:
    failures = [failure for _, failure in note.failures]
    if not failures:
        return note.detail
    if note.reason == "could not load":
        return f"{failures[0].kind}: {failures[0].message}"
    if note.reason == "commit failed":
        return _with_place(failures[0])
    if note.reason == "nobody could load" and len({(each.kind, each.message) for each in failures}) == 1:
        engines = name_engines(sorted({engine for engine, _ in note.failures}), names)
        return f" on {engines}: {failures[0].kind}: {failures[0].message}"
    text, _ = describe_causes(note.failures, names)
    return f": {text}" if note.reason == "nobody could load" else text


def _with_place(failure: Failure) -> str:
    place = f" ({failure.place})" if failure.place else ""
    return f"{failure.kind}: {failure.message}{place}"
