"""Metrics of torchmetrics on real engines, against the same metric of one process over all samples."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchmetrics import AUROC, F1Score, MeanSquaredError, MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import f1_score

import dnb
from dnb.errors import ArgumentError, PlanError
from dnb.user_code.return_values import ReturnError
from tests.engines.pools import wait
from tests.models import adamw, digits, mlp, plain_run, twice

pytestmark = [pytest.mark.engines, pytest.mark.numeric]

NUM_STEPS = 6
WAYS = {
    "1_engine": (1, {}),
    "2_engines": (2, {}),
    "3_engines": (3, {}),
    "socket": (2, {"transport": "socket"}),
    "exact": (2, {"exact": True}),
    "micro_batches": (2, {"micro_batch": 7}),
    "pipeline": (2, {"strategy": "pipeline"}),
    "pipeline_3_stages": (3, {"strategy": "pipeline", "schedule": "gpipe"}),
    "tensor": (2, {"strategy": "tensor", "tensor_plan": {"0": "colwise", "2": "rowwise"}}),
    "tensor_in_parts": (2, {"strategy": "tensor", "tensor_plan": {"0": "colwise", "2": "rowwise"}, "micro_batch": 16}),
}


@pytest.fixture(params=WAYS)
def way(request, shared, tmp_path, monkeypatch):
    """Pools and divisions, with which nothing of a metric may change."""
    monkeypatch.chdir(tmp_path)
    num_engines, options = WAYS[request.param]
    yield shared.of(num_engines), options
    shared.calm()


def value_of(metric, output, target):
    """The metric of these samples, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class may have no sample
        metric = metric.clone()
        metric.update(output.detach(), target)
        return metric.compute().item()


def expected(model, data, val, metrics, *, loss):
    """What one process measures: of every batch before its update, and of all of val in the end."""
    seen = {name: [] for name in metrics}

    def step(model, batch):
        output = model(batch[0])
        for name, metric in metrics.items():
            seen[name].append(value_of(metric, output, batch[1]))
        return loss(output, batch[1])

    plain_run(model, data, num_steps=NUM_STEPS, step=step, optimizer=adamw(model.parameters(), 1e-2))
    output = model(val[0])
    return seen, {name: value_of(metric, output, val[1]) for name, metric in metrics.items()}


def check_same(run, seen, of_val):
    for name, values in seen.items():
        assert run.history[name][-len(values) :] == pytest.approx(values, rel=0, abs=1e-9), name
        assert run.history[f"val_{name}"][-1] == pytest.approx(of_val[name], rel=0, abs=1e-9), name


def of_classes():
    return {
        "auroc": AUROC(task="multiclass", num_classes=10),
        "f1": F1Score(task="multiclass", num_classes=10, average="macro"),
        "counted": MulticlassAccuracy(num_classes=10, average="micro", ignore_index=7),
    }


def fit(pool, model, data, val, **options):
    given = {"lr": 1e-2, "steps": NUM_STEPS, "epochs": 1, **options}
    return wait(pool.fit(model, data, val=val, **given))


def test_auroc_and_f1_are_those_of_one_process_over_all_samples(way):
    pool, options = way
    model, plain = twice(mlp)
    data, val = digits(384), digits(700)
    run = fit(pool, model, data, val, loss="cross_entropy", metrics=of_classes(), **options)
    check_same(run, *expected(plain, data, val, of_classes(), loss=functional.cross_entropy))


def of_numbers():
    return {"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False), "r2": R2Score()}


def numbers(num_samples):
    x, y = digits(num_samples)
    return x, y.to(x.dtype).unsqueeze(1) / 9


def regressor():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))


def test_errors_squared_are_those_of_one_process_over_all_samples(way):
    pool, options = way
    model, plain = twice(regressor)
    data, val = numbers(384), numbers(700)
    run = fit(pool, model, data, val, loss="mse_loss", metrics=of_numbers(), **options)
    check_same(run, *expected(plain, data, val, of_numbers(), loss=functional.mse_loss))


@pytest.mark.parametrize("strategy", ["data", "pipeline"])
def test_a_collection_and_functions_are_those_of_one_process(pool, strategy):
    collection = MetricCollection(of_classes(), prefix="my_")
    function = partial(f1_score, task="multiclass", num_classes=10, average="macro")
    model, plain = twice(mlp)
    data, val = digits(384), digits(700)
    options = {"loss": "cross_entropy", "strategy": strategy}
    run = fit(pool, model, data, val, metrics={"all": collection, "f1": function}, **options)
    own = {f"all_my_{name}": metric for name, metric in of_classes().items()}
    check_same(run, *expected(plain, data, val, own, loss=functional.cross_entropy))
    assert run.history["f1"] == pytest.approx(run.history["all_my_f1"], rel=0, abs=1e-9)
    assert run.history["val_f1"][-1] == pytest.approx(run.history["val_all_my_f1"][-1], rel=0, abs=1e-9)


def test_a_collection_alone_gives_its_metrics_their_names(pool):
    run = fit(pool, mlp(), digits(128), None, loss="cross_entropy", metrics=MetricCollection(of_classes()), steps=2)
    assert {"auroc", "f1", "counted"} <= set(run.history)
    assert [event.text for event in run.events if event.kind == "metrics"] == [
        "metrics 'auroc', 'counted', 'f1' are computed of all samples at once: outputs are gathered"
    ]


def test_a_metric_of_each_class_is_refused_before_anything_starts(pool):
    metrics = {"f1": F1Score(task="multiclass", num_classes=10, average=None)}
    with pytest.raises(
        ReturnError, match=r"^metric 'f1' must be a number, not a tensor of float\d\d and shape \(10,\)"
    ):
        pool.fit(mlp(), digits(128), loss="cross_entropy", metrics=metrics)


def test_a_metric_of_all_samples_is_refused_where_teams_have_a_part_of_each_batch(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = shared.of(4)
    with pytest.raises(PlanError, match=r"^metric 'auroc' is computed of all samples at once, and 2 teams have a part"):
        pool.fit(
            mlp(), digits(128), loss="cross_entropy", metrics=of_classes(), strategy="hybrid", mesh="data=2,pipeline=2"
        )


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs, labels):
        output = self.inner(inputs)
        return {"loss": functional.cross_entropy(output, labels), "logits": output}


def test_a_metric_with_a_state_is_refused_where_a_model_returns_its_own_loss(pool):
    x, y = digits(128)
    rows = [{"inputs": x[i], "labels": y[i]} for i in range(len(x))]
    with pytest.raises(ArgumentError, match=r"^metric 'mse' is computed of all samples at once, and where a model"):
        pool.fit(OwnLoss(), rows, metrics={"mse": MeanSquaredError()})


def test_a_metric_that_is_given_to_a_run_that_goes_on_is_never_averaged(pool):
    model, plain = twice(mlp)
    data, val = digits(384), digits(700)
    first = fit(pool, model, data, val, loss="cross_entropy", checkpoint_every=3, steps=3)
    run = wait(dnb.resume(first.folder, metrics=of_classes(), steps=NUM_STEPS, pool=pool))
    seen, of_val = expected(plain, data, val, of_classes(), loss=functional.cross_entropy)
    check_same(run, {name: values[3:] for name, values in seen.items()}, of_val)
