import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnb.api import planner, training
from dnb.notebook.arguments import bind, flags_of, parse_settings
from dnb.notebook.control_panel.lines import (
    FitForm,
    add_line,
    batch_of,
    checkpoint_line,
    fit_line,
    literal,
    plan_line,
    quoted,
    remove_line,
    set_line,
    start_line,
    typed,
)

NAMES = {"model": "the model", "train": [range(1000), range(1000)], "val": "val set", "my_loss": len, "rate": 0.5}


def bound(form: FitForm) -> dict:
    verb, _, rest = fit_line(form).partition(" ")
    assert verb == "fit"
    return bind(flags_of(training.fit, left_out={"pool"}), rest, names=NAMES, verb="fit")


def fit(**fields) -> dict:
    return bound(FitForm(model="model", train="train", **fields))


def test_a_blank_form_is_the_shortest_line():
    assert fit_line(FitForm(model="model", train="train")) == "fit model train"


def test_all_fields_in_one_line():
    form = FitForm(
        model="model", train="train", val="val", loss="--loss cross_entropy", metrics="--metrics accuracy",
        optimizer="--optimizer sgd", strategy="--strategy data", lr="1e-3", batch_size="256", epochs="5", shards="8",
        seed="1", clip_norm="0.5", checkpoint_every="100", exact=True, name="first",
    )  # fmt: skip
    assert fit_line(form) == (
        "fit model train --val val --loss cross_entropy --metrics accuracy --optimizer sgd --lr 1e-3 --batch-size 256 "
        "--epochs 5 --shards 8 --seed 1 --clip-norm 0.5 --checkpoint-every 100 --strategy data --exact --name first"
    )


def test_the_line_binds_to_what_was_chosen():
    form = {"val": "val", "loss": "--loss my_loss", "lr": "1e-3", "batch_size": "256", "exact": True, "name": "first"}
    assert fit(**form) == {
        "model": "the model", "train": NAMES["train"], "val": "val set", "loss": len, "lr": 1e-3, "batch_size": 256,
        "exact": True, "name": "first",
    }  # fmt: skip


def test_a_field_may_name_a_variable_or_hold_an_expression():
    assert fit(lr="rate", steps="{2 * 50}") == fit() | {"lr": 0.5, "steps": 100}


def is_value(text):
    """Leave out what is evaluated, and may be refused: expressions, and attributes of variables."""
    return text.strip() and not text.strip().startswith("{") and text.strip().partition(".")[0] not in NAMES


@given(st.text(min_size=1).filter(is_value))
def test_whatever_is_typed_stays_one_value(text):
    assert set(fit(seed=text)) == {"model", "train", "seed"}


@given(st.text(min_size=1).filter(lambda text: text.strip()))
def test_a_name_arrives_as_it_was_typed(text):
    assert fit(name=text)["name"] == text.strip()


def test_a_field_never_becomes_a_flag():
    assert fit(lr="1e-3 --exact") == fit() | {"lr": "1e-3 --exact"}


def test_a_negative_number_is_a_number():
    assert fit(seed="-1") == fit() | {"seed": -1}


def test_an_unclosed_brace_is_a_string_that_the_verb_can_refuse():
    assert fit(lr="{1e-3") == fit() | {"lr": "{1e-3"}


def test_a_question_mark_is_quoted_for_ipython_would_look_for_help():
    assert typed("64?") == "{'64?'}"


def test_a_word_that_a_variable_hides_is_quoted():
    words = literal("mse_loss", names={"mse_loss": 3})
    assert (words, literal("mse_loss", names={})) == ("{'mse_loss'}", "mse_loss")


@given(st.text())
def test_a_quoted_text_is_itself(text):
    line = f"model train --name {quoted(text)}"
    assert bind(flags_of(training.fit), line, names=NAMES, verb="fit")["name"] == text


def test_a_plan_takes_the_first_samples_of_a_pair():
    batch = batch_of("train", num_parts=2, num_samples=1000, batch_size="")
    line = plan_line(FitForm(model="model", train="train", loss="--loss cross_entropy"), batch=batch)
    assert line == "plan model {tuple(part[:64] for part in train)} --loss cross_entropy"


def test_the_plan_line_binds():
    batch = batch_of("train", num_parts=2, num_samples=1000, batch_size="8")
    form = FitForm(model="model", train="train", batch_size="8", strategy="--strategy pipeline")
    rest = plan_line(form, batch=batch).removeprefix("plan ")
    assert bind(flags_of(planner.plan, left_out={"pool"}), rest, names=NAMES, verb="plan") == {
        "model": "the model", "batch": (range(8), range(8)), "batch_size": 8, "strategy": "pipeline",
    }  # fmt: skip


def test_a_pair_of_variables_is_cut_one_by_one():
    assert batch_of("{(X, y)}", num_parts=2, num_samples=100, batch_size="32") == "{(X[:32], y[:32])}"


def test_a_short_data_set_is_planned_whole():
    assert batch_of("train", num_parts=2, num_samples=50, batch_size="") == "train"


def test_of_a_data_set_the_plan_takes_the_first_batch_by_itself():
    assert batch_of("loader", num_parts=0, num_samples=0, batch_size="") == "loader"


def test_a_plan_that_is_the_strategy_is_not_planned_again():
    form = FitForm(model="model", train="train", strategy="--strategy {plan}")
    assert plan_line(form, batch="train") == "plan model train"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (start_line(n="", threads=""), "start"),
        (start_line(n="4", threads="2"), "start -n 4 --threads-per-engine 2"),
        (add_line(""), "add"),
        (add_line("2"), "add 2"),
        (remove_line([]), ""),
        (remove_line([5, 3, 4, 1]), "remove 1,3-5"),
        (set_line(" "), ""),
        (set_line("1e-4"), "set lr=1e-4"),
        (checkpoint_line("", names=()), "checkpoint"),
        (checkpoint_line("kept/first", names=()), "checkpoint kept/first"),
        (checkpoint_line("kept", names=("kept",)), "checkpoint {'kept'}"),
        (checkpoint_line("my runs", names=()), "checkpoint {'my runs'}"),
    ],
)
def test_lines_of_pool_and_run(line, expected):
    assert line == expected


def test_a_learning_rate_binds_to_a_number():
    assert parse_settings(set_line("1e-4").removeprefix("set "), names={}) == {"lr": 1e-4}
