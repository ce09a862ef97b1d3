import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dnb.api.fit_arguments import FitArguments
from dnb.api.run_words import code_of_cell, describe_arguments
from dnb.job import Job
from dnb.planning.sample_order import BatchOrder

DATA = (torch.zeros(4, 3), torch.zeros(4, 2))


def my_loss(output, target):
    return output.sum()


def words(**given) -> dict[str, str]:
    model = given.pop("model", nn.Linear(3, 2))
    optimizer = given.get("optimizer", "adamw")
    if callable(optimizer) and not isinstance(optimizer, partial):
        given["optimizer"] = optimizer(model)
    arguments = FitArguments(model=model, train=DATA, **given)
    job = Job(
        model=model, loss=None, step=None, metrics=dict.fromkeys(given.get("metrics") or ()), optimizer="adamw",
        lr=arguments.lr, scheduler=None, order=BatchOrder(num_samples=4, batch_size=2, seed=0),
    )  # fmt: skip
    return describe_arguments(arguments, job)


def test_a_model_is_told_by_its_class_its_size_and_its_layers():
    told = words()
    assert told["model"] == "Linear, 8 parameters"
    assert told["layers"] == "Linear(in_features=3, out_features=2, bias=True)"


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("cross_entropy", "cross_entropy"),
        (nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (my_loss, "my_loss"),
        (partial(my_loss, target=1), "partial of my_loss"),
        (None, "returned by the model"),
    ],
)
def test_a_loss_is_told_by_its_name(loss, told):
    assert words(loss=loss)["loss"] == told


def test_the_learning_rate_is_the_given_one_the_optimizers_own_or_torchs():
    assert words(lr=0.5)["lr"] == "0.5"
    assert words(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.25))["lr"] == "0.25"
    assert words()["lr"] == "0.001, torch's default"


def test_an_optimizer_is_told_by_its_name_or_class():
    assert words()["optimizer"] == "adamw"
    assert words(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.25))["optimizer"] == "SGD"


def test_epochs_are_told_or_the_steps_in_their_place():
    assert words(epochs=3)["epochs"] == "3"
    assert words(steps=1000)["epochs"] == "as many as 1,000 steps take"


def test_metrics_are_told_by_name():
    assert words(metrics={"accuracy": my_loss, "error": my_loss})["metrics"] == "accuracy, error"


def test_what_was_not_given_is_not_told():
    assert {"scheduler", "step", "buffers", "transport", "code"} & set(words()) == set()
    assert words(checkpoint_every=10, transport="socket")["transport"] == "socket"


class Talkative(nn.Linear):
    def __repr__(self) -> str:
        raise SystemExit(1)


def test_a_model_that_cannot_be_shown_is_told_by_its_class():
    assert words(model=Talkative(1, 1))["layers"] == "Talkative"


def test_a_long_text_is_cut():
    assert len(words(model=nn.Sequential(*[nn.ReLU() for _ in range(1000)]))["layers"]) <= 4_000


def test_the_code_is_that_of_the_cell_that_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(In=["", "import dnb", "run = dnb.fit(model, train)"]))
    assert code_of_cell() == "run = dnb.fit(model, train)"


def test_a_magic_is_told_as_it_was_typed(monkeypatch):
    notebook = SimpleNamespace(In=["", "run_line_magic('dtrain', 'fit model train')"], _i1="%dtrain fit model train\n")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    assert code_of_cell() == "%dtrain fit model train"


def test_in_a_thread_there_is_no_cell(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(In=["x = 1"]))
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(code_of_cell()))
    thread.start()
    thread.join()
    assert found == [""]


@pytest.mark.parametrize("main", [SimpleNamespace(), SimpleNamespace(In=[]), SimpleNamespace(In=3)])
def test_in_a_script_there_is_no_cell(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert code_of_cell() == ""
