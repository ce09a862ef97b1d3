"""State of models besides parameters: buffers by their rules, and modes that users have set."""

import pytest
import torch
from torch import nn

from tests.engines.pools import wait
from tests.models import digits, largest_gap, plain_losses, twice

pytestmark = pytest.mark.engines


class Seen(nn.Module):
    """Counts samples, and keeps the sum of the last part's pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("pixels", torch.zeros(()))

    def forward(self, inputs):
        if self.training:
            self.seen += len(inputs)
            self.pixels = inputs.sum()
        return self.layer(inputs)


def train(pool, model, *, num_steps=4, **options):
    data = digits(64)
    return wait(pool.fit(model, data, loss="cross_entropy", batch_size=32, steps=num_steps, shuffle=False, **options))


def state_events(run):
    return [event.text for event in run.events if event.kind == "state"]


@pytest.mark.parametrize("transport", ["memory", "socket"])
@pytest.mark.parametrize("exact", [False, True])
def test_buffers_follow_their_rules(pool, transport, exact):
    model = Seen()
    run = train(pool, model, transport=transport, exact=exact, buffers={"seen": "sum", "pixels": "first"})
    num_first = 8 if exact else 16  # samples of the first of 4 shards, or of the first of 2 engines
    assert (model.seen.item(), model.pixels.item()) == (4 * 32, digits(64)[0][32 : 32 + num_first].sum().item())
    assert state_events(run) == []


def test_without_a_rule_the_first_part_counts_and_that_is_told(pool):
    model = Seen()
    run = train(pool, model)
    assert model.seen.item() == 4 * 16
    (told,) = state_events(run)
    assert told.startswith("engines have made different things of buffer 'pixels': what the engine with the batch's")


def frozen_norm_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 10))
    model[1].eval().requires_grad_(False)
    model[3].eval()
    return model


@pytest.mark.parametrize("strategy", ["data", "pipeline"])
def test_modules_that_were_set_to_evaluation_stay_in_it_also_after_an_evaluation(pool, strategy):
    model, plain = twice(frozen_norm_net)
    before = model[1].running_mean.clone()
    run = wait(
        pool.fit(model, digits(96), val=digits(32), loss="cross_entropy", batch_size=32, epochs=2, strategy=strategy)
    )
    assert torch.equal(model[1].running_mean, before)
    assert largest_gap(run.history["loss"], plain_losses(plain, digits(96), num_steps=6, batch_size=32)) < 1e-10
    assert [module.training for module in model] == [True, False, True, False, True]


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(pool):
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10)).eval()
    run = train(pool, model)
    assert model[1].num_batches_tracked.item() == 4
    assert "evaluation mode" in state_events(run)[0]
