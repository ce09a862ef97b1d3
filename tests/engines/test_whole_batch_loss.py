"""Losses that look at the whole batch: the answer of one process, whoever computed the outputs."""

import pytest
import torch
from torch import nn

from tests.engines.pools import wait
from tests.models import digits, largest_gap, largest_relative_gap, plain_run, twice

pytestmark = [pytest.mark.engines, pytest.mark.numeric]

NUM_STEPS = 50


def encoder():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def contrastive(output, target):
    """InfoNCE between the halves of each embedding, with the others of the batch as negatives."""
    left, right = nn.functional.normalize(output, dim=1).chunk(2, dim=1)
    return nn.functional.cross_entropy(left @ right.t() * 10, torch.arange(len(output)))


def step_of(loss):
    def step(model, batch):
        *inputs, target = batch
        return loss(model(*inputs), target)

    return step


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_the_first_50_losses_are_those_of_a_plain_loop(pool_of, transport):
    model, plain = twice(encoder)
    run = pool_of.fit(
        model, digits(), loss=contrastive, loss_over="batch", lr=1e-3, steps=NUM_STEPS, transport=transport
    )
    wait(run)
    losses = plain_run(plain, digits(), num_steps=NUM_STEPS, step=step_of(contrastive)).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10
    assert largest_relative_gap(model, plain) <= 1e-10
