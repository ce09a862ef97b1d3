"""Models that return their own loss, whatever a batch is made of, against one process."""

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dnb.errors import ArgumentError, PlanError
from tests.engines.pools import wait
from tests.models import DigitRows, digits, largest_gap, mlp, plain_losses

pytestmark = pytest.mark.engines

NUM_STEPS = 10


class OwnLoss(nn.Module):
    """Gives its loss in one of the ways in which models do."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net = mlp()
        self.form = form

    def forward(self, pixels: torch.Tensor, target: torch.Tensor | None = None) -> Any:
        output = self.net(pixels)
        loss = nn.functional.cross_entropy(output, target)
        if self.form == "bare":
            return loss
        if self.form == "beside its output":
            return output, loss
        return (
            SimpleNamespace(logits=output, loss=loss) if self.form == "attribute" else {"loss": loss, "logits": output}
        )


@dataclass
class Batch:
    pixels: torch.Tensor
    target: torch.Tensor


def collated(make):
    return DataLoader(DigitRows(), batch_size=64, shuffle=True, collate_fn=lambda rows: make(default_collate(rows)))


def batches_of(kind: str) -> Any:
    """The digits, in batches of every kind."""
    if kind == "pair":
        return digits()
    if kind == "list":
        return DataLoader(TensorDataset(*digits()), batch_size=64, shuffle=True)
    if kind == "dict":
        return DigitRows()
    if kind == "other mapping":
        return collated(UserDict)
    return collated(lambda parts: Batch(**parts))


@pytest.fixture(scope="module")
def plain():
    return plain_losses(mlp(), digits(), num_steps=NUM_STEPS, batch_size=64)


@pytest.mark.parametrize("kind", ["pair", "list", "dict", "other mapping", "dataclass"])
def test_a_batch_of_any_kind_trains_a_model_that_returns_its_own_loss(pool, plain, kind):
    run = wait(pool.fit(OwnLoss("bare"), batches_of(kind), lr=1e-3, steps=NUM_STEPS))
    assert largest_gap(run.history["loss"], plain) < 1e-10


@pytest.mark.parametrize("form", ["beside its output", "attribute", "key"])
def test_a_loss_is_found_wherever_a_model_returns_it(pool, plain, form):
    run = wait(pool.fit(OwnLoss(form), digits(), lr=1e-3, steps=NUM_STEPS, val=digits(100)))
    assert largest_gap(run.history["loss"], plain) < 1e-10
    assert len(run.history["val_loss"]) == 1


@pytest.mark.parametrize("form", ["bare", "beside its output", "attribute", "key"])
def test_a_pipeline_trains_a_model_that_returns_its_own_loss(pool, plain, form):
    run = wait(pool.fit(OwnLoss(form), digits(), lr=1e-3, steps=NUM_STEPS, strategy="pipeline"))
    assert largest_gap(run.history["loss"], plain) < 1e-10


def test_a_pipeline_takes_batches_of_any_mapping(pool, plain):
    run = wait(pool.fit(OwnLoss("key"), collated(UserDict), lr=1e-3, steps=NUM_STEPS, strategy="pipeline"))
    assert largest_gap(run.history["loss"], plain) < 1e-10


@pytest.mark.parametrize(("form", "kind"), [("attribute", "dict"), ("key", "dataclass"), ("beside its output", "pair")])
def test_the_accuracy_of_a_model_with_its_own_loss_is_that_of_its_logits(pool, form, kind):
    model = OwnLoss(form)
    data = batches_of(kind)
    run = wait(pool.fit(model, data, lr=1e-3, steps=NUM_STEPS, val=data, metrics="accuracy"))
    inputs, targets = digits()
    expected = (model.net(inputs).argmax(1) == targets).double().mean().item()
    assert len(run.history["accuracy"]) == NUM_STEPS
    assert run.history["val_accuracy"][-1] == pytest.approx(expected)


def test_a_metric_of_a_model_with_its_own_loss_gets_output_and_batch(pool):
    def right(output, batch):
        return (output["logits"].argmax(1) == batch["target"]).double().mean()

    run = wait(pool.fit(OwnLoss("key"), DigitRows(), lr=1e-3, steps=2, metrics={"right": right}))
    assert all(0 <= value <= 1 for value in run.history["right"])


def test_accuracy_is_refused_where_a_model_returns_its_loss_alone(pool):
    with pytest.raises(ArgumentError, match=r"accuracy cannot be told.*callable\(output, batch\)"):
        pool.fit(OwnLoss("bare"), DigitRows(), metrics="accuracy")


def test_metrics_beside_a_step_function_are_refused(pool):
    with pytest.raises(ArgumentError, match="let step return them beside the loss"):
        pool.fit(mlp(), digits(), step=lambda model, batch: model(batch[0]).mean(), metrics="accuracy")


def test_metrics_of_a_model_with_its_own_loss_are_refused_in_a_pipeline(pool):
    with pytest.raises(PlanError, match="a pipeline has only the loss of a model that returns its own"):
        pool.fit(OwnLoss("key"), DigitRows(), metrics="accuracy", strategy="pipeline")
