"""Forwards and step functions that do more than compute a loss are refused, or what they change is told."""

from typing import Any

import pytest
import torch
from torch import nn

from dnb.api.rehearsal.side_effects import refuse_own_loop
from dnb.errors import ArgumentError
from tests.unit.api.rehearsal.test_rehearsal import rehearsed, trial_of


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_step_function_that_runs_its_own_loop_is_refused_and_the_weights_are_as_they_were():
    model = nn.Linear(6, 3)
    own = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()

    def loop(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_of(model, batch)
        own.zero_grad()
        loss.backward()
        own.step()
        return loss

    with pytest.raises(ArgumentError, match=r"^step calls backward\(\) itself: it returns the loss"):
        rehearsed(model, step=loop)
    assert model.weight.equal(before)
    assert model.weight.grad is None


def test_a_step_function_that_calls_backward_and_keeps_the_graph_is_refused():
    def twice(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_of(model, batch)
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(ArgumentError, match=r"step calls backward\(\) itself: .*'weight'.* had a gradient already"):
        rehearsed(nn.Linear(6, 3), step=twice)


def test_a_gradient_penalty_that_takes_a_gradient_of_the_input_is_no_loop_of_its_own():
    def penalised(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs = batch[0].requires_grad_()
        output = model(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return nn.functional.cross_entropy(output, batch[1]) + slope.pow(2).sum(1).mean()

    assert refuse_own_loop(trial_of(nn.Sequential(nn.Linear(6, 3), nn.Tanh()), step=penalised)) == ()


class Clips(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.05, 0.05)
        return super().forward(inputs)


class Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
        self.seen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.data += 1
        return super().forward(inputs)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 3, max_norm=1.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.words(inputs.abs().long()).mean(1)


@pytest.mark.parametrize(
    ("model", "name"),
    [(Clips(6, 3), "weight"), (Counts(), "seen"), (Words(), "words.weight")],
    ids=["clip", "count", "norm"],
)
def test_a_forward_that_writes_a_parameter_is_refused_with_the_place_for_it(model, name):
    before = model.get_parameter(name).detach().clone()
    with pytest.raises(ArgumentError, match=rf"^forward writes parameter '{name}' in place \(.*after_step=callable"):
        rehearsed(model)
    assert model.get_parameter(name).equal(before)


def test_a_layer_that_sets_itself_up_at_the_first_batch_is_to_be_given_one_before():
    class SetsUp(nn.Linear):
        is_ready = False

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if not self.is_ready:
                self.weight.data.div_(inputs.std())
                self.is_ready = True
            return super().forward(inputs)

    with pytest.raises(ArgumentError, match="once, at the first batch: run one batch through the model before fit"):
        rehearsed(SetsUp(6, 3))


class Norm(nn.Module):
    """Keeps its mean as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0).detach()
        return inputs - self.mean


def test_a_plain_attribute_that_forward_changes_is_named():
    model = nn.Sequential(Norm(), nn.Linear(6, 3))
    (found,) = rehearsed(model).findings
    assert found.kind == "state"
    assert found.text.startswith("forward changes '0.mean', not a buffer: it does not come home")
    assert model[0].mean.equal(torch.zeros(6))


def test_a_list_that_a_hook_fills_is_named():
    model, seen = nn.Linear(6, 3), []
    model.register_forward_hook(lambda *given: seen.append(given[2].detach()))
    (found,) = rehearsed(model).findings
    assert "'seen of a hook'" in found.text
    assert seen == []


def test_a_list_that_a_step_function_fills_is_named():
    losses: list[float] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_of(model, batch)
        losses.append(loss.item())
        return loss

    (found,) = rehearsed(nn.Linear(6, 3), step=step).findings
    assert found.text == "step's 'losses' changed while it was called: what it puts there stays on the engines"


def test_buffers_and_plain_attributes_that_stay_are_not_named():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.names = torch.ones(6), ["a"]
            self.norm = nn.BatchNorm1d(6)
            self.layer = nn.Linear(6, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(self.norm(inputs * self.scale))

    assert rehearsed(Scaled()).findings == ()
