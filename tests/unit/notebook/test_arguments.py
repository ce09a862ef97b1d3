from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dnb.errors import ArgumentError
from dnb.notebook.arguments import Word, bind, flags_of, parse_settings, split_line


def fit(
    model: Any,
    train: Any,
    *,
    val: Any = None,
    loss: str | Callable[..., Any] | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    shuffle: bool = True,
    exact: bool = False,
    metrics: Any = None,
    name: str | None = None,
    pool: Any = None,
) -> None:
    """Stands for `dnb.fit`."""


def start(n: int | None = None, *, profile: str | None = None, launcher: str = "local") -> None:
    """Stands for `dnb.start`."""


NAMES = {
    "net": "the net",
    "data": SimpleNamespace(train="the train set", val="the val set"),
    "rate": 0.25,
    "digits": "a variable",
    "_hidden": "private",
}


def fitted(line: str) -> dict[str, Any]:
    return bind(flags_of(fit, left_out={"pool"}), f"net data.train {line}", names=NAMES, verb="fit")


def value(line: str) -> Any:
    """What the only flag of a line stands for."""
    bound = fitted(line)
    assert len(bound) == 3
    return bound.popitem()[1]


# words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  a   b ", [Word("a"), Word("b")]),
        ("{a + b} c", [Word("a + b", is_expression=True), Word("c")]),
        ("f(1, 2) c", [Word("f(1, 2)"), Word("c")]),
        ("x[1, 2]", [Word("x[1, 2]")]),
        ("'two words' c", [Word("two words"), Word("c")]),
        ('"it\'s one"', [Word("it's one")]),
        ("--lr=0.1", [Word("--lr=0.1")]),
        ('{"a b": 1}', [Word('{"a b": 1}', is_expression=True)]),
        ('{{"a": 1}}', [Word('{"a": 1}', is_expression=True)]),
        ('{"}"}', [Word('"}"', is_expression=True)]),
        ("{}", [Word("{}", is_expression=True)]),
    ],
)
def test_a_line_is_cut_at_blanks_outside_of_quotes_and_braces(line: str, words: list[Word]):
    assert split_line(line) == words


@pytest.mark.parametrize(
    ("line", "missing"), [("{a + b", "}"), ("'two words", "'"), ("f(1, 2", r"\)"), ("x[1", r"\]"), ('{"a}', '"')]
)
def test_what_is_not_closed_is_named(line: str, missing: str):
    with pytest.raises(ArgumentError, match=f"a {missing} is missing at the end of: "):
        split_line(line)


# by position -------------------------------------------------------------------------------------------------


def test_words_without_a_flag_are_variables_by_position():
    assert bind(flags_of(fit), "net digits", names=NAMES, verb="fit") == {"model": "the net", "train": "a variable"}


def test_a_dotted_name_is_an_attribute_of_a_variable():
    assert fitted("")["train"] == "the train set"


def test_an_expression_in_braces_may_stand_by_position():
    assert bind(flags_of(fit), "{net + '!'} digits", names=NAMES, verb="fit")["model"] == "the net!"


def test_positions_may_be_given_by_their_names():
    assert bind(flags_of(fit), "--train digits net", names=NAMES, verb="fit") == {
        "model": "the net",
        "train": "a variable",
    }


def test_a_missing_position_is_named():
    with pytest.raises(ArgumentError, match="%dtrain fit needs model and train: train is missing"):
        bind(flags_of(fit), "net --lr 0.1", names=NAMES, verb="fit")


def test_one_word_too_many_is_named():
    with pytest.raises(ArgumentError, match="%dtrain fit: unexpected 'digits': inputs and targets go together"):
        fitted("digits")


def test_an_unknown_variable_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"no variable 'digit' in this notebook: did you mean 'digits'\?"):
        bind(flags_of(fit), "net digit", names=NAMES, verb="fit")


def test_an_unknown_variable_like_no_other_is_to_be_defined():
    with pytest.raises(ArgumentError, match="no variable 'zzzz' in this notebook: define it in a cell first"):
        bind(flags_of(fit), "net zzzz", names=NAMES, verb="fit")


def test_an_attribute_that_there_is_not_is_refused():
    with pytest.raises(ArgumentError, match=r"\{data.tset\} cannot be evaluated: AttributeError"):
        bind(flags_of(fit), "net data.tset", names=NAMES, verb="fit")


def test_a_word_by_position_may_stand_for_a_flag_with_a_default():
    assert bind(flags_of(start), "2 --launcher local", names={}, verb="start", operand="n") == {
        "n": 2,
        "launcher": "local",
    }


def test_a_flag_that_stood_by_position_is_not_given_again():
    with pytest.raises(ArgumentError, match="%dtrain start: n is given twice"):
        bind(flags_of(start), "2 -n 3", names={}, verb="start", operand="n")


def test_all_words_by_position_may_be_taken_as_they_are():
    assert bind(flags_of(start), "1 3-4 -n 2 {net}", names={}, verb="start", rest="words") == {
        "n": 2,
        "words": ["1", "3-4", "net"],
    }


def test_a_verb_may_have_flags_beyond_those_of_its_function():
    flags = flags_of(start, more={"dry_run": "int | None"})
    assert list(flags) == ["n", "profile", "launcher", "dry_run"]
    assert bind(flags, "--dry-run 64", names={}, verb="start") == {"dry_run": 64}


# values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--lr 0.1", 0.1),
        ("--lr=0.1", 0.1),
        ("--lr 3e-4", 0.0003),
        ("--lr -1", -1),
        ("--lr -1e-3", -0.001),
        ("--lr=-1", -1),
        ("--lr rate", 0.25),
        ("--lr {rate / 2}", 0.125),
        ("--lr={rate / 2}", 0.125),
        ("--lr none", None),
        ("--batch-size 256", 256),
        ("--batch_size 256", 256),
        ("--val data.val", "the val set"),
        ("--loss cross_entropy", "cross_entropy"),
        ("--loss 'cross_entropy'", "cross_entropy"),
        ("--name digits", "digits"),
        ("--name 'two words'", "two words"),
        ("--name 2", "2"),
        ("--name {digits}", "a variable"),
        ('--metrics {"a b": rate}', {"a b": 0.25}),
        ('--metrics {{"a": rate}}', {"a": 0.25}),
        ("--metrics ['accuracy']", ["accuracy"]),
        ("--metrics {len(net)}", 7),
        ("--val (rate, rate / 2)", (0.25, 0.125)),
        ("--val [rate, 'a b']", [0.25, "a b"]),
        ("--val tuple(net[:2])", ("t", "h")),
        ("--val (other, words)", "(other, words)"),
        ("--loss rate-digits", "rate-digits"),
    ],
)
def test_the_word_after_a_flag_is_its_value(line: str, wanted: Any):
    assert value(line) == wanted


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--no-shuffle", False),
        ("--shuffle", True),
        ("--shuffle false", False),
        ("--shuffle=false", False),
        ("--exact", True),
        ("--exact True", True),
        ("--no-exact", False),
    ],
)
def test_a_switch_needs_no_value(line: str, wanted: bool):
    assert value(line) is wanted


def test_a_switch_does_not_take_the_word_behind_it():
    assert bind(flags_of(fit), "--exact net digits", names=NAMES, verb="fit") == {
        "exact": True,
        "model": "the net",
        "train": "a variable",
    }


def test_a_single_letter_has_one_dash():
    assert bind(flags_of(start), "-n 2", names=NAMES, verb="start") == {"n": 2}


def test_nothing_is_bound_that_was_not_given():
    assert bind(flags_of(start), "", names=NAMES, verb="start") == {}


def test_a_variable_does_not_hide_a_word_where_only_words_are_wanted():
    names = {"local": "a variable"}
    assert bind(flags_of(start), "--launcher local", names=names, verb="start") == {"launcher": "local"}


def test_an_expression_that_raises_is_refused_with_its_error():
    with pytest.raises(ArgumentError, match=r"\{1 / 0\} cannot be evaluated: ZeroDivisionError: division by zero"):
        fitted("--lr {1 / 0}")


def test_an_expression_with_an_error_of_syntax_is_refused():
    with pytest.raises(ArgumentError, match="cannot be evaluated: SyntaxError"):
        fitted("--lr {1 +}")


# flags ---------------------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_refused_with_the_nearest():
    with pytest.raises(
        ArgumentError, match=r"%dtrain fit has no flag '--bach-size': did you mean '--batch-size'\? known: "
    ):
        fitted("--bach-size 64")


def test_a_flag_that_is_left_out_is_unknown():
    with pytest.raises(ArgumentError, match="%dtrain fit has no flag '--pool'"):
        fitted("--pool net")


def test_only_a_switch_can_be_negated():
    with pytest.raises(ArgumentError, match="%dtrain fit has no flag '--no-lr'"):
        fitted("--no-lr")


@pytest.mark.parametrize("line", ["--lr", "--lr --no-shuffle", "--lr="])
def test_a_flag_without_its_value_is_refused(line: str):
    with pytest.raises(ArgumentError, match=r"%dtrain fit: --lr=? needs a value"):
        fitted(line)


def test_another_flag_is_not_taken_for_the_value():
    with pytest.raises(ArgumentError, match="%dtrain start: --profile needs a value"):
        bind(flags_of(start), "--profile -n 2", names=NAMES, verb="start")


@pytest.mark.parametrize("line", ["--lr 1 --lr 2", "--no-shuffle --shuffle", "--model net"])
def test_a_flag_given_twice_is_refused(line: str):
    with pytest.raises(ArgumentError, match=r"%dtrain fit: (lr|shuffle|model) is given twice"):
        fitted(line)


# NAME=VALUE


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("lr=1e-4", {"lr": 1e-4}),
        ("lr=rate clip-norm=none", {"lr": 0.5, "clip_norm": None}),
        ("--lr=1e-4 weight_decay={rate / 5}", {"lr": 1e-4, "weight_decay": 0.1}),
        ("", {}),
    ],
)
def test_settings_are_names_with_values(line, settings):
    assert parse_settings(line, names={"rate": 0.5}) == settings


@pytest.mark.parametrize("line", ["lr", "lr 1e-4", "lr=", "{lr}"])
def test_what_is_no_setting_is_refused_with_an_example(line):
    with pytest.raises(ArgumentError, match=r"is not NAME=VALUE, such as in %dtrain set lr=1e-4"):
        parse_settings(line, names={})


def test_a_setting_given_twice_is_refused():
    with pytest.raises(ArgumentError, match="lr is given twice"):
        parse_settings("lr=1 lr=2", names={})


# variables and words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["metrics", "loss"])
@pytest.mark.parametrize("held", [0.97, 3, [0.5, 0.25], [], b"x"])
def test_a_variable_that_can_be_no_choice_leaves_the_word_as_it_is(flag: str, held: Any):
    bound = bind(flags_of(fit), f"net data --{flag} accuracy", names={**NAMES, "accuracy": held}, verb="fit")
    assert bound[flag] == "accuracy"


@pytest.mark.parametrize("held", [print, {"own": print}, None, "mse_loss", ["accuracy"]])
def test_a_variable_that_can_be_a_choice_is_taken(held: Any):
    bound = bind(flags_of(fit), "net data --metrics accuracy", names={**NAMES, "accuracy": held}, verb="fit")
    assert bound["metrics"] == held


def test_a_dollar_names_a_variable_as_elsewhere_in_ipython():
    assert value("--lr $rate") == 0.25
    assert value("--lr=$rate") == 0.25
    assert value("--val $data.val") == "the val set"
    assert parse_settings("lr=$rate", names=NAMES) == {"lr": 0.25}


def test_a_dollar_before_what_is_no_variable_names_the_nearest_one():
    with pytest.raises(ArgumentError, match="no variable 'rat' in this notebook: did you mean 'rate'"):
        value("--lr $rat")


def test_lines_are_one_and_comments_are_for_people():
    line = """  # the data
    --batch-size 32   # of all engines together
    --lr 1e-3 \\
    --name "a # b"
    """
    assert fitted(line) == {
        "model": "the net",
        "train": "the train set",
        "batch_size": 32,
        "lr": 0.001,
        "name": "a # b",
    }


def test_the_learning_rate_may_be_set_by_its_long_name():
    assert parse_settings("learning_rate=0.1", names=NAMES) == {"lr": 0.1}
