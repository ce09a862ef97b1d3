from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnb.errors import SpaceError
from dnb.hub.reducer import Contribution, Master, NotFinite, mean_of
from dnb.planning.sample_order import BatchOrder
from dnb.records import Sums
from dnb.transport.job import Job
from dnb.transport.layout import slot_views
from dnb.transport.parcels import pack, unpack
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
        loss: float = 0.5,
        weight: float | None = None,
        num_samples: int = 4,
        buffers: Mapping[str, Any] | None = None,
    ) -> Pool:
        """Put gradients and buffers into an engine's slab, and count its report."""
        memory = open_segment(self.master.add_slab(engine)).memory
        slab = slot_views(self.master.gradient_layout, memory)
        for name, gradient in slab.items():
            gradient.copy_(torch.as_tensor(gradients[name]))
        own = dict(self.master.model.named_buffers())
        for name, buffer in slot_views(self.master.buffer_layout, memory).items():
            buffer.copy_(torch.as_tensor((buffers or {}).get(name, own[name])))
        scale = num_samples if weight is None else weight
        sums = Sums(loss_total=loss * scale, loss_weight=scale, metric_totals={}, num_samples=num_samples)
        self._contributions.append(Contribution(engine, sums, is_sum=weight is not None))
        return self

    def commit(self):
        contributions, self._contributions = self._contributions, []
        return self.master.commit(contributions)


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


def test_slabs_are_added_in_the_order_of_the_engines(pool_of: MakePool):
    pool = pool_of(one_weight(0.0))
    large = 2.0**24  # the float32 above which 1 is lost
    for engine, gradient in [(2, -large), (1, 1.0), (0, large)]:
        pool.bring(engine, {"weight": [[gradient]]})
    pool.commit()
    assert pool.master.model.weight.item() == 0.0


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
    assert master.add_slab(3) == master.add_slab(3)


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
        num_samples=num_samples,
    )


def test_the_loss_is_the_mean_over_the_samples_of_all_parts():
    assert mean_of([part(3.0, 1), part(1.0, 3)])[0] == 1.0


def test_the_loss_of_a_sum_is_the_total_over_the_weights():
    assert mean_of([part(6.0, 2, weight=10.0), part(3.0, 2, weight=20.0)])[0] == 0.3


def test_metrics_are_means_over_the_samples_of_all_parts():
    assert mean_of([part(0.0, 1, accuracy=1.0), part(0.0, 3, accuracy=0.0)])[1] == {"accuracy": 0.25}


def test_a_part_without_samples_does_not_move_the_mean():
    assert mean_of([part(0.0, 0), part(2.0, 4, accuracy=4.0)]) == (0.5, {"accuracy": 1.0})


def test_a_loss_over_nothing_is_not_a_number():
    assert math.isnan(mean_of([part(0.0, 0)])[0])


def test_a_committed_step_tells_its_loss_learning_rate_and_samples(pool_of: MakePool):
    pool = pool_of(one_weight(), lr=0.125)
    pool.bring(0, {"weight": [[1.0]]}, loss=1.0, num_samples=1)
    result = pool.bring(1, {"weight": [[1.0]]}, loss=5.0, num_samples=3).commit()
    assert (result.loss, result.lr, result.num_samples) == (4.0, 0.125, 4)


def test_the_gradient_of_a_sum_is_divided_by_the_weight_of_all_engines(pool_of: MakePool):
    pool = pool_of(one_weight(1.0))
    pool.bring(0, {"weight": [[3.0]]}, weight=10.0).bring(1, {"weight": [[2.0]]}, weight=30.0).commit()
    assert pool.master.model.weight.item() == 0.875


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
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {i: s["exp_avg"].clone() for i, s in pool.master.optimizer.state_dict()["state"].items()}
    pool.bring(0, gradients, loss=math.nan, buffers={"1.running_mean": torch.ones(2)})
    with pytest.raises(NotFinite):
        pool.commit()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = pool.master.optimizer.state_dict()["state"]
    assert all(torch.equal(s["exp_avg"], moments[i]) for i, s in state.items())


def test_a_refused_step_does_not_step_the_scheduler(pool_of: MakePool):
    pool = pool_of(one_weight(), scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
    pool.bring(0, {"weight": [[1.0]]}, loss=math.nan)
    with pytest.raises(NotFinite):
        pool.commit()
    assert pool.master.optimizer.param_groups[0]["lr"] == 1.0


# clipping ----------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-7)


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
    pool = pool_of(Buffered(mean=torch.zeros(1)))
    pool.bring(0, {"weight": [0.0]}, num_samples=1, buffers={"mean": [4.0]})
    pool.bring(1, {"weight": [0.0]}, num_samples=3, buffers={"mean": [8.0]}).commit()
    assert pool.master.model.mean.item() == 7.0


def test_statistics_of_an_engine_without_samples_do_not_count(pool_of: MakePool):
    pool = pool_of(Buffered(mean=torch.zeros(1)))
    pool.bring(0, {"weight": [0.0]}, num_samples=0)
    pool.bring(1, {"weight": [0.0]}, num_samples=3, buffers={"mean": [8.0]}).commit()
    assert pool.master.model.mean.item() == 8.0


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
    pickled, ref, segment = pack((model, optimizer, scheduler), name="job", folders=[tmp_path])
    model, optimizer, scheduler = unpack(pickled, ref)
    segment.unlink()
    pool = pool_of(model, optimizer=optimizer, lr=None, scheduler=scheduler)
    rates = [pool.bring(0, {"weight": [[0.0]]}).commit().lr for _ in range(3)]
    assert rates == [1.0, 0.5, 0.25]


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


def test_no_room_for_the_parameters_is_told():
    with pytest.raises(SpaceError, match=r"run-parameters needs 0\.0 MB of shared memory"):
        Master(job_of(one_weight()), folders=[], prefix="run", clip_norm=None)
