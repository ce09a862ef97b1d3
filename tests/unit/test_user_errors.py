"""User code in the notebook's own process: what it raises is told, but a Ctrl-C stays one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dnb.api.arguments.checks import check_model
from dnb.engine.profiling.profiler import ProfileInput, profile_trial
from dnb.errors import ArgumentError, PlanError, is_text, summary_of
from dnb.notebook.control_panel.choices import metrics
from dnb.partitioning.pipeline.cut_points import cut_points
from dnb.partitioning.pipeline.flop_counts import weigh
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.transport.pickling.payloads import explain_unpicklable
from dnb.user_code.loss_judge import judge


class PanicException(BaseException):
    """As pyo3 has it."""


class Raising(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        self.error = error

    def forward(self, inputs):
        self.body(inputs)
        raise self.error


class Sealed:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self):
        raise self.error


BATCH = torch.ones(8, 3), torch.ones(8, 1)


def mean_loss(output, target):
    return (output - target).square().mean()


def looked_at(name, error):
    """What a check says of user code that raises."""
    model = Raising(error)
    inputs = Inputs.of((BATCH[0], BATCH[1]))
    if name == "profile":
        with pytest.raises(PlanError, match=r"^the model fails on 2 samples of the batch: PanicException: panicked$"):
            profile_trial(ProfileInput(model=model, batch=BATCH, loss=mean_loss))
        return True
    if name == "unpicklable":
        return str(explain_unpicklable(Sealed(error), name="step")).startswith(
            "step (a Sealed) cannot be sent to the engines: PanicException: panicked. "
        )
    if name == "loss":
        return judge(lambda batch: mean_loss(model(batch[0]), batch[1]), BATCH, num_samples=len(BATCH[0])).kind is None
    if name == "weigh":
        return weigh(model, inputs, ["body.1"]) == [1.0, 1.0]
    return len(cut_points(model, inputs)) == 0


NAMES = ["profile", "unpicklable", "loss", "weigh", "cut"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_exception_is_a_failure_of_user_code_in_the_notebook_too(name):
    assert looked_at(name, PanicException("panicked"))


@pytest.mark.parametrize("name", NAMES)
def test_a_ctrl_c_in_user_code_stays_an_interrupt(name):
    with pytest.raises(KeyboardInterrupt):
        looked_at(name, KeyboardInterrupt())


class Meddling(dict):
    error: BaseException

    def items(self):
        raise self.error


def test_an_object_that_panics_when_it_is_looked_at_is_not_offered():
    found = Meddling(x=len)
    found.error = PanicException("panicked")
    assert [choice.label for choice in metrics({"found": found}, names={})] == ["none", "accuracy"]
    found.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        metrics({"found": found}, names={})


def test_a_tensor_whose_name_is_no_text_is_refused():
    model = nn.Sequential()
    model.add_module("layer\udcff", nn.Linear(3, 1))
    with pytest.raises(ArgumentError, match=r"a tensor named 'layer\\udcff\.weight', which is no text"):
        check_model(model)


def test_names_with_lone_surrogates_are_no_text():
    assert is_text("ß 精度")
    assert not is_text("scan\udcff.png")


def test_a_summary_is_short_and_names_the_class():
    assert summary_of(ValueError("no such file")) == "ValueError: no such file"
    assert summary_of(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(summary_of(ValueError("x" * 5_000_000))) <= 1_000
