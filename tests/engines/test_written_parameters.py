"""Parameters that user code writes where the rehearsal does not see it: named on the engine. What it thaws trains."""

import pytest
import torch
from torch import nn

from dnb.errors import RunError
from tests.engines.pools import wait
from tests.models import digits, largest_gap, mlp, plain_run, twice

pytestmark = pytest.mark.engines


class WritesLater(nn.Module):
    """Clips its weights from the third batch of 32 on, in place or past torch's counter of versions."""

    def __init__(self, *, past_counter: bool) -> None:
        super().__init__()
        self.layer, self.num_calls, self.past_counter = mlp(), 0, past_counter

    def forward(self, inputs):
        self.num_calls += len(inputs) == 32
        if self.num_calls >= 3 and self.training:
            weight = self.layer[2].weight
            with torch.no_grad():
                (weight.data if self.past_counter else weight).clamp_(-0.01, 0.01)
        return self.layer(inputs)


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_what_is_written_in_place_later_is_named_and_not_applied(pool, transport):
    model, plain = WritesLater(past_counter=False), mlp()
    run = pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=10, transport=transport)
    with pytest.raises(RunError, match=r"parameter 'layer\.2\.weight' was written in forward or step.*after_step="):
        wait(run)
    assert run.step == 2
    plain_run(plain, digits(), num_steps=2)
    home = model.layer.state_dict()
    assert all(torch.allclose(home[name], each, atol=1e-10) for name, each in plain.state_dict().items())


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_what_is_written_past_the_counter_is_named_too(pool, transport):
    run = pool.fit(
        WritesLater(past_counter=True), digits(), loss="cross_entropy", lr=1e-3, steps=30, transport=transport
    )
    with pytest.raises(RunError, match=r"layer\.2\.weight"):
        wait(run)
    assert run.step < 30


def test_a_run_that_was_refused_goes_on_with_a_loss_that_writes_nothing(pool):
    def writes(output, target):
        if len(output) == 32:
            with torch.no_grad():
                model_of_engine().weight.zero_()
        return nn.functional.cross_entropy(output, target)

    def model_of_engine():
        import gc

        return next(each for each in gc.get_objects() if isinstance(each, nn.Linear) and each.out_features == 10)

    model, plain = twice(mlp)
    run = pool.fit(model, digits(), loss=writes, lr=1e-3, steps=6)
    with pytest.raises(RunError, match=r"parameter '2\.weight' was written"):
        wait(run)
    if run.status == "paused":
        run.resume(loss="cross_entropy")
        wait(run)
        assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=6).losses) < 1e-10


class Thawing(nn.Module):
    """Lets its first layer train from its third step on."""

    def __init__(self, *, is_frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)
        self.first.requires_grad_(not is_frozen)
        self.num_steps = 0

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)))


def thaw(model, batch):
    if len(batch[0]) >= 32:  # not where a few samples are rehearsed
        model.num_steps += torch.is_grad_enabled()
        model.first.requires_grad_(model.num_steps >= 3)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_parameter_that_is_frozen_until_it_is_to_train_trains_as_in_one_process(pool, is_frozen):
    model, plain = (Thawing(is_frozen=is_frozen) for _ in range(2))
    run = wait(pool.fit(model, digits(), step=thaw, lr=1e-2, steps=10, batch_size=128))
    losses = plain_run(
        plain, digits(), num_steps=10, step=thaw, batch_size=128, optimizer=torch.optim.AdamW(plain.parameters(), 1e-2)
    ).losses
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert not torch.equal(model.first.weight, Thawing(is_frozen=False).first.weight)
