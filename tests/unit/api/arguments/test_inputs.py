from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset

from dnb.api.arguments.checks import (
    STRATEGIES,
    check_choice,
    check_flags,
    check_model,
    check_number,
    check_positive,
    check_seed,
    read_transport,
)
from dnb.api.arguments.data import check_batch_size, count_val_samples
from dnb.api.arguments.data_sources import read_source
from dnb.api.arguments.losses import (
    accuracy,
    check_loss_fits,
    check_metrics_are_computed,
    check_val_step,
    loss_names,
    read_loss,
    read_metrics,
)
from dnb.errors import ArgumentError, PlanError
from dnb.job import Job
from dnb.user_code.return_values import ReturnError

X = torch.arange(20.0).view(10, 2)
Y = torch.arange(10)


def own_loss(model: Any, batch: Any) -> Any:
    return model(batch).mean()


# models ------------------------------------------------------------------------------------------------


def test_a_model_is_returned():
    model = nn.Linear(2, 1)
    assert check_model(model) is model


def test_what_is_no_module_is_refused():
    with pytest.raises(ArgumentError, match=r"model is of type function, not a torch\.nn\.Module"):
        check_model(own_loss)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ArgumentError, match=r"model has no trainable parameters: set requires_grad_\(True\)"):
        check_model(nn.ReLU())


def test_a_frozen_model_is_refused_with_the_number_of_its_parameters():
    with pytest.raises(ArgumentError, match="model has no trainable parameters, all 2 are frozen"):
        check_model(nn.Linear(2, 1).requires_grad_(False))


def test_a_model_with_lazy_parameters_is_refused():
    with pytest.raises(ArgumentError, match="model has lazy parameters without a shape yet: run one batch through it"):
        check_model(nn.LazyLinear(3))


def test_a_model_on_another_device_is_refused():
    with pytest.raises(ArgumentError, match=r"model is on meta: give it on the CPU, model\.cpu\(\)"):
        check_model(nn.Linear(2, 1, device="meta"))


# numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64", None, 4.0])
def test_a_batch_size_that_is_not_a_positive_integer_is_refused(value: Any):
    with pytest.raises(ArgumentError, match=f"batch_size must be a positive integer, not {value!r}"):
        check_batch_size(value, num_samples=10)


def test_a_batch_size_larger_than_the_data_set_is_refused_with_both():
    with pytest.raises(ArgumentError, match="batch_size=11 is larger than the data set of 10 samples: use at most 10"):
        check_batch_size(11, num_samples=10)


def test_a_batch_of_the_whole_data_set_is_taken():
    assert check_batch_size(10, num_samples=10) == 10


def test_an_integer_of_numpy_is_taken_as_an_integer():
    assert type(check_positive(np.int64(3), name="epochs")) is int


@pytest.mark.parametrize("value", [0, -1e-3, float("inf"), float("nan"), True, "1e-3", None])
def test_a_number_that_is_not_positive_and_finite_is_refused(value: Any):
    with pytest.raises(ArgumentError, match=f"lr must be a positive number, not {value!r}"):
        check_number(value, name="lr")


@pytest.mark.parametrize("value", [1, np.float32(1), np.int64(1), np.array(1.0), torch.tensor(1.0)], ids=repr)
def test_a_positive_number_is_taken_whosever_it_is(value: Any):
    assert check_number(value, name="lr") == 1.0


@pytest.mark.parametrize("seed", [0, np.int64(0), -5, 2**64 - 1])
def test_an_integer_is_a_seed(seed: Any):
    assert check_seed(seed) == seed


@pytest.mark.parametrize("seed", [None, 1.0, "0", True, 2**64], ids=repr)
def test_what_torch_takes_for_no_seed_is_refused(seed: Any):
    with pytest.raises(ArgumentError, match="seed must be an integer of 64 bits, such as 0, not"):
        check_seed(seed)


@pytest.mark.parametrize("value", ["no", None, 2, "False"], ids=repr)
def test_what_is_neither_true_nor_false_is_refused(value: Any):
    with pytest.raises(ArgumentError, match=f"shuffle must be True or False, not {value!r}"):
        check_flags(exact=True, shuffle=value)


def test_true_false_one_and_nought_are_flags():
    check_flags(exact=True, shuffle=np.bool_(False), telemetry=1)


@pytest.mark.parametrize("metrics", [5, accuracy], ids=["a number", "a function"])
def test_metrics_without_a_name_are_refused(metrics: Any):
    with pytest.raises(ArgumentError, match=r"metrics is a \w+: give 'accuracy', or \{'name'"):
        read_metrics(metrics)


# words --------------------------------------------------------------------------------------------------


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"no strategy 'pipelin': did you mean 'pipeline'\? known: auto, data"):
        check_choice("pipelin", name="strategy", known=STRATEGIES, available=("auto", "data"))


@pytest.mark.parametrize("strategy", ["pipeline", "tensor", "hybrid"])
def test_a_strategy_of_a_later_release_is_refused_with_one_of_this(strategy: str):
    with pytest.raises(PlanError, match=f"strategy='{strategy}' is not in this release yet: use strategy='auto'"):
        check_choice(strategy, name="strategy", known=STRATEGIES, available=("auto", "data"))


def test_a_known_strategy_is_taken():
    assert check_choice("data", name="strategy", known=STRATEGIES, available=("auto", "data")) == "data"


def test_one_transport_is_for_every_engine():
    assert read_transport("socket") == {"": "socket"}


def test_a_transport_may_be_chosen_by_engine():
    assert read_transport({0: "memory", 3: "socket"}) == {"0": "memory", "3": "socket"}


def test_no_transport_leaves_the_choice_to_the_hub():
    assert read_transport(None) == {}


@pytest.mark.parametrize("transport", ["sockets", {0: "memory", 1: "sockets"}], ids=["for all", "for one"])
def test_an_unknown_transport_is_refused_with_the_nearest(transport: Any):
    message = r"no transport 'sockets': did you mean 'socket'\? known: memory, socket"
    with pytest.raises(ArgumentError, match=message):
        read_transport(transport)


@pytest.mark.parametrize("transport", [True, {0: None}, 3], ids=repr)
def test_what_is_no_word_is_no_transport(transport: Any):
    with pytest.raises(ArgumentError, match="no transport"):
        read_transport(transport)


# losses --------------------------------------------------------------------------------------------------


def test_a_loss_is_known_by_its_name():
    assert read_loss("cross_entropy", step=None) is nn.functional.cross_entropy


def test_an_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"no loss 'cross_entropie': did you mean 'cross_entropy'\? known: "):
        read_loss("cross_entropie", step=None)


def test_a_function_that_is_no_loss_is_refused_by_name():
    with pytest.raises(ArgumentError, match="no loss 'relu'"):
        read_loss("relu", step=None)


def test_loss_and_step_together_are_refused():
    with pytest.raises(ArgumentError, match="give loss or step, not both"):
        read_loss("mse_loss", step=own_loss)


def test_a_step_that_cannot_be_called_is_refused():
    with pytest.raises(ArgumentError, match=r"step is a int: give a callable\(model, batch\)"):
        read_loss(None, step=3)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # kl_div's own advice
def test_every_named_loss_compares_an_output_with_a_target():
    output, target = torch.rand(4, 4), torch.rand(4, 4).round()
    classes = torch.tensor([0, 1, 2, 3])
    failed = []
    for name in loss_names():
        function = getattr(nn.functional, name)
        for candidate in (target, classes, target.long()):
            try:
                function(output, candidate)
                break
            except (RuntimeError, ValueError, TypeError):
                continue
        else:
            failed.append(name)
    assert failed == []


def fits(loss: Any, batch: Any, *, model: Any = None, step: Any = None) -> None:
    check_loss_fits(loss, step=step, model=model or nn.Linear(2, 1), batch=batch, name="train")


class OwnLoss(nn.Module):
    def forward(self, x: Any, labels: Any) -> Any:
        return x.mean(), labels


def test_neither_loss_nor_step_is_refused_where_forward_takes_no_target():
    with pytest.raises(
        ArgumentError, match=r"no loss was given: give loss='cross_entropy'.*Linear\.forward take all 2 parts"
    ):
        fits(None, (X, Y))


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"x": X, "labels": Y}, X], ids=["tuple", "list", "dict", "tensor"])
def test_a_model_that_takes_the_whole_batch_may_return_its_own_loss(batch: Any):
    fits(None, batch, model=OwnLoss())


@pytest.mark.parametrize("batch", [(X,), [X], X], ids=["tuple of one", "list of one", "tensor"])
def test_a_batch_without_a_target_is_refused(batch: Any):
    with pytest.raises(ArgumentError, match=r"a batch of train is .*no target: give pairs \(X, y\), or \(X, X\)"):
        fits(nn.functional.mse_loss, batch)


@pytest.mark.parametrize("batch", [{"x": X}, UserDict(x=X)], ids=["dict", "another mapping"])
def test_a_batch_with_names_and_a_loss_is_refused(batch: Any):
    with pytest.raises(ArgumentError, match=r"a batch of train is a \w+ with names.*leave loss out"):
        fits(nn.functional.mse_loss, batch)


def test_a_step_function_says_what_the_loss_is_for_any_batch():
    fits(None, X, step=own_loss)


# metrics ---------------------------------------------------------------------------------------------------


def test_the_word_accuracy_is_a_metric():
    assert read_metrics("accuracy") == {"accuracy": accuracy}


def test_no_metrics_is_an_empty_dictionary():
    assert read_metrics(None) == {}


def test_an_unknown_metric_is_refused():
    with pytest.raises(ArgumentError, match=r"no metric 'f1': give 'accuracy', or \{'name': callable"):
        read_metrics(["accuracy", "f1"])


@pytest.mark.parametrize("name", ["loss", "lr", "samples_per_second", "step", "digest", "val_accuracy", 3])
def test_a_name_that_the_history_uses_is_refused_for_a_metric(name: Any):
    with pytest.raises(ArgumentError, match=f"{name!r} cannot be the name of a metric"):
        read_metrics({name: accuracy})


def test_a_metric_that_cannot_be_called_is_refused():
    with pytest.raises(ArgumentError, match=r"metric 'f1' is a float: give a callable\(output, target\)"):
        read_metrics({"f1": 0.5})


def test_a_metric_with_a_state_of_its_own_begins_anew_every_time():
    class Meter:
        seen = 0

        def update(self, output: Any, target: Any) -> None:
            self.seen += len(output)

        def compute(self) -> float:
            return float(self.seen)

    meter = Meter()
    metric = read_metrics({"seen": meter})["seen"]
    assert [metric(torch.zeros(3), None), metric(torch.zeros(2), None), meter.seen] == [3.0, 2.0, 0]


def test_accuracy_is_the_share_of_samples_whose_largest_output_is_the_target():
    output = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    assert accuracy(output, torch.tensor([0, 1, 1, 0])).item() == 0.75


# evaluations


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (TensorDataset(X, Y), 10),
        (DataLoader(TensorDataset(X, Y), batch_size=4), 10),
        (DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True), 8),
        (DataLoader(TensorDataset(X, Y), batch_size=4, sampler=SubsetRandomSampler(range(3))), 3),
        (DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(range(6), 3, drop_last=False)), 6),
    ],
    ids=["data set", "loader", "drop_last", "sampler", "batch sampler"],
)
def test_an_evaluation_has_as_many_samples_as_a_loader_draws(loader: Any, expected: int):
    assert count_val_samples(read_source(loader, name="val", seed=0)) == expected


def test_an_evaluation_without_a_batch_is_refused():
    loader = DataLoader(TensorDataset(X, Y), batch_size=20, drop_last=True)
    with pytest.raises(
        ArgumentError,
        match="no batch in an epoch of 10 samples, as drop_last=True drops what is less than batch_size=20",
    ):
        count_val_samples(read_source(loader, name="val", seed=0))


def test_a_val_step_that_cannot_be_called_is_refused():
    with pytest.raises(ArgumentError, match=r"val_step is a int: give a callable\(model, batch\)"):
        check_val_step(3, has_val=True)


def test_a_job_of_an_older_release_is_read():
    job = Job(
        model=nn.Linear(2, 1),
        loss=None,
        step=own_loss,
        metrics={},
        optimizer="sgd",
        lr=None,
        scheduler=None,
        order=None,
    )
    state = job.__getstate__()[:8]  # without the fields that came later
    made = Job.__new__(Job)
    made.__setstate__(state)
    assert made.step is own_loss
    assert (made.stages, made.val_step, made.val_order) == (None, None, None)


LOGITS = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("output", [{"logits": LOGITS}, (LOGITS, LOGITS.sum()), SimpleNamespace(logits=LOGITS)])
@pytest.mark.parametrize("batch", [{"x": X, "labels": LABELS}, UserDict(y=LABELS), (X, LABELS)])
def test_accuracy_finds_logits_and_labels_of_a_model_with_its_own_loss(output: Any, batch: Any):
    assert accuracy(output, batch).item() == 0.75


@pytest.mark.parametrize(
    ("output", "batch"),
    [
        (LOGITS.sum(), {"labels": LABELS}),
        ((LOGITS, LOGITS), {"labels": LABELS}),
        ({"logits": LOGITS}, {"x": X}),
        ({"logits": LOGITS}, {"labels": LABELS.float()}),
        ({"logits": LOGITS.expand(3, 4, 2)}, {"labels": LABELS}),
    ],
    ids=["a loss alone", "two of them", "no labels", "labels that are no classes", "a row for each token"],
)
def test_accuracy_is_not_guessed(output: Any, batch: Any):
    with pytest.raises(ReturnError, match="accuracy cannot be told"):
        accuracy(output, batch)


def test_metrics_beside_a_step_function_are_refused():
    with pytest.raises(ArgumentError, match=r"let step return them beside the loss, as"):
        check_metrics_are_computed("accuracy", step=own_loss)
