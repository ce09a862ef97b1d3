from __future__ import annotations

import pytest

from dnb.errors import ArgumentError
from dnb.notebook.commands.engine_arguments import Act, read_chaos, read_ids


@pytest.mark.parametrize(
    ("text", "ids"), [("3", [3]), ("0,2-3", [0, 2, 3]), ("4,0-1", [4, 0, 1]), ("1,1,0-1", [1, 0]), ("2-2", [2])]
)
def test_ids_and_ranges_name_engines_once_in_their_order(text: str, ids: list[int]):
    assert read_ids(text, known=range(5), example="--on 0,2-3") == ids


@pytest.mark.parametrize("text", ["", "x", "1,", "1-", "-1", "1.5", "1 2", "all"])
def test_what_is_no_id_is_refused_with_an_example(text: str):
    with pytest.raises(ArgumentError, match=r"is no engine id or range; such as --on 0,2-3"):
        read_ids(text, known=range(5), example="--on 0,2-3")


@pytest.mark.parametrize("text", ["3-1", "0-999999999"])
def test_a_range_that_runs_backwards_or_for_ever_is_refused(text: str):
    with pytest.raises(ArgumentError, match="is no range from a smaller to a larger id"):
        read_ids(text, known=range(5), example="--on 0,2-3")


def test_an_engine_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ArgumentError, match="no engine 3: there are 0, 1, 4"):
        read_ids("0,3-4", known=[0, 1, 4], example="--on 0,2-3")


@pytest.mark.parametrize(
    ("line", "act"),
    [
        ("kill 1", Act("kill", (1,))),
        ("kill 0-1", Act("kill", (0, 1))),
        ("stop 1 5s", Act("stop", (1,), 5.0)),
        ("stop 1 0.25s", Act("stop", (1,), 0.25)),
        ("slow 2 4x", Act("slow", (2,), 4.0)),
        ("slow 2 1x", Act("slow", (2,), 1.0)),
        ("slow 0,2 1.5x", Act("slow", (0, 2), 1.5)),
    ],
)
def test_chaos_is_a_verb_engines_and_an_amount(line: str, act: Act):
    assert read_chaos(line.split(), known=range(3)) == act


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"%dtrain chaos has no verb '': known: kill, stop, slow, hub; such as %dtrain chaos kill 1"),
        ("kil 1", r"%dtrain chaos has no verb 'kil': did you mean 'kill'"),
        ("kill", r"%dtrain chaos kill takes an engine, not 0 words: %dtrain chaos kill 1"),
        ("kill 1 2", r"%dtrain chaos kill takes an engine, not 2 words: %dtrain chaos kill 1"),
        ("stop 1", r"%dtrain chaos stop takes an engine and an amount, not 1 words: %dtrain chaos stop 1 5s"),
        ("stop 1 5", r"'5' is no number of seconds, such as 5s: %dtrain chaos stop 1 5s"),
        ("stop 1 0s", r"'0s' is no number of seconds"),
        ("stop 1 -5s", r"'-5s' is no number of seconds"),
        ("slow 2 4", r"'4' is no factor, such as 4x: %dtrain chaos slow 2 4x"),
        ("slow 2 fourx", r"'fourx' is no factor"),
        ("slow 2 0.5x", r"an engine can only be slowed, by 1x or more"),
        ("hub 1", r"%dtrain chaos hub takes no other words, as a pool has one hub: %dtrain chaos hub"),
        ("kill one", r"'one' is no engine id or range; such as %dtrain chaos kill 1"),
        ("kill 7", r"no engine 7: there are 0, 1, 2"),
    ],
)
def test_other_words_are_refused_with_one_sentence_and_an_example(line: str, message: str):
    with pytest.raises(ArgumentError, match=message):
        read_chaos(line.split(), known=range(3))
