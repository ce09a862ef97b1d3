from __future__ import annotations

import pytest

from dnb.notebook.magic_words import as_magic, speak_magic, worded
from tests.fake_runs import FakeRun


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("run.stop()", "%dtrain stop"),
        ("run.set(lr=1e-4)", "%dtrain set lr=1e-4"),
        ("run.set(lr=..., clip_norm=1.0)", "%dtrain set lr=... clip_norm=1.0"),
        ("run.resume(loss=fixed)", "%dtrain resume --loss fixed"),
        ("run.resume(step=)", "%dtrain resume --step"),
        ("dnb.attach(steer=True)", "%dtrain attach --steer"),
        ("dnb.attach('digits')", "%dtrain attach digits"),
        ("dnb.fit(model, (X, y), shuffle=False)", "%dtrain fit model (X, y) --no-shuffle"),
        ("dnb.fit(model, (X, y), batch_size=32)", "%dtrain fit model (X, y) --batch-size 32"),
        ("dnb.resume('my runs/a')", '%dtrain resume "my runs/a"'),
        ("dnb.plan(model, batch, memory_limit=1000)", "%dtrain plan model batch --memory-limit 1000"),
        ("pool.keep_spares(1)", "%dtrain spares 1"),
        ("pool.remove([1, 3])", "%dtrain remove 1,3"),
        ("pool.chaos.kill(1)", "%dtrain chaos kill 1"),
        ("pool.chaos.stop(1, 5)", "%dtrain chaos stop 1 5s"),
        ("pool.chaos.slow(2, 4)", "%dtrain chaos slow 2 4x"),
        ("pool.chaos.hub()", "%dtrain chaos hub"),
    ],
)
def test_a_call_becomes_the_line_that_does_the_same(call: str, line: str):
    assert as_magic(f"fix it, then {call}, or wait") == f"fix it, then {line}, or wait"


@pytest.mark.parametrize(
    "text",
    [
        "return dnb.Sum(total, weight)",
        "give it as dnb.fit",
        "run.history.column('loss')",
        "overrun.stop()",
        "pool.chaos.slow(2, 4",
        "%dtrain stop",
    ],
)
def test_what_no_verb_stands_for_stays(text: str):
    assert as_magic(text) == text


def test_a_run_that_a_magic_began_is_told_in_magics_and_another_in_python():
    mine, other = FakeRun(), FakeRun()
    speak_magic(mine)
    assert worded("run.stop() ends it", mine) == "%dtrain stop ends it"
    assert worded("run.stop() ends it", other) == "run.stop() ends it"
