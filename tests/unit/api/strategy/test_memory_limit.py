from dataclasses import replace

import msgspec
import pytest
import torch
from torch import nn
from torch.nn import functional

from dnb.api.strategy.division import ModelDivision
from dnb.api.strategy.memory_limit import Limit
from dnb.errors import PlanError
from dnb.job import Data, DataSource, Job

X, Y = torch.zeros(64, 64), torch.zeros(64, dtype=torch.int64)
DATA = Data(train=DataSource(samples=(X, Y), collate=None), val=None)


def job(model: nn.Module) -> Job:
    return Job(
        model=model, loss=functional.cross_entropy, step=None, metrics={}, optimizer="adamw", lr=None, scheduler=None,
        order=None,
    )  # fmt: skip


def even() -> nn.Module:
    return nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])  # 16,384 bytes each


def uneven() -> nn.Module:
    """The first layer has as much as all others."""
    return nn.Sequential(nn.Linear(64, 448, bias=False), nn.Linear(448, 64, bias=False), *even())


def limit(num_bytes: int, model: nn.Module) -> Limit:
    return Limit(num_bytes, job(model), DATA, batch_size=64, precision="float32")


def division(model: nn.Module) -> ModelDivision:
    return ModelDivision.of(
        job(model), DATA, strategy="pipeline", stages=None, schedule="1f1b", mesh=None, batch_size=64, micro_batch=None,
        exact=False, transport=None,
    )  # fmt: skip


def test_a_model_that_fits_nowhere_whole_is_refused_with_the_figures_and_the_way_out():
    message = (
        r"Sequential does not fit: every engine would need 336 kB \(131 kB of parameters, 131 kB of gradients, "
        r".* of activations and inputs\) for 32 of the batch's 64 samples, and memory_limit is 200 kB; "
        r"strategy='pipeline' divides it"
    )
    with pytest.raises(PlanError, match=message):
        limit(200_000, even()).settle(None, None, num_engines=2, micro_batch=None)


def test_a_model_that_fits_is_not_refused():
    assert limit(500_000, even()).settle(None, None, num_engines=2, micro_batch=None) is None


def test_where_only_activations_are_too_many_a_smaller_micro_batch_is_a_way_out():
    with pytest.raises(PlanError, match="or a smaller micro_batch"):
        limit(300_000, even()).settle(None, None, num_engines=2, micro_batch=None)


def test_a_smaller_micro_batch_fits_where_the_whole_batch_does_not():
    assert limit(300_000, even()).settle(None, None, num_engines=2, micro_batch=4) is None


def test_pipelines_that_are_too_short_are_left_out():
    found = limit(125_000, even()).settle(division(even()), None, num_engines=4, micro_batch=None)
    assert found is not None
    assert min(partition.num_engines for partition in found.partitions) == 3


def test_a_pipeline_that_does_not_fit_says_how_many_engines_would_do():
    with pytest.raises(
        PlanError, match=r"engine \d of a pipeline of 2 would need .*; 3 engines would do: %dtrain add 1"
    ):
        limit(125_000, even()).settle(division(even()), None, num_engines=2, micro_batch=None)


def test_no_number_of_engines_holds_a_layer_that_is_too_large():
    with pytest.raises(PlanError, match="raise memory_limit, or make layers or batch smaller"):
        limit(20_000, even()).settle(division(even()), None, num_engines=4, micro_batch=None)


def test_cuts_are_moved_where_those_that_were_found_do_not_fit():
    model = uneven()
    own = division(model)
    badly = tuple(
        msgspec.structs.replace(each, cuts=("5",)) if each.num_engines == 2 else each for each in own.partitions
    )  # the first stage has both large layers and three more
    found = limit(520_000, model).settle(replace(own, partitions=badly), None, num_engines=2, micro_batch=None)
    assert found is not None
    moved = next(partition for partition in found.partitions if partition.num_engines == 2)
    assert moved.cuts == ("2",)
