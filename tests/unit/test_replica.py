from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnb.engine.replica import Replica, part_seed
from dnb.engine.telemetry import Stopwatch
from dnb.hub.reducer import Contribution, Master
from dnb.planning.sample_order import BatchOrder
from dnb.planning.shards import shard_bounds
from dnb.records import Load, ParcelRef, RunSpec, Sums, Work
from dnb.transport.job import Data, DataSource, Job, Sum
from dnb.transport.layout import slot_views
from dnb.transport.segments import open_segment

NOTHING = ParcelRef(buffers=(), arrays=(), segment=None)
NUM_SHARDS = 4


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def samples(num_samples: int = 10, num_features: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_samples, num_features, generator=generator),
        torch.randn(num_samples, 1, generator=generator),
    )


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def two_and_a_half(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0 * output.sum() + 2.5


def one_half(output: torch.Tensor, target: torch.Tensor) -> float:
    return 0.5


class Engines:
    """A master copy, and engines with replicas of their own, in one process."""

    def __init__(self, folder: Path, job: Job, data: Data, **numbers: Any) -> None:
        self.data = data
        self.job = job
        self.spec = RunSpec(
            **{
                "name": "run",
                "folder": str(folder),
                "num_samples": 10,
                "num_val_samples": 10,
                "num_steps": 1,
                "steps_per_epoch": 1,
                "batch_size": 10,
                "num_shards": NUM_SHARDS,
                "seed": 5,
                "clip_norm": None,
                "micro_batch": None,
                "precision": "float32",
                "linger_seconds": 1.0,
                "notes": (),
                "sys_path": (),
                "job": NOTHING,
                "data": NOTHING,
                **numbers,
            }
        )
        self.master = Master(copy.deepcopy(job), folders=[folder], prefix="run", clip_norm=None)
        self.replicas: dict[int, Replica] = {}
        self.slabs: dict[int, dict[str, torch.Tensor]] = {}
        self.buffers: dict[int, dict[str, torch.Tensor]] = {}

    def replica(self, engine: int) -> Replica:
        if engine not in self.replicas:
            slab = self.master.add_slab(engine)
            load = Load(
                run="run",
                parameters=self.master.parameters_ref,
                parameter_layout=self.master.parameter_layout,
                slab=slab,
                gradient_layout=self.master.gradient_layout,
                buffer_layout=self.master.buffer_layout,
            )
            self.replicas[engine] = Replica(self.spec, copy.deepcopy(self.job), self.data, load, Stopwatch())
            memory = open_segment(slab).memory
            self.slabs[engine] = slot_views(self.master.gradient_layout, memory)
            self.buffers[engine] = slot_views(self.master.buffer_layout, memory)
        return self.replicas[engine]

    def compute(
        self,
        engine: int,
        *,
        shards: tuple[int, ...] = (0, 1, 2, 3),
        batch: torch.Tensor | None = None,
        kind: str = "step",
        step: int = 1,
        fresh: bool = True,
    ) -> tuple[Sums, bool]:
        """Let an engine compute shards of a batch, all samples if none is given."""
        batch = torch.arange(self.spec.num_samples) if batch is None else batch
        bounds = shard_bounds(len(batch), num_shards=NUM_SHARDS)
        parts = [batch[bounds[shard][0] : bounds[shard][1]] for shard in shards]
        work = Work(
            run="run",
            kind=kind,
            step=step,
            shards=shards,
            shard_sizes=tuple(len(part) for part in parts),
            batch_samples=len(batch),
            fresh=fresh,
        )
        return self.replica(engine).compute(work, torch.cat(parts))

    def gradient(self, *engines: int) -> torch.Tensor:
        """What the hub would add up, as one vector."""
        return torch.stack([torch.cat([g.flatten() for g in self.slabs[e].values()]) for e in engines]).sum(0)

    def close(self) -> None:
        self.master.drop_slabs()
        self.master.close()


@pytest.fixture
def engines_of(tmp_path: Path):
    made: list[Engines] = []

    def make(
        model: nn.Module,
        *,
        loss: Any = squared_error,
        step: Any = None,
        metrics: Any = None,
        train: DataSource | None = None,
        val: DataSource | None = None,
        **numbers: Any,
    ) -> Engines:
        source = DataSource(samples=samples(), collate=None)
        job = Job(
            model=model,
            loss=None if step is not None else loss,
            step=step,
            metrics=metrics or {},
            optimizer="sgd",
            lr=0.1,
            scheduler=None,
            order=BatchOrder(num_samples=10, batch_size=10),
        )
        made.append(Engines(tmp_path, job, Data(train=train or source, val=val or source), **numbers))
        return made[-1]

    yield make
    for engines in made:
        engines.close()


MakeEngines = Callable[..., Engines]


def plain_gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What one process computes for the whole batch."""
    model = copy.deepcopy(model)
    squared_error(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# gradients -------------------------------------------------------------------------------------------


def test_gradients_of_shards_over_two_engines_add_up_to_the_plain_gradient(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1))
    engines.compute(1, shards=(2, 3))
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, *samples())) < 1e-7


def test_uneven_shards_add_up_to_the_plain_gradient(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1, 3))
    engines.compute(1, shards=(2,))
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, *samples())) < 1e-7


def test_shards_that_are_leased_again_are_added_to_the_slab(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1))
    engines.compute(0, shards=(2, 3), fresh=False)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-7


def test_a_fresh_part_starts_from_a_zeroed_slab(engines_of: MakeEngines):
    engines = engines_of(small_model())
    engines.compute(0)
    once = engines.gradient(0)
    engines.compute(0)
    assert torch.equal(engines.gradient(0), once)


def test_a_part_of_empty_shards_gives_zero_gradients(engines_of: MakeEngines):
    engines = engines_of(small_model())
    engines.compute(0)
    engines.compute(0, shards=(0, 1), batch=torch.tensor([4]))
    assert engines.gradient(0).abs().max() == 0.0


def test_a_part_of_empty_shards_gives_zero_sums(engines_of: MakeEngines):
    engines = engines_of(small_model())
    sums, is_sum = engines.compute(0, shards=(0, 1), batch=torch.tensor([4]))
    assert (sums.loss_total, sums.loss_weight, sums.num_samples, is_sum) == (0.0, 0.0, 0, False)


def test_a_batch_smaller_than_the_shards_is_computed_whole(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1), batch=torch.tensor([4, 7]))
    engines.compute(1, shards=(2, 3), batch=torch.tensor([4, 7]))
    x, y = samples()
    wanted = plain_gradient(model, x[[4, 7]], y[[4, 7]])
    assert relative_error(engines.gradient(0, 1), wanted) < 1e-7


def test_micro_batches_give_the_same_gradient(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model, micro_batch=3)
    engines.compute(0)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-6


def test_no_forward_sees_more_than_a_micro_batch(engines_of: MakeEngines):
    sizes: list[int] = []
    engines = engines_of(
        small_model(), step=lambda model, batch: sizes.append(len(batch[0])) or model(batch[0]).mean(), micro_batch=4
    )
    engines.compute(0)
    assert sizes == [4, 4, 2]


def test_tied_weights_get_the_gradient_of_both_uses(engines_of: MakeEngines):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    model[2].weight = model[0].weight
    engines = engines_of(model)
    engines.compute(0)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-7


def test_a_frozen_parameter_has_no_gradient(engines_of: MakeEngines):
    model = small_model()
    model[0].weight.requires_grad_(False)
    engines = engines_of(model)
    engines.compute(0)
    assert list(engines.slabs[0]) == ["0.bias", "2.weight", "2.bias"]


def test_a_parameter_that_the_loss_does_not_use_has_a_zero_gradient(engines_of: MakeEngines):
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "spare": nn.Linear(3, 1)})
    engines = engines_of(model, step=lambda model, batch: model["used"](batch[0]).mean())
    engines.compute(0)
    assert engines.slabs[0]["spare.weight"].tolist() == [[0.0, 0.0, 0.0]]


def test_gradients_survive_zero_grad_in_the_users_step(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return squared_error(model(batch[0]), batch[1])

    model = small_model()
    engines = engines_of(model, step=step)
    engines.compute(0, shards=(0, 1))
    engines.compute(0, shards=(2, 3), fresh=False)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-7


def test_gradients_are_born_in_the_slab(engines_of: MakeEngines):
    pointers: list[int] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        pointers.append(model[0].weight.grad.data_ptr())
        return squared_error(model(batch[0]), batch[1])

    engines = engines_of(small_model(), step=step, micro_batch=5)
    engines.compute(0)
    assert pointers[0] == pointers[1]


def test_parameters_of_the_next_step_are_those_the_hub_committed(engines_of: MakeEngines):
    engines = engines_of(nn.Linear(3, 1))
    sums, is_sum = engines.compute(0)
    engines.master.commit([Contribution(0, sums, is_sum)])
    engines.compute(0, step=2)
    wanted = plain_gradient(engines.master.model, *samples())
    assert relative_error(engines.gradient(0), wanted) < 1e-7


def test_half_a_precision_is_only_in_the_forward(engines_of: MakeEngines):
    dtypes: list[torch.dtype] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        dtypes.append(output.dtype)
        return squared_error(output, target)

    engines = engines_of(small_model(), loss=loss, precision="bfloat16")
    engines.compute(0)
    assert dtypes == [torch.bfloat16]
    assert engines.slabs[0]["0.weight"].dtype == torch.float32


# losses and metrics -----------------------------------------------------------------------------------------


def test_the_loss_is_reported_as_a_sum_over_samples(engines_of: MakeEngines):
    engines = engines_of(small_model(), loss=two_and_a_half)
    sums, _ = engines.compute(0, shards=(0,))
    assert (sums.loss_total, sums.loss_weight, sums.num_samples) == (5.0, 2.0, 2)


def test_metrics_are_reported_as_sums_over_samples(engines_of: MakeEngines):
    engines = engines_of(small_model(), metrics={"half": one_half}, micro_batch=4)
    assert engines.compute(0)[0].metric_totals == {"half": 5.0}


def test_metrics_of_a_step_function_are_reported_as_sums_over_samples(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=lambda model, batch: (model(batch[0]).mean(), {"half": torch.tensor(0.5)}))
    assert engines.compute(0)[0].metric_totals == {"half": 5.0}


def test_a_sum_is_reported_with_its_weight(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=lambda model, batch: Sum(0 * model(batch[0]).sum() + 12.0, 3.0))
    sums, is_sum = engines.compute(0)
    assert (sums.loss_total, sums.loss_weight, sums.num_samples, is_sum) == (12.0, 3.0, 10, True)


def test_a_sum_over_two_engines_gives_the_gradient_of_the_whole(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> Sum:
        x, y = batch
        weights = x[:, 0].abs()  # such as tokens that are not padding: another number on every engine
        return Sum(((model(x) - y).square().squeeze(1) * weights).sum(), float(weights.sum()))

    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    engines = engines_of(model, step=step)
    contributions = [Contribution(e, *engines.compute(e, shards=s)) for e, s in [(0, (0,)), (1, (1, 2, 3))]]
    x, y = samples()
    weights = x[:, 0].abs()
    loss = ((model(x) - y).square().squeeze(1) * weights).sum() / weights.sum()
    loss.backward()
    wanted = model.weight.detach() - 0.1 * model.weight.grad
    assert engines.master.commit(contributions).loss == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(engines.master.model.weight.detach(), wanted, rtol=1e-6, atol=1e-7)


class ModelWithLoss(nn.Module):
    """Like a transformer of Hugging Face: a dictionary in, an object with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return _Output(squared_error(self.body(x), labels))


class _Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def test_a_model_that_takes_dictionaries_returns_its_own_loss(engines_of: MakeEngines):
    x, y = samples()
    rows = [{"x": x[i], "labels": y[i]} for i in range(10)]
    source = DataSource(samples=rows, collate=torch.utils.data.default_collate)
    torch.manual_seed(0)
    model = ModelWithLoss()
    engines = engines_of(model, loss=None, train=source)
    engines.compute(0)
    wanted = plain_gradient(model.body, x, y)
    assert relative_error(engines.gradient(0), wanted) < 1e-6


def test_a_batch_whose_first_axis_is_time_is_weighed_by_its_samples(engines_of: MakeEngines):
    def collate(rows: list[Any]) -> Any:
        x, y = zip(*rows, strict=True)
        return torch.stack(x, dim=1), torch.stack(y)  # (features, batch)

    x, y = samples()
    source = DataSource(samples=list(zip(x, y, strict=True)), collate=collate)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    engines = engines_of(model, step=lambda m, batch: squared_error(m(batch[0].T), batch[1]), train=source)
    engines.compute(0, shards=(0, 1))
    engines.compute(1, shards=(2, 3))
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, x, y)) < 1e-6


def test_an_error_of_user_code_is_raised_as_it_is(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        raise IndexError("Target 12 is out of bounds.")

    with pytest.raises(IndexError, match=r"Target 12 is out of bounds\."):
        engines_of(small_model(), step=step).compute(0)


# random numbers -----------------------------------------------------------------------------------------------


def dropout_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 1))


def test_dropout_does_not_depend_on_the_engine(engines_of: MakeEngines):
    engines = engines_of(dropout_model())
    engines.compute(0, shards=(2, 3))
    torch.rand(17)
    engines.compute(1, shards=(2, 3))
    assert torch.equal(engines.gradient(0), engines.gradient(1))


def test_dropout_differs_from_step_to_step(engines_of: MakeEngines):
    engines = engines_of(dropout_model())
    engines.compute(0, step=1)
    engines.compute(1, step=2)
    assert not torch.equal(engines.gradient(0), engines.gradient(1))


def test_dropout_differs_from_shard_to_shard(engines_of: MakeEngines):
    masks: list[torch.Tensor] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        masks.append(model[1](torch.ones(64)))
        return model(batch[0]).mean()

    engines = engines_of(dropout_model(), step=step)
    engines.compute(0, shards=(0, 1))
    engines.compute(1, shards=(2, 3))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("other", [(6, 1, 0), (5, 2, 0), (5, 1, 1)], ids=["seed", "step", "shard"])
def test_the_seed_of_a_part_depends_on_each_of_seed_step_and_shard(other: tuple[int, int, int]):
    assert part_seed(*other) != part_seed(5, 1, 0)


def test_the_seed_of_a_part_is_one_that_torch_takes():
    assert all(0 <= part_seed(0, step, 0) < 2**63 for step in range(100))


# evaluation -----------------------------------------------------------------------------------------------------


def test_an_evaluation_leaves_the_gradients_in_the_slab(engines_of: MakeEngines):
    engines = engines_of(small_model())
    engines.compute(0)
    before = engines.gradient(0)
    engines.compute(0, kind="evaluation", fresh=True)
    assert torch.equal(engines.gradient(0), before)


def modes_seen(engines_of: MakeEngines, *kinds: str) -> list[bool]:
    modes: list[bool] = []
    engines = engines_of(
        small_model(), step=lambda model, batch: modes.append(model.training) or model(batch[0]).mean()
    )
    for kind in kinds:
        engines.compute(0, kind=kind)
    return modes


def test_an_evaluation_is_not_in_training_mode(engines_of: MakeEngines):
    assert modes_seen(engines_of, "evaluation") == [False]


def test_a_step_after_an_evaluation_is_in_training_mode_again(engines_of: MakeEngines):
    assert modes_seen(engines_of, "step", "evaluation", "step") == [True, False, True]


def test_an_evaluation_computes_the_loss_of_the_validation_data(engines_of: MakeEngines):
    x, y = samples(20)
    model = small_model()
    engines = engines_of(model, val=DataSource(samples=(x[10:], y[10:]), collate=None))
    sums, _ = engines.compute(0, kind="evaluation")
    assert sums.loss_total / sums.num_samples == pytest.approx(squared_error(model(x[10:]), y[10:]).item(), rel=1e-6)


def test_an_evaluation_builds_no_graph(engines_of: MakeEngines):
    grads: list[bool] = []
    engines = engines_of(
        small_model(), step=lambda model, batch: grads.append(model(batch[0]).requires_grad) or model(batch[0]).mean()
    )
    engines.compute(0, kind="evaluation")
    assert grads == [False]


def test_an_evaluation_of_empty_shards_gives_zero_sums(engines_of: MakeEngines):
    sums, _ = engines_of(small_model()).compute(0, kind="evaluation", shards=(0,), batch=torch.tensor([3]))
    assert (sums.loss_total, sums.num_samples) == (0.0, 0)


def test_an_evaluation_leaves_running_statistics(engines_of: MakeEngines):
    engines = engines_of(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    engines.compute(0, kind="evaluation")
    assert engines.buffers[0]["0.running_mean"].tolist() == [0.0, 0.0, 0.0]


# buffers --------------------------------------------------------------------------------------------------------


def test_running_statistics_come_home_in_the_slab(engines_of: MakeEngines):
    engines = engines_of(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    engines.compute(0)
    torch.testing.assert_close(engines.buffers[0]["0.running_mean"], 0.1 * samples()[0].mean(0))


class ReplacesItsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1.0
        return self.body(x)


def test_a_buffer_that_forward_replaces_comes_home(engines_of: MakeEngines):
    engines = engines_of(ReplacesItsBuffer())
    engines.compute(0)
    assert engines.buffers[0]["count"].item() == 1.0


def test_a_replaced_buffer_starts_the_next_part_from_the_master(engines_of: MakeEngines):
    engines = engines_of(ReplacesItsBuffer())
    engines.compute(0)
    engines.compute(0, step=2)
    assert engines.buffers[0]["count"].item() == 1.0


def test_the_model_does_not_keep_a_buffer_of_a_step_that_was_not_committed(engines_of: MakeEngines):
    engines = engines_of(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    engines.compute(0)
    engines.compute(0)
    torch.testing.assert_close(engines.buffers[0]["0.running_mean"], 0.1 * samples()[0].mean(0))


# accounts -------------------------------------------------------------------------------------------------------


def test_time_is_counted_for_data_and_compute(engines_of: MakeEngines):
    engines = engines_of(small_model())
    engines.compute(0)
    telemetry = engines.replica(0)._stopwatch.take()
    assert telemetry.compute_seconds > 0
    assert telemetry.data_seconds > 0
