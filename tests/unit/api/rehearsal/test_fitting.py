"""Shapes and dtypes that do not fit are converted, or refused in one sentence with the way out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from dnb.errors import ArgumentError
from dnb.job import Data, DataSource
from dnb.user_code.loader import fetch_batch
from tests.unit.api.rehearsal.test_rehearsal import X, Y, pair, rehearsed, trial_of

mse = nn.functional.mse_loss


def test_float64_data_for_a_float32_model_are_taken_as_float32_and_that_is_told():
    found = rehearsed(nn.Linear(6, 3), pair(X.double()))
    assert found.data.train.samples[0].dtype == torch.float32
    (finding,) = found.findings
    assert (finding.kind, finding.text) == (
        "data",
        "train's X is float64 and the model's parameters float32: taken as float32",
    )


def test_float64_targets_that_torch_takes_stay_as_they_are():
    found = rehearsed(nn.Linear(6, 1), pair(X, torch.randn(32, 1).double()), loss=mse)
    assert found.data.train.samples[1].dtype == torch.float64
    assert found.findings == ()


def test_float64_samples_of_a_data_set_are_taken_as_float32_as_they_are_collated():
    rows = [(np.ones(6), 1)] * 32
    found = rehearsed(nn.Linear(6, 3), Data(train=DataSource(samples=rows, collate=default_collate), val=None))
    assert fetch_batch(found.data.train, torch.arange(4))[0].dtype == torch.float32


def test_a_model_that_converts_its_input_itself_gets_it_as_it_is():
    class Converts(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs.float())

    found = rehearsed(Converts(6, 3), pair(X.double()))
    assert found.data.train.samples[0].dtype == torch.float64
    assert found.findings == ()


def test_a_float64_model_gets_its_float64_data():
    assert rehearsed(nn.Linear(6, 3).double(), pair(X.double())).findings == ()


words = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("model", "data", "loss", "told"),
    [
        (
            nn.Linear(6, 3),
            pair(X, Y.float()),
            None,
            r"train's y is float32 and shape \(N,\), which the loss .*y\.long\(\)",
        ),
        (nn.Linear(6, 3), pair((X * 9).to(torch.uint8)), None, r"train's X is uint8 .* the model .*X\.float\(\)"),
        (nn.Linear(6, 3), pair(X.long()), None, r"train's X is int64 and shape \(N, 6\), .*X\.float\(\)"),
        (nn.Linear(6, 3).double(), pair(X), None, r"train's X is float32 .*X\.to\(torch\.float64\)"),
        (words, pair(X.abs().round()), None, r"train's X is float32 .*X\.long\(\)"),
        (nn.Linear(6, 3), pair(X, Y[:, None]), None, r"train's y is int64 and shape \(N, 1\).*y\.reshape\(-1\)"),
        (nn.Linear(6, 1), pair(X, Y.float()), nn.functional.binary_cross_entropy_with_logits, r"y\.reshape\(-1, 1\)"),
        (nn.Linear(36, 3), pair(X[:, None].expand(-1, 6, -1).clone()), None, r"X\.reshape\(len\(X\), -1\)"),
        (
            nn.Linear(6, 3),
            pair(X[:, 0].clone()),
            None,
            r"X of float32 and shape \(N,\) .*samples of 6 features: each of",
        ),
        (nn.Linear(5, 3), pair(X), None, r"train's X of float32 and shape \(N, 6\) and y of .*in_features=6"),
        (nn.Conv2d(3, 4, 3), pair(torch.ones(32, 1, 8, 8)), None, r"in_channels=1, or samples of shape \(3, \.\.\.\)"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Linear(5, 3)),
            pair(X),
            None,
            r"layer '2', Linear\(in_features=5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_names_and_the_way_out(model, data, loss, told):
    with pytest.raises(ArgumentError, match=told):
        rehearsed(model, data, loss=loss)


@pytest.mark.parametrize("loss", [mse, lambda output, target: ((output - target) ** 2).mean()], ids=["torch", "own"])
def test_a_target_that_would_be_compared_with_every_output_is_refused(loss):
    with pytest.raises(ArgumentError, match=r"y has shape \(N,\) and the output \(N, 1\).*y\.reshape\(-1, 1\)"):
        rehearsed(nn.Linear(6, 1), pair(X, torch.randn(32)), loss=loss)


def test_a_step_function_that_compares_every_output_with_every_target_is_refused():
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return mse(model(batch[0]), batch[1])

    with pytest.raises(
        ArgumentError, match="step compares tensors of different shapes, every output with every target"
    ):
        rehearsed(nn.Linear(6, 1), pair(X, torch.randn(32)), step=step)


def test_classes_that_there_are_not_are_left_to_the_run_which_names_the_samples():
    trial = trial_of(nn.Linear(6, 3), pair(X, Y + 3))
    assert isinstance(trial.computed.error, IndexError)
    assert rehearsed(nn.Linear(6, 3), pair(X, Y + 3)).findings == ()


def test_classes_beside_one_column_of_outputs_are_no_matter_of_shapes():
    trial = trial_of(nn.Linear(6, 1), pair(X, torch.zeros(32, dtype=torch.int64)))
    assert trial.computed.error is None


@pytest.mark.parametrize("error", [ValueError("shape of the moon"), KeyError("size"), RuntimeError("expected more")])
def test_errors_that_user_code_raises_itself_are_left_to_the_run(error):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        raise error

    assert rehearsed(nn.Linear(6, 3), step=step).findings == ()
