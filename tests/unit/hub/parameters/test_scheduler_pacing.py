"""When a scheduler is stepped, and what is refused or told of its pace."""

import pytest
import torch
from torch.optim import lr_scheduler

from dnb.errors import ArgumentError
from dnb.hub.parameters.scheduler_pacing import DecayWatch, SchedulerPace, check_pace


def made(kind, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = kind(optimizer, **options)
    optimizer.step()
    return scheduler


def test_a_scheduler_of_epochs_is_stepped_with_their_last_step():
    pace = SchedulerPace(made(lr_scheduler.StepLR, step_size=1, gamma=0.5), every="epoch", steps_per_epoch=3)
    assert [step for step in range(1, 8) if pace.is_due(step)] == [3, 6]
    for step in range(1, 8):
        pace.take_step(step)
    assert pace.scheduler.get_last_lr() == [0.25]


@pytest.mark.parametrize(("every", "values"), [("epoch", "val_loss"), ("val_accuracy", "val_accuracy")])
def test_a_plateau_is_looked_for_in_the_value_that_is_named(every, values):
    plateau = made(lr_scheduler.ReduceLROnPlateau, patience=0, mode="min")
    pace = SchedulerPace(plateau, every=every, steps_per_epoch=2)
    assert not pace.is_due(2)
    measured = {"val_loss": 5.0, "val_accuracy": 5.0}
    for step, value in ((2, 1.0), (4, 2.0)):
        assert pace.take_evaluation(step, measured | {values: value})
    assert plateau.get_last_lr() == [0.1]
    assert not pace.take_evaluation(5, measured)  # the run ends within an epoch


@pytest.mark.parametrize(
    ("kind", "options", "every", "has_val", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, {}, "step", True, "waits for a value of each epoch.*scheduler_every='epoch'"),
        (lr_scheduler.ReduceLROnPlateau, {}, "epoch", False, "none is made: give val="),
        (lr_scheduler.ReduceLROnPlateau, {"mode": "max"}, "epoch", True, "scheduler_every='val_accuracy'"),
        (lr_scheduler.StepLR, {"step_size": 1}, "val_loss", True, "StepLR looks at no value"),
        (lr_scheduler.StepLR, {"step_size": 1}, "batch", True, "no scheduler_every 'batch'"),
    ],
)
def test_a_pace_that_a_scheduler_cannot_keep_is_refused(kind, options, every, has_val, message):
    with pytest.raises(ArgumentError, match=message):
        check_pace(made(kind, **options), every=every, has_val=has_val)


def test_a_pace_without_a_scheduler_is_refused():
    with pytest.raises(ArgumentError, match="give scheduler="):
        check_pace(None, every="epoch", has_val=True)


def test_a_rate_that_falls_to_nothing_in_the_first_epoch_is_told_once():
    watch = DecayWatch(steps_per_epoch=32, num_steps=64)
    told = [(step, text) for step in range(1, 65) if (text := watch.check(step, 0.7 ** (step - 1)))]
    assert [step for step, _ in told] == [21]
    assert told[0][1].startswith(
        "the learning rate has fallen from 1 to 0.000798 within 21 of the 32 steps of the first"
    )


@pytest.mark.parametrize("num_epochs", [1, 10])
def test_rates_that_warm_up_and_end_at_nothing_are_not_told(num_epochs):
    num_steps = 32 * num_epochs
    watch = DecayWatch(steps_per_epoch=32, num_steps=num_steps)
    rates = [min(step / 10, (num_steps - step) / num_steps) for step in range(num_steps + 1)]
    assert not any(watch.check(step, rate) for step, rate in enumerate(rates, 1))
