from __future__ import annotations

import math

import pytest

from dnb.api.arguments.checks import read_checkpoint_policy
from dnb.errors import ArgumentError
from dnb.planning.checkpoint_policy import Goal, Retention, read_goal
from dnb.protocol.run import CheckpointPolicy


def retention(*, every: int = 10, keep: int = 2, best: str | None = None) -> Retention:
    return Retention(every=every, keep=keep, goal=None if best is None else read_goal(best))


def test_a_checkpoint_is_due_after_every_nth_step():
    assert [step for step in range(1, 35) if retention().is_due(step)] == [10, 20, 30]


def test_the_last_so_many_stay():
    policy = retention(keep=2)
    assert [policy.add(step, {}) for step in (10, 20, 30, 40)] == [[], [], [10], [20]]


def test_the_best_stays_however_old_it_is():
    policy = retention(keep=1, best="val_loss")
    values = {10: 0.5, 20: 0.1, 30: 0.3, 40: 0.2, 50: 0.05, 60: 0.4}
    gone = {step: policy.add(step, {"val_loss": value}) for step, value in values.items()}
    assert gone == {10: [], 20: [10], 30: [], 40: [30], 50: [20, 40], 60: []}


def test_larger_may_be_better():
    policy = retention(keep=1, best="max:accuracy")
    assert [policy.add(step, {"accuracy": value}) for step, value in ((10, 0.9), (20, 0.8), (30, 0.95))] == [
        [],
        [],
        [10, 20],
    ]


def test_a_checkpoint_where_nothing_was_measured_or_nan_was_is_never_the_best():
    policy = retention(keep=1, best="loss")
    policy.add(10, {"loss": math.nan})
    policy.add(20, {})
    assert policy.add(30, {"loss": 3.0}) == [20]


def test_one_that_is_the_user_s_stays():
    policy = retention(keep=1)
    policy.add(10, {})
    policy.release(10)
    assert policy.add(20, {}) == []


def test_an_evaluation_is_a_record_if_it_is_better_than_all_before():
    policy = retention(best="val_loss")
    assert [policy.is_record({"val_loss": value}) for value in (0.5, 0.6, math.nan, 0.4, 0.4)] == [
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("val_loss", Goal("val_loss", is_larger_better=False)),
        ("loss", Goal("loss", is_larger_better=False)),
        ("max:val_accuracy", Goal("val_accuracy", is_larger_better=True)),
        ("min:error", Goal("error", is_larger_better=False)),
        ("max:loss", Goal("loss", is_larger_better=True)),
    ],
)
def test_a_goal_says_which_way_is_better(text: str, goal: Goal):
    assert read_goal(text) == goal


@pytest.mark.parametrize("text", ["accuracy", "most:accuracy", "max:", "val_accuracy", ""])
def test_a_goal_that_does_not_say_it_is_refused(text: str):
    with pytest.raises(ArgumentError, match="does not say which way is better: 'max:"):
        read_goal(text)


def policy(every: object = 5, **options: object) -> CheckpointPolicy | None:
    given = {"keep": 2, "best": None, "metrics": ["accuracy"], "has_val": True}
    return read_checkpoint_policy(every, **{**given, **options})  # type: ignore[arg-type]


def test_a_policy_is_read():
    assert policy(5, best="max:val_accuracy") == CheckpointPolicy(every=5, keep=2, best="max:val_accuracy")
    assert policy(None) is None


@pytest.mark.parametrize("every", [-1, 0, 1.5, True, "often"])
def test_a_checkpoint_every_that_is_no_positive_integer_is_refused(every: object):
    with pytest.raises(ArgumentError, match="checkpoint_every must be a positive integer, not"):
        policy(every)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": 0}, "checkpoint_keep must be a positive integer, not 0"),
        ({"every": None, "best": "loss"}, "none is written: give checkpoint_every"),
        ({"best": "val_loss", "has_val": False}, "checkpoint_best='val_loss' is measured in evaluations: give val"),
        ({"best": "max:acuracy"}, "will not be measured: did you mean 'accuracy'"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(options: dict, told: str):
    with pytest.raises(ArgumentError, match=told):
        policy(**options)


def test_what_a_step_function_measures_is_not_known_before():
    assert policy(best="max:bleu", metrics=None) is not None
