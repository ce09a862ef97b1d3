"""A run that continues another: the next step, the next batch, and no evaluation twice."""

from __future__ import annotations

import pytest
import torch

from dnb.hub.run.execution.sample_batches import Batches
from dnb.hub.scheduling.coordinator import Assign, Coordinator, EngineLoaded
from dnb.planning.sample_order import BatchOrder


def first_work(*, step: int, evaluated: int) -> list[tuple[str, int]]:
    """What the first engine is asked for."""
    coordinator = Coordinator(
        num_steps=30, num_shards=2, evaluate_every=10, engines=[0], step=step, evaluated=evaluated
    )
    actions = coordinator.handle(EngineLoaded(0))
    return [(action.kind, action.step) for action in actions if isinstance(action, Assign)]


@pytest.mark.parametrize(
    ("step", "evaluated", "work"),
    [
        (0, 0, ("step", 1)),
        (7, 0, ("step", 8)),
        (20, 20, ("step", 21)),
        (20, 10, ("evaluation", 20)),
        (30, 20, ("evaluation", 30)),
    ],
)
def test_the_first_work_is_what_the_other_run_would_have_done_next(step: int, evaluated: int, work: tuple[str, int]):
    assert first_work(step=step, evaluated=evaluated) == [work]


@pytest.mark.parametrize("num_done", [1, 3, 4, 9])
def test_the_first_batch_is_the_one_after_those_that_are_done(num_done: int):
    def batches(num_done: int) -> Batches:
        order = BatchOrder(num_samples=10, batch_size=3, seed=5)
        return Batches(order, num_steps=12, num_shards=1, num_val_samples=0, num_done=num_done)

    whole, rest = batches(0), batches(num_done)
    samples = [whole.samples_of("step", step, (0,)) for step in range(1, 13)]
    assert [rest.samples_of("step", step, (0,)) for step in range(num_done + 1, 13)] == samples[num_done:]


def test_skipping_leaves_the_global_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Batches(
        BatchOrder(num_samples=10, batch_size=3), num_steps=9, num_shards=1, num_val_samples=0, num_done=5
    ).prepare()
    assert torch.equal(torch.rand(1), expected)
