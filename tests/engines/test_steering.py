"""Numbers that change while a run goes on."""

import pytest

from dnb.errors import ArgumentError
from tests.engines.pools import wait, wait_until
from tests.models import digits, mlp

pytestmark = pytest.mark.engines


def test_several_numbers_change_at_one_named_step(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=10_000)
    wait_until(run, lambda run: run.step > 3, what="3 steps")
    run.set(lr=1e-4, clip_norm=0.5, weight_decay=0.1)
    wait_until(run, lambda run: any(event.kind == "set" for event in run.events), what="the event")
    (event,) = [event for event in run.events if event.kind == "set"]
    first = int(event.text.rpartition(" ")[2])
    assert event.text == f"lr=0.0001, clip_norm=0.5, weight_decay=0.1 from step {first}"
    wait_until(run, lambda run: run.step > first, what=f"step {first}")
    assert run.history["lr"][first - 2 : first] == [1e-3, 1e-4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set what"),
        ({"learning_rate": 1.0}, "learning_rate cannot be set while a run goes on: .*lr"),
        ({"lr": 0}, "lr must be a positive number, not 0"),
        ({"lr": None}, "lr must be a positive number, not None"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"clip_norm": -1.0}, "clip_norm must be a positive number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0"),
        ({"lr": 1e-4, "betas": 0.5}, "betas cannot be set"),
    ],
    ids=str,
)
def test_what_cannot_be_set_is_refused_and_changes_nothing(pool, options, message):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=10_000)
    with pytest.raises(ArgumentError, match=message):
        run.set(**options)
    at = run.step
    wait_until(run, lambda run: run.step > at + 2, what="2 more steps")
    assert set(run.history["lr"]) == {1e-3}


def test_nothing_can_be_set_when_a_run_has_ended(pool):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=2))
    with pytest.raises(ArgumentError, match="is finished: there is nothing to set"):
        run.set(lr=0.1)
