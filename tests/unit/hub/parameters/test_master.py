from __future__ import annotations

import gc
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from dnb.errors import SpaceError
from dnb.hub.parameters.master import Contribution, Master, NotFinite, mean_of
from dnb.job import Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.measurements import Sums
from dnb.transport.layout import slot_views
from dnb.transport.pickling.payloads import pickle_payload, unpack
from dnb.transport.segments import open_segment


def job_of(model: nn.Module, *, optimizer: Any = "sgd", lr: float | None = 1.0, scheduler: Any = None) -> Job:
    return Job(
        model=model,
        loss=nn.functional.mse_loss,
        step=None,
        metrics={},
        optimizer=optimizer,
        lr=lr,
        scheduler=scheduler,
        order=BatchOrder(num_samples=8, batch_size=4),
    )


def one_weight(value: float = 1.0) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


class Pool:
    """A master copy and the slabs of its engines, as the engines see them."""

    def __init__(self, folder: Path, job: Job, *, clip_norm: float | None = None) -> None:
        self.master = Master(job, folders=[folder], prefix="run", clip_norm=clip_norm)
        self._contributions: list[Contribution] = []

    def bring(
        self,
        engine: int,
        gradients: Mapping[str, Any],
        *,
        slab: int = 0,
        shard: int | None = None,
        loss: float = 0.5,
        weight: float | None = None,
        unit: float = 1.0,
        num_samples: int = 4,
        buffers: Mapping[str, Any] | None = None,
        metrics: Mapping[str, tuple[float, float]] | None = None,
    ) -> Pool:
        """Put gradients and buffers into an engine's slab, and count its report.

        A parameter that is not in `gradients` got none. The shard is the engine's number if none is given.
        """
        self.master.add_slabs(engine, slab + 1, kind="memory")
        memory = open_segment(self.master.slabs_of(engine)[slab].ref).memory
        views = slot_views(self.master.gradient_layout, memory)
        for name, gradient in views.items():
            gradient.copy_(torch.as_tensor(gradients.get(name, 0.0)))
        own = dict(self.master.model.named_buffers())
        for name, buffer in slot_views(self.master.buffer_layout, memory).items():
            buffer.copy_(torch.as_tensor((buffers or {}).get(name, own[name])))
        scale = num_samples if weight is None else weight
        sums = Sums(
            loss_total=loss * scale,
            loss_weight=scale,
            metric_totals={name: total for name, (total, _) in (metrics or {}).items()},
            metric_weights={name: weighs for name, (_, weighs) in (metrics or {}).items()},
            num_samples=num_samples,
            unit=unit,
        )
        self._contributions.append(
            Contribution(
                engine=engine,
                slab=slab,
                shard=engine if shard is None else shard,
                sums=sums,
                is_sum=weight is not None,
                unused=tuple(index for index, name in enumerate(views) if name not in gradients),
            )
        )
        return self

    def commit(self):
        contributions, self._contributions = self._contributions, []
        return self.master.commit(contributions)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of model and optimizer, as it is now."""
        found = {name: value.clone() for name, value in self.master.model.state_dict().items()}
        for index, optimizer_state in self.master.optimizer.state_dict()["state"].items():
            found |= {f"{index}.{name}": value.clone() for name, value in optimizer_state.items()}
        return found


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture
def pool_of(tmp_path: Path):
    pools: list[Pool] = []

    def make(model: nn.Module, *, clip_norm: float | None = None, **options: Any) -> Pool:
        pools.append(Pool(tmp_path, job_of(model, **options), clip_norm=clip_norm))
        return pools[-1]

    yield make
    for pool in pools:
        pool.master.drop_slabs()
        pool.master.close()


MakePool = Callable[..., Pool]


# gradients ---------------------------------------------------------------------------------------


def test_the_gradients_of_all_engines_are_added(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[0.25]]}).bring(1, {"weight": [[0.5]]}).commit()
    assert pool.master.model.weight.item() == 0.25


LARGE = 2.0**24  # the float32 above which 1 is lost
IN_LINE = [(LARGE, 0), (1.0, 1), (-LARGE, 2)]  # gradients with their shards: 0 if they are added in this order


@pytest.mark.parametrize("engines", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("arrival", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_slabs_are_added_in_the_order_of_their_shards(
    pool_of: MakePool, engines: tuple[int, ...], arrival: tuple[int, ...]
):
    pool = pool_of(one_weight(0.0))
    for place in arrival:
        gradient, shard = IN_LINE[place]
        pool.bring(engines[place], {"weight": [[gradient]]}, shard=shard)
    pool.commit()
    assert pool.master.model.weight.item() == 0.0


@pytest.mark.parametrize("arrival", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_slabs_of_one_engine_are_added_in_the_order_of_their_shards(pool_of: MakePool, arrival: tuple[int, ...]):
    pool = pool_of(one_weight(0.0))
    for slab, place in enumerate(arrival):
        gradient, shard = IN_LINE[place]
        pool.bring(0, {"weight": [[gradient]]}, slab=slab, shard=shard)
    pool.commit()
    assert pool.master.model.weight.item() == 0.0


def test_the_order_of_summation_shows():
    """Else the tests before this one would show nothing."""
    assert (torch.tensor(LARGE) - LARGE + 1.0).item() == 1.0
    assert (torch.tensor(LARGE) + 1.0 - LARGE).item() == 0.0


def test_the_model_of_the_job_is_the_one_that_is_trained(pool_of: MakePool):
    model = one_weight(1.0)
    pool_of(model).bring(0, {"weight": [[1.0]]}).commit()
    assert model.weight.item() == 0.0


def test_engines_read_what_was_committed(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[0.5]]}).commit()
    memory = open_segment(pool.master.parameters_ref).memory
    assert slot_views(pool.master.parameter_layout, memory)["weight"].item() == 0.5


def test_a_second_step_by_another_engine_uses_its_gradients(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[0.5]]}).commit()
    pool.bring(1, {"weight": [[0.25]]}).commit()
    assert pool.master.model.weight.item() == 0.25


def test_an_engine_that_reports_twice_has_its_slab_added_once(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[0.25]]}).bring(0, {"weight": [[0.25]]}).commit()
    assert pool.master.model.weight.item() == 0.75


def test_an_engine_keeps_its_slab_when_it_is_asked_for_again(pool_of: MakePool):
    master = pool_of(one_weight()).master
    (slab,) = master.add_slabs(3, 1, kind="memory")
    assert master.add_slabs(3, 1, kind="memory") == []
    assert master.slabs_of(3) == [slab]


def test_slabs_that_an_engine_has_are_kept_when_it_gets_more(pool_of: MakePool):
    master = pool_of(one_weight()).master
    first = master.add_slabs(3, 2, kind="memory")
    more = master.add_slabs(3, 12, kind="memory")
    assert len(more) == 10
    assert master.slabs_of(3) == [*first, *more]


def test_slabs_of_an_engine_are_its_own(pool_of: MakePool):
    master = pool_of(one_weight()).master
    (slab,) = master.add_slabs(3, 1, kind="memory")
    master.add_slabs(30, 1, kind="memory")
    assert master.slabs_of(3) == [slab]


def test_a_slab_that_is_filled_over_a_wire_counts_as_one_that_is_shared(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    (slab,) = pool.master.add_slabs(7, 1, kind="socket")
    slab.gradients[0].fill_(0.5)
    sums = part(0.0, 4)
    pool.master.commit([Contribution(engine=7, slab=0, shard=0, sums=sums, is_sum=False)])
    assert pool.master.model.weight.item() == 0.5


def test_a_slab_that_is_filled_over_a_wire_has_no_file(pool_of: MakePool, tmp_path: Path):
    master = pool_of(one_weight()).master
    before = list(tmp_path.iterdir())
    (slab,) = master.add_slabs(7, 1, kind="socket")
    assert (list(tmp_path.iterdir()), slab.ref.path) == (before, "")


def test_a_slab_of_an_engine_that_is_gone_is_not_that_of_its_successor(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[0.5]]}).commit()
    pool.master.drop_slabs_of(0)
    pool.bring(0, {"weight": [[0.25]]}).commit()
    assert pool.master.model.weight.item() == 0.25


def test_the_file_of_a_slab_goes_with_its_engine(pool_of: MakePool, tmp_path: Path):
    master = pool_of(one_weight()).master
    before = list(tmp_path.iterdir())
    master.add_slabs(3, 4, kind="memory")
    master.drop_slabs_of(3)
    assert list(tmp_path.iterdir()) == before


def test_parameters_of_several_dtypes_are_all_trained(pool_of: MakePool):
    model = nn.ModuleDict({"a": one_weight(1.0), "b": one_weight(1.0).double(), "c": one_weight(1.0).bfloat16()})
    pool = pool_of(model)
    gradients = {"a.weight": [[0.5]], "b.weight": [[0.25]], "c.weight": [[0.125]]}
    pool.bring(0, gradients).bring(1, gradients).commit()
    assert [p.item() for p in model.parameters()] == [0.0, 0.5, 0.75]


def test_tied_parameters_are_stepped_once(pool_of: MakePool):
    model = nn.Sequential(one_weight(1.0), one_weight(1.0))
    model[1].weight = model[0].weight
    pool_of(model).bring(0, {"0.weight": [[0.25]]}).commit()
    assert [model[0].weight.item(), model[1].weight.item()] == [0.75, 0.75]


def test_frozen_parameters_are_untouched_by_weight_decay(pool_of: MakePool):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    model[0].weight.requires_grad_(False)
    pool = pool_of(model, optimizer=lambda params: torch.optim.SGD(params, lr=1.0, weight_decay=0.5))
    pool.bring(0, {"1.weight": [[0.0]]}).commit()
    assert [model[0].weight.item(), model[1].weight.item()] == [3.0, 0.5]


def test_frozen_parameters_have_no_place_in_the_slab(pool_of: MakePool):
    model = nn.Sequential(one_weight(), one_weight())
    model[0].weight.requires_grad_(False)
    assert [slot.name for slot in pool_of(model).master.gradient_layout.slots] == ["1.weight"]


def test_an_optimizer_instance_keeps_training_the_models_parameters(pool_of: MakePool):
    model = one_weight(1.0)
    pool = pool_of(model, optimizer=torch.optim.SGD(model.parameters(), lr=2.0), lr=None)
    pool.bring(0, {"weight": [[0.25]]}).commit()
    assert model.weight.item() == 0.5


# losses and metrics ---------------------------------------------------------------------------------


def part(loss_total: float, num_samples: int, *, weight: float | None = None, **metrics: float) -> Sums:
    return Sums(
        loss_total=loss_total,
        loss_weight=num_samples if weight is None else weight,
        metric_totals=metrics,
        metric_weights=dict.fromkeys(metrics, float(num_samples)),
        num_samples=num_samples,
    )


def test_the_loss_is_the_mean_over_the_samples_of_all_parts():
    assert mean_of([part(3.0, 1), part(1.0, 3)])[0] == 1.0


def test_the_loss_of_a_sum_is_the_total_over_the_weights():
    assert mean_of([part(6.0, 2, weight=10.0), part(3.0, 2, weight=20.0)])[0] == 0.3


def test_metrics_are_means_over_the_samples_of_all_parts():
    assert mean_of([part(0.0, 1, accuracy=1.0), part(0.0, 3, accuracy=0.0)])[1] == {"accuracy": 0.25}


def weighed(**metrics: tuple[float, float]) -> Sums:
    return Sums(
        loss_total=0.0,
        loss_weight=1.0,
        metric_totals={name: total for name, (total, _) in metrics.items()},
        metric_weights={name: weight for name, (_, weight) in metrics.items()},
        num_samples=1,
    )


def test_a_metric_is_a_mean_over_its_own_weights():
    assert mean_of([weighed(tokens=(6.0, 10.0)), weighed(tokens=(3.0, 20.0))])[1] == {"tokens": 0.3}


def test_every_metric_has_a_weight_of_its_own():
    parts = [weighed(a=(1.0, 2.0), b=(1.0, 4.0)), weighed(a=(1.0, 2.0), b=(1.0, 4.0))]
    assert mean_of(parts)[1] == {"a": 0.5, "b": 0.25}


def test_a_metric_that_some_parts_lack_is_a_mean_over_the_others():
    assert mean_of([weighed(a=(1.0, 2.0)), weighed()])[1] == {"a": 0.5}


def test_a_metric_without_weight_is_not_a_number():
    assert math.isnan(mean_of([weighed(a=(0.0, 0.0))])[1]["a"])


def test_a_part_without_samples_does_not_move_the_mean():
    assert mean_of([part(0.0, 0), part(2.0, 4, accuracy=4.0)]) == (0.5, {"accuracy": 1.0})


def test_a_loss_over_nothing_is_not_a_number():
    assert math.isnan(mean_of([part(0.0, 0)])[0])


def test_a_committed_step_tells_its_loss_learning_rate_and_samples(pool_of: MakePool):
    pool = pool_of(one_weight(), lr=0.125)
    pool.bring(0, {"weight": [[1.0]]}, loss=1.0, num_samples=1)
    result = pool.bring(1, {"weight": [[1.0]]}, loss=5.0, num_samples=3).commit()
    assert (result.loss, result.lr, result.num_samples) == (4.0, 0.125, 4)


def test_a_committed_step_tells_its_metrics(pool_of: MakePool):
    pool = pool_of(one_weight()).bring(0, {"weight": [[1.0]]}, metrics={"accuracy": (3.0, 4.0)})
    assert pool.bring(1, {"weight": [[1.0]]}, metrics={"accuracy": (1.0, 4.0)}).commit().metrics == {"accuracy": 0.5}


def test_the_gradient_of_a_sum_is_divided_by_the_weight_of_all_engines(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[3.0]]}, weight=10.0).bring(1, {"weight": [[2.0]]}, weight=30.0).commit()
    assert pool.master.model.weight.item() == 0.875


def test_gradients_in_different_units_are_added_up_as_those_of_totals(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[1.5]]}, weight=10.0, unit=2.0).bring(1, {"weight": [[4.0]]}, weight=30.0, unit=0.5)
    pool.commit()  # of 3 + 2 over 40
    assert pool.master.model.weight.item() == 0.875


def test_gradients_in_units_of_all_weights_are_added_as_they_are(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[0.25]]}, weight=10.0, unit=40.0).bring(1, {"weight": [[0.5]]}, weight=30.0, unit=40.0)
    pool.commit()
    assert pool.master.model.weight.item() == 0.25


# nothing is applied ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(pool_of: MakePool, loss: float):
    pool = pool_of(one_weight()).bring(0, {"weight": [[1.0]]}, loss=loss)
    with pytest.raises(NotFinite, match=f"the loss is {loss}"):
        pool.commit()


def test_a_refused_step_changes_no_bit(pool_of: MakePool):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    pool = pool_of(model, optimizer="adamw")
    gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    pool.bring(0, gradients).commit()
    before = pool.state()
    pool.bring(0, gradients, loss=math.nan, buffers={"1.running_mean": torch.ones(2)})
    with pytest.raises(NotFinite):
        pool.commit()
    assert_equal(pool.state(), before)


def test_a_loss_that_is_not_finite_is_told_with_its_engine_and_slab(pool_of: MakePool):
    pool = pool_of(one_weight()).bring(3, {"weight": [[1.0]]}, shard=0)
    pool.bring(4, {"weight": [[1.0]]}, slab=2, shard=1, loss=math.nan).bring(5, {"weight": [[1.0]]}, shard=2)
    with pytest.raises(NotFinite) as caught:
        pool.commit()
    assert (caught.value.engine, caught.value.slab) == (4, 2)


class Refused:
    """A step of several slabs, of which one holds a gradient that is not finite."""

    def __init__(self, pool_of: MakePool, *, num_slabs: int, culprit: int, value: float) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 600))
        self.pool = pool_of(model, optimizer="adamw")
        gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        self.pool.bring(7, gradients).commit()
        self.before = self.pool.state()
        bad = {**gradients, "2.weight": torch.ones(600, 2)}
        bad["2.weight"][599, 1] = value
        for number in range(num_slabs):
            buffers = {"1.running_mean": torch.full((2,), 5.0)}
            # the engine with the largest number brings the first shard
            engine = 7 + num_slabs - number
            self.pool.bring(engine, bad if number == culprit else gradients, shard=number, buffers=buffers)
        with pytest.raises(NotFinite) as caught:
            self.pool.commit()
        self.verdict = caught.value
        self.engine = 7 + num_slabs - culprit


CULPRITS = pytest.mark.parametrize(
    ("num_slabs", "culprit"),
    [(1, 0), (2, 0), (2, 1), (3, 2)],
    ids=["the only one", "the first of 2", "the second of 2", "the last of 3"],
)
NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@NOT_FINITE
@CULPRITS
def test_a_gradient_that_is_not_finite_is_told_with_its_parameter(
    pool_of: MakePool, num_slabs: int, culprit: int, value: float
):
    refused = Refused(pool_of, num_slabs=num_slabs, culprit=culprit, value=value)
    assert str(refused.verdict) == "the gradient of '2.weight' is not finite"


@NOT_FINITE
@CULPRITS
def test_a_gradient_that_is_not_finite_is_told_with_its_engine(
    pool_of: MakePool, num_slabs: int, culprit: int, value: float
):
    refused = Refused(pool_of, num_slabs=num_slabs, culprit=culprit, value=value)
    assert (refused.verdict.engine, refused.verdict.slab) == (refused.engine, 0)


@NOT_FINITE
@CULPRITS
def test_a_gradient_that_is_not_finite_changes_no_bit_of_parameters_optimizer_and_buffers(
    pool_of: MakePool, num_slabs: int, culprit: int, value: float
):
    refused = Refused(pool_of, num_slabs=num_slabs, culprit=culprit, value=value)
    assert_equal(refused.pool.state(), refused.before)


def test_the_slab_of_an_engine_that_is_not_finite_is_told(pool_of: MakePool):
    pool = pool_of(one_weight())
    for slab, gradient in enumerate([1.0, 1.0, math.nan, 1.0]):
        pool.bring(3, {"weight": [[gradient]]}, slab=slab, shard=slab)
    with pytest.raises(NotFinite) as caught:
        pool.commit()
    assert (caught.value.engine, caught.value.slab) == (3, 2)


def test_a_sum_that_overflows_is_refused(pool_of: MakePool):
    pool = pool_of(one_weight()).bring(0, {"weight": [[3e38]]}).bring(1, {"weight": [[3e38]]})
    with pytest.raises(NotFinite, match="the gradient of 'weight' is not finite"):
        pool.commit()


@pytest.mark.parametrize("place", [0, 1 << 18, 600_000, 655_359])
def test_one_element_of_many_that_is_not_finite_is_found(pool_of: MakePool, place: int):
    pool = pool_of(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(655_360))}))
    gradient = torch.ones(655_360)
    gradient[place] = math.nan
    with pytest.raises(NotFinite, match="the gradient of 'weight' is not finite"):
        pool.bring(0, {"weight": gradient}).commit()


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=lambda dtype: str(dtype)[6:]
)


@DTYPES
@NOT_FINITE
def test_a_gradient_of_any_dtype_that_is_not_finite_is_refused(pool_of: MakePool, dtype: torch.dtype, value: float):
    pool = pool_of(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(5, dtype=dtype))}))
    gradient = torch.ones(5, dtype=dtype)
    gradient[3] = value
    with pytest.raises(NotFinite, match="the gradient of 'weight' is not finite"):
        pool.bring(0, {"weight": gradient}).commit()


def test_an_imaginary_part_that_is_not_finite_is_refused(pool_of: MakePool):
    pool = pool_of(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}))
    with pytest.raises(NotFinite, match="the gradient of 'weight' is not finite"):
        pool.bring(0, {"weight": [1.0, complex(1.0, math.inf)]}).commit()


@DTYPES
def test_a_finite_gradient_whose_square_is_not_is_applied(pool_of: MakePool, dtype: torch.dtype):
    large = 2.0 ** (1000 if dtype == torch.float64 else 120)
    pool = pool_of(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(3, dtype=dtype))}))
    pool.bring(0, {"weight": torch.tensor([large, 1.0, -large], dtype=dtype)}).commit()
    assert pool.master.model["weight"].tolist() == [-large, -1.0, large]


@DTYPES
def test_gradients_of_any_dtype_are_added_and_divided(pool_of: MakePool, dtype: torch.dtype):
    pool = pool_of(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(3, dtype=dtype))}))
    pool.bring(0, {"weight": [1.0, 2.0, 3.0]}, weight=3.0).bring(1, {"weight": [3.0, 2.0, -3.0]}, weight=1.0).commit()
    assert pool.master.model["weight"].tolist() == [-1.0, -1.0, 0.0]


def test_a_complex_gradient_is_applied_whole(pool_of: MakePool):
    pool = pool_of(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}))
    pool.bring(0, {"weight": [1 + 2j, 3 - 4j]}).bring(1, {"weight": [1j, -3j]}).commit()
    assert pool.master.model["weight"].tolist() == [-1 - 3j, -3 + 7j]


# without a gradient ----------------------------------------------------------------------------------


def decaying(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1.0, weight_decay=0.5)


@pytest.mark.parametrize("optimizer", ["adamw", decaying], ids=["fused", "plain"])
def test_a_parameter_that_nobody_used_is_untouched_by_weight_decay(pool_of: MakePool, optimizer: Any):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool = pool_of(model, optimizer=optimizer)
    pool.bring(0, {"1.weight": [[1.0]]}).bring(1, {"1.weight": [[1.0]]}).commit()
    assert model[0].weight.item() == 3.0
    assert model[1].weight.item() != 1.0


@pytest.mark.parametrize("optimizer", ["adamw", decaying], ids=["fused", "plain"])
def test_a_parameter_that_nobody_used_keeps_its_optimizer_state(pool_of: MakePool, optimizer: Any):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool = pool_of(model, optimizer=optimizer)
    pool.bring(0, {"0.weight": [[1.0]], "1.weight": [[1.0]]}).commit()
    before = {name: value.clone() for name, value in pool.master.optimizer.state[model[0].weight].items()}
    pool.bring(0, {"1.weight": [[1.0]]}).commit()
    assert_equal(pool.master.optimizer.state[model[0].weight], before)


def test_a_parameter_that_nobody_ever_used_has_no_optimizer_state(pool_of: MakePool):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool = pool_of(model, optimizer="adamw").bring(0, {"1.weight": [[1.0]]})
    pool.commit()
    assert model[0].weight not in pool.master.optimizer.state


def test_a_parameter_that_some_used_has_the_gradient_of_those(pool_of: MakePool):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool = pool_of(model)
    pool.bring(0, {"1.weight": [[0.5]]}).bring(1, {"0.weight": [[1.0]]}).commit()
    assert [model[0].weight.item(), model[1].weight.item()] == [2.0, 0.5]


def test_a_parameter_that_some_used_without_effect_is_stepped_with_zeros(pool_of: MakePool):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool = pool_of(model, optimizer=lambda params: torch.optim.SGD(params, lr=1.0, weight_decay=0.5))
    pool.bring(0, {"1.weight": [[0.0]]}).bring(1, {"0.weight": [[0.0]]}).commit()
    assert [model[0].weight.item(), model[1].weight.item()] == [1.5, 0.5]


def test_a_parameter_that_is_used_again_is_stepped_again(pool_of: MakePool):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool = pool_of(model)
    pool.bring(0, {"1.weight": [[0.5]]}).commit()
    pool.bring(0, {"0.weight": [[1.0]], "1.weight": [[0.5]]}).commit()
    assert [model[0].weight.item(), model[1].weight.item()] == [2.0, 0.0]


def test_clipping_leaves_out_what_nobody_used(pool_of: MakePool):
    model = nn.Sequential(one_weight(3.0), one_weight(1.0))
    pool_of(model, clip_norm=0.5).bring(0, {"1.weight": [[25.0]]}).commit()
    assert [model[0].weight.item(), model[1].weight.item()] == [3.0, pytest.approx(0.5)]


def test_a_refused_step_does_not_step_the_scheduler(pool_of: MakePool):
    pool = pool_of(one_weight(), scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
    pool.bring(0, {"weight": [[1.0]]}, loss=math.nan)
    with pytest.raises(NotFinite):
        pool.commit()
    assert pool.master.optimizer.param_groups[0]["lr"] == 1.0


# clipping ----------------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.usefixtures("float64")
def test_clipping_is_torchs_on_the_gradient_of_the_whole_batch(pool_of: MakePool):
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    model = nn.Linear(3, 2)
    model.load_state_dict(plain.state_dict())
    first = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    second = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        parameter.grad = first[name] + second[name]
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    pool_of(model, clip_norm=0.1).bring(0, first).bring(1, second).commit()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-10)


def test_a_sum_is_clipped_after_it_is_divided(pool_of: MakePool):
    pool = pool_of(one_weight(1.0), clip_norm=0.5)
    pool.bring(0, {"weight": [[25.0]]}, weight=100.0).commit()
    assert pool.master.model.weight.item() == 0.75


def test_a_gradient_below_the_norm_is_not_clipped(pool_of: MakePool):
    pool = pool_of(one_weight(1.0), clip_norm=10.0)
    pool.bring(0, {"weight": [[0.25]]}).commit()
    assert pool.master.model.weight.item() == 0.75


# buffers -------------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_running_statistics_become_the_mean_weighted_by_samples(pool_of: MakePool):
    pool = pool_of(Buffered(running_mean=torch.zeros(1)))
    pool.bring(0, {"weight": [0.0]}, num_samples=1, buffers={"running_mean": [4.0]})
    pool.bring(1, {"weight": [0.0]}, num_samples=3, buffers={"running_mean": [8.0]}).commit()
    assert pool.master.model.running_mean.item() == 7.0


def test_statistics_of_an_engine_without_samples_do_not_count(pool_of: MakePool):
    pool = pool_of(Buffered(running_mean=torch.zeros(1)))
    pool.bring(0, {"weight": [0.0]}, num_samples=0)
    pool.bring(1, {"weight": [0.0]}, num_samples=3, buffers={"running_mean": [8.0]}).commit()
    assert pool.master.model.running_mean.item() == 8.0


def bring_queues(pool: Pool, *, rule: str | None = None) -> Any:
    """Two engines make 1.5 and 4 of a buffer that was 1, the first with one sample and the second with three."""
    pool.master.buffer_rules = {} if rule is None else {"queue": rule}
    pool.bring(1, {"weight": [0.0]}, num_samples=3, buffers={"queue": [4.0]})
    pool.bring(0, {"weight": [0.0]}, num_samples=1, buffers={"queue": [1.5]}).commit()
    return pool.master.model.queue.item()


@pytest.mark.parametrize(("rule", "value"), [(None, 1.5), ("first", 1.5), ("sum", 4.5), ("mean", 3.375)])
def test_any_other_buffer_is_that_of_the_first_shard_unless_there_is_a_rule(
    pool_of: MakePool, rule: str | None, value: float
):
    assert bring_queues(pool_of(Buffered(queue=torch.ones(1))), rule=rule) == value


def test_a_buffer_of_which_engines_make_different_things_is_told_once(pool_of: MakePool):
    pool = pool_of(Buffered(queue=torch.ones(1)))
    bring_queues(pool)
    told = pool.master.take_news()
    bring_queues(pool)
    assert (told.count("'queue'"), pool.master.take_news()) == (2, "")


@pytest.mark.parametrize("rule", ["first", "sum", "mean"])
def test_a_buffer_that_has_a_rule_is_not_told_of(pool_of: MakePool, rule: str):
    pool = pool_of(Buffered(queue=torch.ones(1)))
    bring_queues(pool, rule=rule)
    assert pool.master.take_news() == ""


def test_an_integer_counter_is_added_up_if_that_is_its_rule(pool_of: MakePool):
    pool = pool_of(Buffered(seen=torch.tensor(4)))
    pool.master.buffer_rules = {"seen": "sum"}
    pool.bring(0, {"weight": [0.0]}, buffers={"seen": 6}).bring(1, {"weight": [0.0]}, buffers={"seen": 9}).commit()
    assert pool.master.model.seen.item() == 11


def test_a_constant_does_not_drift(pool_of: MakePool):
    scale = torch.linspace(0.1, 9.9, 100, dtype=torch.float64)  # where rounding of the weights would show
    pool = pool_of(Buffered(scale=scale.clone()))
    for engine, num_samples in [(0, 5), (1, 7), (2, 11)]:
        pool.bring(engine, {"weight": [0.0]}, num_samples=num_samples)
    pool.commit()
    assert torch.equal(pool.master.model.scale, scale)


def test_an_integer_counter_is_taken_from_an_engine_and_not_averaged(pool_of: MakePool):
    pool = pool_of(Buffered(count=torch.tensor(4)))
    pool.bring(0, {"weight": [0.0]}, buffers={"count": 5}).bring(1, {"weight": [0.0]}, buffers={"count": 5}).commit()
    assert pool.master.model.count.item() == 5


def test_an_integer_counter_is_taken_from_an_engine_that_had_samples(pool_of: MakePool):
    pool = pool_of(Buffered(count=torch.tensor(4)))
    pool.bring(0, {"weight": [0.0]}, num_samples=0)
    pool.bring(1, {"weight": [0.0]}, num_samples=4, buffers={"count": 5}).commit()
    assert pool.master.model.count.item() == 5


def test_a_mask_stays_boolean(pool_of: MakePool):
    pool = pool_of(Buffered(mask=torch.tensor([True, False])))
    pool.bring(0, {"weight": [0.0]}, buffers={"mask": [False, True]}).commit()
    assert pool.master.model.mask.tolist() == [False, True]


def test_buffers_are_not_taken_for_gradients(pool_of: MakePool):
    pool = pool_of(Buffered(mean=torch.zeros(1)))
    pool.bring(0, {"weight": [0.25]}, buffers={"mean": [100.0]}).commit()
    assert pool.master.model.weight.item() == 0.75


# scheduler -------------------------------------------------------------------------------------------------


def test_the_scheduler_is_stepped_after_every_step(pool_of: MakePool):
    pool = pool_of(one_weight(), scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    rates = [pool.bring(0, {"weight": [[0.0]]}).commit().lr for _ in range(3)]
    assert rates == [1.0, 0.5, 0.25]


def test_a_scheduler_that_travelled_with_its_optimizer_is_stepped(pool_of: MakePool, tmp_path: Path):
    model = one_weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    pickled, ref, segment = pickle_payload((model, optimizer, scheduler), name="job", folders=[tmp_path])
    model, optimizer, scheduler = unpack(pickled, ref)
    segment.unlink()
    pool = pool_of(model, optimizer=optimizer, lr=None, scheduler=scheduler)
    rates = [pool.bring(0, {"weight": [[0.0]]}).commit().lr for _ in range(3)]
    assert rates == [1.0, 0.5, 0.25]


# digests -----------------------------------------------------------------------------------------------------


class OneOfEach(nn.Module):
    """A tensor of every kind that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(300, 3))
        self.rough = nn.Parameter(torch.randn(5).bfloat16())
        self.turn = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("count", torch.tensor(4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))


def flip_a_bit(tensor: torch.Tensor) -> None:
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    flat[-1] ^= 1


def test_digests_of_what_did_not_change_are_equal(pool_of: MakePool):
    master = pool_of(OneOfEach()).master
    assert master.digests() == master.digests()


KINDS_OF_TENSORS = ["weight", "rough", "turn", "frozen", "count", "mask", "mean"]


@pytest.mark.parametrize("name", KINDS_OF_TENSORS)
def test_the_digest_of_all_changes_with_one_bit(pool_of: MakePool, name: str):
    master = pool_of(OneOfEach()).master
    before, _ = master.digests()
    flip_a_bit(getattr(master.model, name))
    assert master.digests()[0] != before


@pytest.mark.parametrize("name", KINDS_OF_TENSORS)
def test_the_digest_of_one_tensor_changes_with_one_of_its_bits_and_no_other_does(pool_of: MakePool, name: str):
    master = pool_of(OneOfEach()).master
    before = memoryview(master.digests()[1]).cast("I")
    flip_a_bit(getattr(master.model, name))
    after = memoryview(master.digests()[1]).cast("I")
    slots = [slot.name for slot in master.parameter_layout.slots]
    assert [slots[index] for index in range(len(slots)) if before[index] != after[index]] == [name]


def test_there_is_a_digest_of_every_tensor(pool_of: MakePool):
    master = pool_of(OneOfEach()).master
    assert len(master.digests()[1]) == 4 * 8


def test_the_digest_of_a_tensor_is_the_crc_of_its_bytes(pool_of: MakePool):
    model = nn.ParameterDict({"weight": nn.Parameter(torch.tensor([1.0, 2.0]))})
    wanted = zlib.crc32(struct.pack("<2f", 1.0, 2.0))
    assert pool_of(model).master.digests()[1] == struct.pack("<I", wanted)


# what changes --------------------------------------------------------------------------------------------------


def changing_bytes(master: Master) -> set[int]:
    return {place for first, last in master.changing for place in range(first, last)}


def test_all_that_changes_is_in_the_ranges_that_change(pool_of: MakePool):
    model = OneOfEach()
    master = pool_of(model).master
    ours = changing_bytes(master)
    for slot in master.parameter_layout.slots:
        tensor = getattr(model, slot.name)
        if slot.name != "frozen":
            assert ours >= set(range(slot.offset_bytes, slot.offset_bytes + tensor.numel() * tensor.element_size()))


def test_frozen_parameters_are_not_in_the_ranges_that_change(pool_of: MakePool):
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.BatchNorm1d(100), nn.Linear(100, 100, bias=False))
    model[0].weight.requires_grad_(False)
    master = pool_of(model).master
    (slot,) = [slot for slot in master.parameter_layout.slots if slot.name == "0.weight"]
    assert not changing_bytes(master) & set(range(slot.offset_bytes, slot.offset_bytes + 40_000))


def test_ranges_that_change_do_not_overlap(pool_of: MakePool):
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 100))
    model[0].requires_grad_(False)
    changing = pool_of(model).master.changing
    assert all(last < first for (_, last), (first, _) in pairwise(changing))


def test_neighbours_that_change_are_one_range(pool_of: MakePool):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10)))
    assert len(pool_of(model).master.changing) == 1


# memory ------------------------------------------------------------------------------------------------------


def test_no_file_is_left_when_all_is_closed(tmp_path: Path):
    pool = Pool(tmp_path, job_of(one_weight()))
    pool.bring(0, {"weight": [[1.0]]}).bring(1, {"weight": [[1.0]]}).commit()
    pool.master.drop_slabs()
    pool.master.close()
    assert list(tmp_path.iterdir()) == []


def test_parameters_can_be_read_when_the_slabs_are_dropped(tmp_path: Path):
    pool = Pool(tmp_path, job_of(one_weight(1.0)))
    pool.bring(0, {"weight": [[0.5]]}).commit()
    pool.master.drop_slabs()
    pool.master.close()
    assert pool.master.model.weight.item() == 0.5


def test_no_file_is_left_open_when_all_is_closed(tmp_path: Path):
    gc.collect()
    before = psutil.Process().num_fds()
    pool = Pool(tmp_path, job_of(one_weight()))
    pool.bring(0, {"weight": [[1.0]]}).commit()
    pool.master.drop_slabs()
    pool.master.close()
    pool.master.close()
    del pool
    gc.collect()
    assert psutil.Process().num_fds() == before


def test_no_room_for_the_parameters_is_told():
    with pytest.raises(SpaceError, match=r"run-parameters needs 0\.0 MB of shared memory"):
        Master(job_of(one_weight()), folders=[], prefix="run", clip_norm=None)
