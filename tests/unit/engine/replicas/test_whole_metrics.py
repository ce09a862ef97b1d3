"""Metrics of all samples at once, of outputs that come in parts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection, SumMetric

from dnb.api.arguments.losses import are_objects, read_metrics
from dnb.api.rehearsal.metrics import whole_metrics_of
from dnb.engine.replicas.whole_metrics import WholeMetrics, joined
from dnb.errors import ArgumentError
from dnb.job import Job
from dnb.user_code.accuracy import accuracy
from dnb.user_code.stateful_metrics import StatefulMetric


def spread_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).std()


def test_a_metric_is_that_of_all_parts_together():
    output, target = torch.arange(6.0), torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 9.0])
    whole = WholeMetrics({"spread": spread_of, "hits": accuracy}, ["spread"])
    for first, last in ((0, 2), (2, 3), (3, 6)):
        whole.add(output[first:last], target[first:last], last - first)
    (sums,) = whole.take()
    assert list(whole.of_parts) == ["hits"]
    assert sums.metric_totals["spread"] / sums.metric_weights["spread"] == pytest.approx(
        (output - target).std().item(), abs=1e-7
    )
    assert (sums.num_samples, sums.metric_weights) == (0, {"spread": 6.0})
    assert whole.take() == []  # it is forgotten


def test_what_was_added_for_a_task_that_failed_does_not_count():
    whole = WholeMetrics({"spread": spread_of}, ["spread"])
    whole.add(torch.tensor([100.0]), torch.tensor([0.0]), 1)
    whole.begin()
    whole.add(torch.tensor([1.0, 3.0]), torch.zeros(2), 2)
    (sums,) = whole.take()
    assert sums.metric_totals["spread"] / 2 == pytest.approx(2**0.5)


def test_what_has_no_row_for_each_sample_is_that_of_the_first_part():
    parts = [({"rows": torch.ones(n, 2) * n, "scale": torch.tensor(3.0)}, torch.zeros(n)) for n in (2, 1)]
    output, target = joined(parts, [2, 1])
    assert output["rows"].tolist() == [[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]
    assert output["scale"].item() == 3.0
    assert target.shape == (3,)


# Arguments ------------------------------------------------------------------------------------------


def test_the_metrics_of_a_collection_have_its_name_before_theirs():
    collection = MetricCollection({"mse": MeanSquaredError()}, prefix="own_")
    found = read_metrics({"all": collection, "hits": accuracy})
    assert list(found) == ["all_own_mse", "hits"]
    assert isinstance(found["all_own_mse"], StatefulMetric)
    assert list(read_metrics(collection)) == ["own_mse"]
    assert are_objects(collection)
    assert not are_objects("accuracy")


def test_two_metrics_of_one_name_are_refused():
    collection = MetricCollection({"mse": MeanSquaredError()})
    with pytest.raises(ArgumentError, match=r"^'a_mse' would be the name of two metrics, one of them in a collection"):
        read_metrics({"a": collection, "a_mse": accuracy})


def job(**named: Any) -> Job:
    values: dict[str, Any] = {"model": nn.Linear(1, 1), "loss": nn.MSELoss(), "step": None, "metrics": {}, **named}
    return SimpleNamespace(**values)  # type: ignore[return-value]


def test_a_metric_that_keeps_a_state_is_computed_of_all_samples_though_nothing_was_rehearsed():
    metrics = read_metrics({"mse": MeanSquaredError(), "hits": accuracy, "spread": spread_of})
    assert whole_metrics_of(job(metrics=metrics), []) == ("mse",)
    assert whole_metrics_of(job(metrics=metrics), ["spread"]) == ("mse", "spread")


def test_the_state_of_a_metric_counts_for_nothing_and_stays():
    own = SumMetric()
    own.update(5.0)

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = own

        def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
            self.inner.update(output.sum())

        def compute(self) -> torch.Tensor:
            return self.inner.compute()

        def reset(self) -> None:
            self.inner.reset()

    metric = StatefulMetric(Summed())
    assert metric(torch.ones(3), torch.ones(3)).item() == 3.0
    assert own.compute().item() == 5.0


@pytest.mark.parametrize("name", ["sync_on_compute", "_to_sync"])
def test_a_metric_does_not_join_its_state_with_those_of_other_processes(name: str):
    seen = []

    class Watched(MeanSquaredError):  # noqa: N818
        def compute(self) -> torch.Tensor:
            seen.append(getattr(self, name))
            return super().compute()

    own = Watched()
    StatefulMetric(own)(torch.ones(3), torch.zeros(3))
    assert seen == [False]
    assert getattr(own, name) is True
