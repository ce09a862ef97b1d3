"""The weights of a run without the notebook's model: from the hub, and from a checkpoint."""

import pytest
import torch
from torch import nn

from dnb.api.runs.run import Run
from dnb.errors import ArgumentError
from tests.engines.pools import wait, wait_until
from tests.models import digits

pytestmark = pytest.mark.engines


class TiedNet(nn.Module):
    """Tied weights, a buffer that counts, one of no fixed shape, one that no state_dict has, and an extra state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(64)
        self.last = nn.Linear(64, 10)
        self.register_buffer("longest", torch.zeros(1))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.calls = 0

    def forward(self, inputs):
        if self.training:
            self.calls += 1
            self.longest = torch.ones(min(self.calls, 3))
        return self.last(self.norm(self.second(torch.relu(self.first(inputs)))))

    def get_extra_state(self):
        return {"kind": "tied", "scale": torch.tensor(2.0)}

    def set_extra_state(self, state):
        pass


def train(pool, **options):
    model = TiedNet()
    run = pool.fit(model, digits(64), loss="cross_entropy", batch_size=32, steps=4, **options)
    return model, wait(run)


def assert_same(weights, model):
    expected = model.state_dict()
    assert set(weights) == set(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(weights[name], value), name
            assert weights[name].dtype == value.dtype


def test_the_weights_of_a_run_are_those_that_its_model_gets(pool):
    model, run = train(pool)
    weights = run.state_dict()
    assert_same(weights, model)
    fresh = TiedNet()
    fresh.longest = torch.zeros(3)
    fresh.load_state_dict(weights)
    assert torch.equal(fresh.last.weight, model.last.weight)


def test_a_run_that_is_found_again_without_a_model_has_its_weights(pool):
    model, run = train(pool, name="found-again")
    found = Run("found-again", pool.hub, folder=run.folder, key=pool.key)
    assert torch.equal(found.state_dict()["first.weight"], model.first.weight)


def test_weights_are_copies(pool):
    _, run = train(pool)
    run.state_dict()["last.weight"].zero_()
    assert run.state_dict()["last.weight"].abs().sum() > 0


def test_without_a_pool_the_weights_are_those_of_the_last_checkpoint(pool):
    model, run = train(pool, checkpoint_every=2)
    weights = Run.open(run.folder).state_dict()
    assert_same(weights, model)


def test_without_pool_and_checkpoint_the_weights_are_nowhere(pool):
    _, run = train(pool)
    with pytest.raises(ArgumentError, match=r"the weights of run '.*' are nowhere any more: its pool is gone, and .*"):
        Run.open(run.folder).state_dict()


def test_the_model_of_a_run_that_is_found_again_is_made_of_what_fit_has_sent(pool):
    model, run = train(pool, name="made-anew")
    found = Run("made-anew", pool.hub, folder=run.folder, key=pool.key)
    assert found.model is not model
    assert type(found.model).__name__ == "TiedNet"
    assert_same(found.state_dict(), found.model)
    assert torch.equal(found.model.last.weight, model.last.weight)
    assert found.model.second.weight is found.model.first.weight
    assert found.model is found.model


def test_a_model_that_was_made_anew_in_mid_run_gets_the_weights_of_the_end(pool):
    model = TiedNet()
    run = pool.fit(model, digits(64), loss="cross_entropy", batch_size=32, steps=1_000_000, name="goes-on")
    wait_until(run, lambda run: run.step > 3, what="3 steps")
    found = Run("goes-on", pool.hub, folder=run.folder, key=pool.key).watch()
    assert found.model.last.weight.isfinite().all()
    run.stop()
    wait(run)
    wait(found)
    assert torch.equal(found.model.last.weight, model.last.weight)


def test_a_model_whose_pickle_another_key_has_signed_is_not_read(pool):
    _, run = train(pool, name="other-key")
    assert Run("other-key", pool.hub, folder=run.folder, key=b"another").model is None


def test_without_a_pool_there_is_no_model(pool):
    _, run = train(pool)
    assert Run.open(run.folder).model is None
