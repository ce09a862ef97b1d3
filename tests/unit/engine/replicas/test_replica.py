from __future__ import annotations

import asyncio
import copy
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dnb.engine.replicas.outcome import WorkResult, part_seed
from dnb.engine.replicas.replica import Replica
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.runtime.bound_parameters import ModelChangedError, tensor_digest
from dnb.engine.runtime.run_memory import EngineMemory, Publisher
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.hub.parameters.master import Contribution, HubSlab, Master
from dnb.job import Data, DataSource, Job, Sum
from dnb.planning.sample_order import BatchOrder
from dnb.planning.shards import shard_bounds
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Load, WireOffer, Work
from dnb.protocol.measurements import Sums
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import RunSpec, TransportKind
from dnb.transport.layout import LARGE_ELEMENTS, slot_views
from dnb.transport.sockets.wires import Flat
from dnb.user_code.return_values import ReturnError

pytestmark = [pytest.mark.numeric, pytest.mark.float64]

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)
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


class Delivery:
    """In place of an outbox and a wire: pieces are in the hub's slabs at once, as they are when they are sent."""

    def __init__(self, slabs: list[HubSlab]) -> None:
        self._slabs = slabs

    def send_pieces(self, slot: int, source: Flat, ranges: Sequence[tuple[int, int]]) -> None:
        for first, last in ranges:
            self._slabs[slot].flat.memory[first:last] = source.memory[first:last]


class Engines:
    """A master copy, and engines with replicas of their own, in one process."""

    def __init__(self, folder: Path, job: Job, data: Data, *, transport: TransportKind, **numbers: Any) -> None:
        self.data = data
        self.job = job
        self.transport = transport
        self.spec = RunSpec(
            id="0",
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
                "exact": False,
                "transport": {"": transport},
                "telemetry": True,
                "micro_batch": None,
                "precision": "float32",
                "linger_seconds": 1.0,
                "notes": (),
                "sys_path": (),
                "job": NOTHING,
                "data": NOTHING,
                **numbers,
            },
        )
        self.master = Master(copy.deepcopy(job), folders=[folder], prefix="run", clip_norm=None)
        self.replicas: dict[int, Replica] = {}
        self.memories: dict[int, EngineMemory] = {}
        self.slabs: dict[int, dict[str, torch.Tensor]] = {}
        self.buffers: dict[int, dict[str, torch.Tensor]] = {}

    def replica(self, engine: int) -> Replica:
        if engine not in self.replicas:
            slabs = self.master.add_slabs(engine, NUM_SHARDS if self.spec.exact else 1, kind=self.transport)
            load = Load(
                run="run",
                transport=self.transport,
                wire=WireOffer(url="", token=""),
                parameters=self.master.parameters_ref,
                parameter_layout=self.master.parameter_layout,
                gradient_layout=self.master.gradient_layout,
                buffer_layout=self.master.buffer_layout,
            )
            memory = self.memories[engine] = EngineMemory(load)
            memory.add_slabs([slab.ref for slab in slabs])
            publisher = None
            if self.transport == "socket":
                delivery: Any = Delivery(slabs)
                publisher = Publisher(load.gradient_layout, load.buffer_layout.num_bytes, delivery)
                self.upload(engine)
            self.replicas[engine] = Replica(
                ReplicaContext(
                    spec=self.spec,
                    job=copy.deepcopy(self.job),
                    data=self.data,
                    load=load,
                    memory=memory,
                    stopwatch=Stopwatch(),
                    publisher=publisher,
                )
            )
            self.slabs[engine], self.buffers[engine] = self.views(engine, 0)
        return self.replicas[engine]

    def views(self, engine: int, slab: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradients and buffers as the hub sees them."""
        memory = self.master.slabs_of(engine)[slab].flat.memory
        return slot_views(self.master.gradient_layout, memory), slot_views(self.master.buffer_layout, memory)

    def upload(self, engine: int) -> None:
        """Bring the parameters to an engine that does not share them."""
        self.memories[engine].parameters[:] = self.master.parameters_flat.memory

    def compute(
        self,
        engine: int,
        *,
        shards: tuple[int, ...] = (0, 1, 2, 3),
        batch: torch.Tensor | None = None,
        kind: str = "step",
        step: int = 1,
        fresh: bool = True,
        first_slab: int = 0,
    ) -> WorkResult:
        """Let an engine compute shards of a batch, all samples if none is given."""
        replica = self.replica(engine)
        if self.transport == "socket":
            self.upload(engine)
        return replica.compute(*self.work(shards, batch, kind=kind, step=step, fresh=fresh, first_slab=first_slab))

    def place(self, engine: int, error: BaseException, *, kind: str = "step") -> str:
        """Where an engine that was given all samples finds that an error comes up again."""
        return self.replica(engine).find_place(*self.work(kind=kind), error)

    def work(
        self,
        shards: tuple[int, ...] = (0, 1, 2, 3),
        batch: torch.Tensor | None = None,
        *,
        kind: str = "step",
        step: int = 1,
        fresh: bool = True,
        first_slab: int = 0,
    ) -> tuple[Work, torch.Tensor]:
        batch = torch.arange(self.spec.num_samples) if batch is None else batch
        bounds = shard_bounds(len(batch), num_shards=NUM_SHARDS)
        parts = [batch[bounds[shard][0] : bounds[shard][1]] for shard in shards]
        work = Work(
            run="run",
            lease=1,
            kind=kind,
            step=step,
            shards=shards,
            shard_sizes=tuple(len(part) for part in parts),
            slabs=tuple(range(first_slab, first_slab + len(shards))) if self.spec.exact else (first_slab,),
            batch_samples=len(batch),
            fresh=fresh,
        )
        return work, torch.cat(parts)

    def diagnose(self, engine: int, *, shards: tuple[int, ...] = (0, 1, 2, 3), step: int = 1) -> Diagnosis:
        """Let an engine find the shard whose gradient is not finite."""
        bounds = shard_bounds(self.spec.num_samples, num_shards=NUM_SHARDS)
        parts = [torch.arange(*bounds[shard]) for shard in shards]
        request = Diagnose(
            run="run",
            step=step,
            shards=shards,
            shard_sizes=tuple(len(part) for part in parts),
            slab=0,
            batch_samples=self.spec.num_samples,
        )
        return self.replica(engine).diagnose(request, torch.cat(parts))

    def commit(self, *outcomes: tuple[int, WorkResult]):
        """Step with what engines brought."""
        return self.master.commit(
            [
                Contribution(engine, 0, number, outcome.parts[0], outcome.is_sum, outcome.unused)
                for number, (engine, outcome) in enumerate(outcomes)
            ]
        )

    def gradient(self, *engines: int) -> torch.Tensor:
        """What the hub would add up, as one vector."""
        return torch.stack([torch.cat([g.flatten() for g in self.slabs[e].values()]) for e in engines]).sum(0)

    def close(self) -> None:
        self.master.drop_slabs()
        self.master.close()


@pytest.fixture(params=["memory", "socket"])
def engines_of(tmp_path: Path, request: pytest.FixtureRequest):
    """Every claim holds whether engines share the hub's memory or are sent what they need."""
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
        data = Data(train=train or source, val=val or source)
        made.append(Engines(tmp_path, job, data, transport=request.param, **numbers))
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
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, *samples())) < 1e-10


def test_uneven_shards_add_up_to_the_plain_gradient(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1, 3))
    engines.compute(1, shards=(2,))
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, *samples())) < 1e-10


def test_shards_that_are_leased_again_are_added_to_the_slab(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1))
    engines.compute(0, shards=(2, 3), fresh=False)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-10


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
    outcome = engines.compute(0, shards=(0, 1), batch=torch.tensor([4]))
    (sums,) = outcome.parts
    assert (sums.loss_total, sums.loss_weight, sums.num_samples, outcome.is_sum) == (0.0, 0.0, 0, False)


def test_a_batch_smaller_than_the_shards_is_computed_whole(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model)
    engines.compute(0, shards=(0, 1), batch=torch.tensor([4, 7]))
    engines.compute(1, shards=(2, 3), batch=torch.tensor([4, 7]))
    x, y = samples()
    wanted = plain_gradient(model, x[[4, 7]], y[[4, 7]])
    assert relative_error(engines.gradient(0, 1), wanted) < 1e-10


def test_micro_batches_give_the_same_gradient(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model, micro_batch=3)
    engines.compute(0)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-10


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
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-10


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
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-10


def test_gradients_of_every_micro_batch_survive_zero_grad_in_the_users_step(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        model.zero_grad()
        return squared_error(model(batch[0]), batch[1])

    model = small_model()
    engines = engines_of(model, step=step, micro_batch=3)
    engines.compute(0)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-10


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
    engines.commit((0, engines.compute(0)))
    engines.compute(0, step=2)
    wanted = plain_gradient(engines.master.model, *samples())
    assert relative_error(engines.gradient(0), wanted) < 1e-10


@pytest.mark.usefixtures("float32")  # autocast leaves float64 alone
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
    (sums,) = engines.compute(0, shards=(0,)).parts
    assert (sums.loss_total, sums.loss_weight, sums.num_samples) == (5.0, 2.0, 2)


def test_metrics_are_reported_as_sums_over_samples(engines_of: MakeEngines):
    engines = engines_of(small_model(), metrics={"half": one_half}, micro_batch=4)
    assert engines.compute(0).parts[0].metric_totals == {"half": 5.0}


def test_metrics_of_a_step_function_are_reported_as_sums_over_samples(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=lambda model, batch: (model(batch[0]).mean(), {"half": torch.tensor(0.5)}))
    assert engines.compute(0).parts[0].metric_totals == {"half": 5.0}


def test_a_metric_is_weighed_by_its_samples(engines_of: MakeEngines):
    engines = engines_of(small_model(), metrics={"half": one_half}, micro_batch=4)
    assert engines.compute(0).parts[0].metric_weights == {"half": 10.0}


def test_a_metric_of_a_step_function_may_be_a_sum_with_a_weight_of_its_own(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).mean(), {"tokens": Sum(torch.tensor(3.0), 7.0)}

    engines = engines_of(small_model(), step=step, micro_batch=5)
    (sums,) = engines.compute(0).parts
    assert (sums.metric_totals, sums.metric_weights) == ({"tokens": 6.0}, {"tokens": 14.0})


def test_a_sum_is_reported_with_its_weight(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=lambda model, batch: Sum(0 * model(batch[0]).sum() + 12.0, 3.0))
    outcome = engines.compute(0)
    (sums,) = outcome.parts
    assert (sums.loss_total, sums.loss_weight, sums.num_samples, outcome.is_sum) == (12.0, 3.0, 10, True)


def test_a_sum_over_two_engines_gives_the_gradient_of_the_whole(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> Sum:
        x, y = batch
        weights = x[:, 0].abs()  # such as tokens that are not padding: another number on every engine
        return Sum(((model(x) - y).square().squeeze(1) * weights).sum(), float(weights.sum()))

    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    engines = engines_of(model, step=step)
    outcomes = [(e, engines.compute(e, shards=s)) for e, s in [(0, (0,)), (1, (1, 2, 3))]]
    x, y = samples()
    weights = x[:, 0].abs()
    loss = ((model(x) - y).square().squeeze(1) * weights).sum() / weights.sum()
    loss.backward()
    wanted = model.weight.detach() - 0.1 * model.weight.grad
    assert engines.commit(*outcomes).loss == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(engines.master.model.weight.detach(), wanted, rtol=1e-10, atol=1e-10)


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
    assert relative_error(engines.gradient(0), wanted) < 1e-10


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
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, x, y)) < 1e-10


def test_an_error_of_user_code_is_raised_as_it_is(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        raise IndexError("Target 12 is out of bounds.")

    with pytest.raises(IndexError, match=r"Target 12 is out of bounds\."):
        engines_of(small_model(), step=step).compute(0)


# random numbers -----------------------------------------------------------------------------------------------


def dropout_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 1))


@pytest.mark.usefixtures("float32")
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
    (sums,) = engines.compute(0, kind="evaluation").parts
    assert sums.loss_total / sums.num_samples == pytest.approx(squared_error(model(x[10:]), y[10:]).item(), rel=1e-10)


def test_an_evaluation_builds_no_graph(engines_of: MakeEngines):
    grads: list[bool] = []
    engines = engines_of(
        small_model(), step=lambda model, batch: grads.append(model(batch[0]).requires_grad) or model(batch[0]).mean()
    )
    engines.compute(0, kind="evaluation")
    assert grads == [False]


def test_an_evaluation_of_empty_shards_gives_zero_sums(engines_of: MakeEngines):
    (sums,) = engines_of(small_model()).compute(0, kind="evaluation", shards=(0,), batch=torch.tensor([3])).parts
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
    telemetry = engines.replica(0)._stopwatch.collect()
    assert telemetry.compute_seconds > 0
    assert telemetry.data_seconds > 0


# unused ---------------------------------------------------------------------------------------------------------


def two_heads() -> nn.Module:
    """A small and a large layer, of which a step may use one; the slots are a.weight, b.weight."""
    torch.manual_seed(0)
    heads = {"a": nn.Linear(3, 1, bias=False), "b": nn.Linear(3, LARGE_ELEMENTS, bias=False)}
    return nn.ModuleDict(heads)


def head(name: str) -> Callable[[Any, Any], torch.Tensor]:
    return lambda model, batch: model[name](batch[0]).mean()


@pytest.mark.parametrize(("name", "unused"), [("a", (1,)), ("b", (0,))])
def test_a_parameter_that_the_loss_does_not_use_is_reported(
    engines_of: MakeEngines, name: str, unused: tuple[int, ...]
):
    assert engines_of(two_heads(), step=head(name)).compute(0).unused == unused


@pytest.mark.parametrize(("name", "unused"), [("a", (1,)), ("b", (0,))])
def test_a_parameter_that_shards_added_later_do_not_use_is_reported(
    engines_of: MakeEngines, name: str, unused: tuple[int, ...]
):
    engines = engines_of(two_heads(), step=head(name))
    engines.compute(0, shards=(0, 1))
    assert engines.compute(0, shards=(2, 3), fresh=False).unused == unused


def test_a_parameter_that_one_of_two_micro_batches_uses_is_not_reported(engines_of: MakeEngines):
    names = iter(["a", "b"])
    engines = engines_of(two_heads(), step=lambda model, batch: head(next(names))(model, batch), micro_batch=5)
    assert engines.compute(0).unused == ()


def test_no_shards_use_no_parameters(engines_of: MakeEngines):
    assert engines_of(two_heads()).compute(0, shards=(0, 1), batch=torch.tensor([4])).unused in [(0, 1), (1, 0)]


def test_all_parameters_that_are_used_are_reported_as_such(engines_of: MakeEngines):
    assert engines_of(small_model()).compute(0).unused == ()


# exact ----------------------------------------------------------------------------------------------------------


def restless_model() -> nn.Module:
    """Everything that could tell who computed it: random numbers, statistics of the batch, running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, LARGE_ELEMENTS // 3 + 1),
        nn.BatchNorm1d(LARGE_ELEMENTS // 3 + 1),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Linear(LARGE_ELEMENTS // 3 + 1, 1),
    )


COMPANIES = pytest.mark.parametrize(
    "company",
    [((0, 1, 2, 3),), ((2,),), ((2, 3),), ((0, 2),), ((3, 2),), ((1,), (2,)), ((0, 1, 3), (2,))],
    ids=["all", "alone", "first", "last", "out of order", "later", "last of all"],
)


def slab_of_shard_2(
    engines: Engines, company: tuple[tuple[int, ...], ...], *, engine: int
) -> tuple[Sums, dict[str, torch.Tensor]]:
    """What an engine that computes shard 2 in this company brings of it."""
    first = 0
    for part in company:
        outcome = engines.compute(engine, shards=part, fresh=first == 0, first_slab=first)
        if 2 in part:
            number = part.index(2)
            gradients, buffers = engines.views(engine, first + number)
            found = {name: value.clone() for name, value in {**gradients, **buffers}.items()}
            return outcome.parts[number], found
        first += len(part)
    raise AssertionError("nobody computed shard 2")


@pytest.mark.usefixtures("float32")
@COMPANIES
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_a_shard_of_an_exact_run_is_equal_to_the_bit_in_any_company(
    engines_of: MakeEngines, company: tuple[tuple[int, ...], ...], micro_batch: int | None
):
    model = restless_model() if micro_batch is None else dropout_model()
    engines = engines_of(model, exact=True, micro_batch=micro_batch)
    sums, wanted = slab_of_shard_2(engines, ((0, 1, 2, 3),), engine=0)
    torch.rand(17)
    other_sums, found = slab_of_shard_2(engines, company, engine=1)
    assert other_sums == sums
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.usefixtures("float32")
def test_a_shard_of_an_exact_run_does_not_depend_on_what_its_engine_did_before(engines_of: MakeEngines):
    engines = engines_of(restless_model(), exact=True)
    sums, wanted = slab_of_shard_2(engines, ((2,),), engine=0)
    engines.compute(1, step=7)
    engines.compute(1, kind="evaluation")
    engines.compute(1, shards=(3, 1, 0), step=1)
    other_sums, found = slab_of_shard_2(engines, ((2,),), engine=1)
    assert other_sums == sums
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["random", "numpy"])
def test_random_numbers_of_any_kind_are_those_of_the_shard_in_an_exact_run(engines_of: MakeEngines, draw: Any):
    engines = engines_of(small_model(), step=lambda model, batch: model(batch[0]).mean() * draw(), exact=True)
    _, wanted = slab_of_shard_2(engines, ((0, 1, 2, 3),), engine=0)
    draw()
    _, found = slab_of_shard_2(engines, ((2,),), engine=1)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_every_shard_of_an_exact_run_has_a_slab_and_sums_of_its_own(engines_of: MakeEngines):
    engines = engines_of(small_model(), loss=two_and_a_half, exact=True)
    parts = engines.compute(0, shards=(3, 0)).parts
    assert [(sums.loss_total, sums.num_samples) for sums in parts] == [(7.5, 3), (5.0, 2)]


def test_the_slabs_of_an_exact_run_add_up_to_the_plain_gradient(engines_of: MakeEngines):
    model = small_model()
    engines = engines_of(model, exact=True)
    engines.compute(0)
    slabs = [engines.views(0, number)[0] for number in range(4)]
    found = sum(torch.cat([gradient.flatten() for gradient in slab.values()]) for slab in slabs)
    assert relative_error(found, plain_gradient(model, *samples())) < 1e-10


def test_a_shard_without_samples_has_a_slab_of_zeros(engines_of: MakeEngines):
    engines = engines_of(small_model(), exact=True)
    engines.compute(0)
    engines.compute(0, batch=torch.tensor([4]))
    assert [any(g.any() for g in engines.views(0, number)[0].values()) for number in range(4)] == [
        False,
        False,
        False,
        True,
    ]


def test_a_parameter_that_one_shard_uses_is_used(engines_of: MakeEngines):
    names = iter(["a", "a", "b", "a"])
    engines = engines_of(two_heads(), step=lambda model, batch: head(next(names))(model, batch), exact=True)
    assert engines.compute(0).unused == ()


def test_a_parameter_that_no_shard_uses_is_reported(engines_of: MakeEngines):
    assert engines_of(two_heads(), step=head("a"), exact=True).compute(0).unused == (1,)


# out of memory --------------------------------------------------------------------------------------------------


def allocate_too_much() -> None:
    torch.empty(10**15)  # 4 PB: the allocator's own error


class Greedy(nn.Module):
    """Has memory for so many samples at once, in forward."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            allocate_too_much()
        return x


class _GreedyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, most: int) -> torch.Tensor:
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if len(gradient) > ctx.most:
            allocate_too_much()
        return gradient, None


class GreedyBackward(Greedy):
    """Has memory for so many samples at once in backward, where half of the gradients are written by then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _GreedyBackward.apply(x, self.most)


def between_two_layers(layer: nn.Module) -> nn.Module:
    """One large layer before, one behind."""
    torch.manual_seed(0)
    width = LARGE_ELEMENTS // 3 + 1
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), layer, nn.Linear(width, 1), nn.Linear(1, 1))


GREEDY = pytest.mark.parametrize("kind", [Greedy, GreedyBackward], ids=["forward", "backward"])


@GREEDY
@pytest.mark.parametrize("most", [9, 4, 2, 1])
def test_a_batch_that_does_not_fit_gives_the_same_gradient_in_parts(engines_of: MakeEngines, kind: Any, most: int):
    engines = engines_of(between_two_layers(kind(most)))
    engines.compute(0)
    wanted = plain_gradient(between_two_layers(nn.Identity()), *samples())
    assert relative_error(in_order(engines), wanted) < 1e-10


@GREEDY
def test_a_batch_that_does_not_fit_gives_the_same_sums_in_parts(engines_of: MakeEngines, kind: Any):
    wanted = engines_of(between_two_layers(nn.Identity())).compute(0).parts[0]
    found = engines_of(between_two_layers(kind(3))).compute(0).parts[0]
    assert found.loss_total == pytest.approx(wanted.loss_total, rel=1e-10)
    assert (found.loss_weight, found.num_samples) == (10.0, 10)


@GREEDY
def test_shards_that_are_added_and_do_not_fit_keep_what_the_slab_held(engines_of: MakeEngines, kind: Any):
    engines = engines_of(between_two_layers(kind(4)))
    engines.compute(0, shards=(0,))
    first = engines.compute(0, shards=(1, 2, 3), fresh=False)
    wanted = plain_gradient(between_two_layers(nn.Identity()), *samples())
    assert first.note
    assert relative_error(in_order(engines), wanted) < 1e-10


@GREEDY
def test_sums_of_shards_that_are_added_and_do_not_fit_are_their_own(engines_of: MakeEngines, kind: Any):
    engines = engines_of(between_two_layers(kind(4)), loss=two_and_a_half)
    engines.compute(0, shards=(0,))
    (sums,) = engines.compute(0, shards=(1, 2, 3), fresh=False).parts
    assert (sums.loss_total, sums.num_samples) == (20.0, 8)


def test_shards_that_are_added_a_third_time_and_do_not_fit_keep_what_the_slab_held(engines_of: MakeEngines):
    engines = engines_of(between_two_layers(GreedyBackward(2)))
    engines.compute(0, shards=(0,))
    engines.compute(0, shards=(2,), fresh=False)
    engines.compute(0, shards=(1, 3), fresh=False)
    wanted = plain_gradient(between_two_layers(nn.Identity()), *samples())
    assert relative_error(in_order(engines), wanted) < 1e-10


def test_a_step_after_one_that_did_not_fit_does_not_hold_its_shards(engines_of: MakeEngines):
    engines = engines_of(between_two_layers(GreedyBackward(4)))
    engines.compute(0, shards=(0, 1, 2, 3))
    engines.compute(0, step=2)
    wanted = plain_gradient(between_two_layers(nn.Identity()), *samples())
    assert relative_error(in_order(engines), wanted) < 1e-10


def test_running_statistics_after_a_batch_that_did_not_fit_are_those_of_its_parts(engines_of: MakeEngines):
    wanted = engines_of(nn.Sequential(nn.BatchNorm1d(3), GreedyBackward(99), nn.Linear(3, 1)), micro_batch=5)
    wanted.compute(0)
    found = engines_of(nn.Sequential(nn.BatchNorm1d(3), GreedyBackward(5), nn.Linear(3, 1)))
    found.compute(0)
    assert torch.equal(found.buffers[0]["0.running_mean"], wanted.buffers[0]["0.running_mean"])


def test_what_did_not_fit_is_told_with_the_figures(engines_of: MakeEngines):
    note = engines_of(between_two_layers(Greedy(5))).compute(0).note
    assert note == "out of memory with 10 samples at once: goes on with 5"


def test_what_did_not_fit_once_is_not_tried_again(engines_of: MakeEngines):
    engines = engines_of(between_two_layers(Greedy(5)))
    engines.compute(0)
    assert engines.compute(0, step=2).note == ""


def test_an_evaluation_after_a_batch_that_did_not_fit_is_cut_too(engines_of: MakeEngines):
    engines = engines_of(between_two_layers(Greedy(5)))
    engines.compute(0)
    assert engines.compute(0, kind="evaluation").parts[0].num_samples == 10


def test_that_not_even_one_sample_fits_is_told(engines_of: MakeEngines):
    with pytest.raises(MemoryError, match=r"not even one sample fits: .*DefaultCPUAllocator"):
        engines_of(between_two_layers(Greedy(0))).compute(0)


def test_an_error_that_is_not_of_memory_is_not_tried_again(engines_of: MakeEngines):
    sizes: list[int] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        sizes.append(len(batch[0]))
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        engines_of(small_model(), step=step).compute(0)
    assert sizes == [10]


def in_order(engines: Engines) -> torch.Tensor:
    """The gradient of engine 0 in the order of the model's parameters; slots of small ones come first."""
    slab = engines.slabs[0]
    return torch.cat([slab[name].flatten() for name, _ in engines.master.model.named_parameters()])


# changed models -------------------------------------------------------------------------------------------------


def replacing(change: Callable[[nn.Module], None], *, in_call: int) -> Callable[[Any, Any], torch.Tensor]:
    calls: list[int] = []

    def step(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == in_call:
            change(model)
        return squared_error(model(batch[0]), batch[1])

    return step


def new_weight(model: Any) -> None:
    model[2].weight = nn.Parameter(torch.ones(1, 5))


def new_layer(model: Any) -> None:
    model[2] = nn.Linear(5, 7)


@pytest.mark.parametrize("in_call", [1, 2])
def test_a_parameter_that_was_replaced_is_refused_by_name(engines_of: MakeEngines, in_call: int):
    engines = engines_of(small_model(), step=replacing(new_weight, in_call=in_call))
    message = r"parameter '2\.weight' of shape \(1, 5\) was replaced while the run went on"
    with pytest.raises(ModelChangedError, match=message):  # noqa: PT012 - in which of the two calls is the parameter
        for step in (1, 2):
            engines.compute(0, step=step)


def test_a_parameter_that_was_replaced_by_one_of_another_shape_is_refused_with_both(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=replacing(new_layer, in_call=1))
    message = r"'2\.weight' of shape \(1, 5\) was replaced while the run went on, and now has shape \(7, 5\)"
    with pytest.raises(ModelChangedError, match=message):
        engines.compute(0)


def test_a_parameter_that_is_gone_is_refused_by_name(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=replacing(lambda model: model.pop(2), in_call=1))
    with pytest.raises(ModelChangedError, match=r"'2\.weight' of shape \(1, 5\) .* and is gone"):
        engines.compute(0)


def test_a_replaced_parameter_is_told_and_not_the_error_that_followed_from_it(engines_of: MakeEngines):
    def step(model: Any, batch: Any) -> torch.Tensor:
        model[2] = nn.Linear(4, 1)
        return squared_error(model(batch[0]), batch[1])

    with pytest.raises(ModelChangedError, match=r"parameter '2\.weight'"):
        engines_of(small_model(), step=step).compute(0)


def test_a_parameter_that_was_not_used_before_is_refused_when_it_is_replaced(engines_of: MakeEngines):
    calls: list[int] = []

    def step(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            model["b"] = nn.Linear(3, 1)
        return model["a"](batch[0]).mean() + (model["b"](batch[0]).mean() if len(calls) == 2 else 0.0)

    engines = engines_of(two_heads(), step=step)
    engines.compute(0)
    with pytest.raises(ModelChangedError, match=r"parameter 'b\.weight'"):
        engines.compute(0, step=2)


def test_a_parameter_that_is_not_used_is_no_changed_model(engines_of: MakeEngines):
    engines = engines_of(two_heads(), step=head("a"))
    assert [engines.compute(0, step=step).unused for step in (1, 2)] == [(1,), (1,)]


def test_values_that_are_changed_in_place_are_no_changed_model(engines_of: MakeEngines):
    def clip(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.clamp_(-9, 9)

    assert engines_of(small_model(), step=replacing(clip, in_call=1)).compute(0).unused == ()


def test_a_parameter_that_is_not_contiguous_gets_its_gradient(engines_of: MakeEngines):
    model = small_model()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    engines = engines_of(model)
    engines.compute(0)
    assert relative_error(engines.gradient(0), plain_gradient(model, *samples())) < 1e-10


# diagnosis ------------------------------------------------------------------------------------------------------


def with_a_bad_target(sample: int, value: float) -> DataSource:
    x, y = samples()
    y[sample] = value
    return DataSource(samples=(x, y), collate=None)


@pytest.mark.parametrize(("sample", "shard"), [(0, 0), (1, 0), (2, 1), (6, 2), (9, 3)])
def test_the_shard_whose_gradient_is_not_finite_is_found(engines_of: MakeEngines, sample: int, shard: int):
    engines = engines_of(small_model(), train=with_a_bad_target(sample, math.nan))
    engines.compute(0)
    assert engines.diagnose(0) == Diagnosis(run="run", step=1, shard=shard, parameter="0.weight", kind="NaN")


def test_an_infinite_gradient_is_told_from_one_that_is_not_a_number(engines_of: MakeEngines):
    engines = engines_of(nn.Linear(3, 1), train=with_a_bad_target(6, math.inf))
    engines.compute(0)
    assert engines.diagnose(0).kind == "inf"


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_parameter_whose_gradient_is_not_finite_is_named(engines_of: MakeEngines, name: str):
    def step(model: Any, batch: Any) -> torch.Tensor:
        other = {"a": "b", "b": "a"}[name]
        return model[other](batch[0]).mean() + (model[name](batch[0]) * batch[1]).mean()

    engines = engines_of(two_heads(), step=step, train=with_a_bad_target(6, math.nan))
    engines.compute(0)
    found = engines.diagnose(0)
    assert (found.shard, found.parameter) == (2, f"{name}.weight")


def test_only_the_shards_that_are_asked_for_are_looked_at(engines_of: MakeEngines):
    engines = engines_of(small_model(), train=with_a_bad_target(0, math.nan))
    engines.compute(0)
    assert engines.diagnose(0, shards=(1, 2)).shard is None


def test_a_gradient_that_is_finite_when_looked_at_again_is_nobodys(engines_of: MakeEngines):
    engines = engines_of(small_model())
    engines.compute(0)
    assert engines.diagnose(0) == Diagnosis(run="run", step=1, shard=None, parameter="", kind="")


@pytest.mark.parametrize("name", ["a", "b"])
def test_what_an_earlier_work_left_in_the_slab_is_not_taken_for_a_shards_gradient(engines_of: MakeEngines, name: str):
    """As with experts of which every sample uses one: shard 3 uses the one that is not finite, shard 0 does not."""
    other = {"a": "b", "b": "a"}[name]

    def step(model: Any, batch: Any) -> torch.Tensor:
        is_bad = batch[1].isnan().any()
        return (model[name](batch[0]) * batch[1]).mean() if is_bad else model[other](batch[0]).mean()

    engines = engines_of(two_heads(), step=step, train=with_a_bad_target(9, math.nan))
    engines.compute(0)
    found = engines.diagnose(0)
    assert (found.shard, found.parameter) == (3, f"{name}.weight")


def test_a_step_function_that_calls_zero_grad_is_diagnosed(engines_of: MakeEngines):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        model.zero_grad()
        return squared_error(model(batch[0]), batch[1])

    engines = engines_of(small_model(), step=step, train=with_a_bad_target(6, math.nan))
    engines.compute(0)
    assert engines.diagnose(0).shard == 2


def test_the_micro_batch_whose_gradient_is_not_finite_may_be_any_of_a_shard(engines_of: MakeEngines):
    engines = engines_of(small_model(), train=with_a_bad_target(6, math.nan), micro_batch=1)
    engines.compute(0)
    assert engines.diagnose(0).shard == 2


def test_dropout_is_that_of_the_shard_when_an_exact_step_is_diagnosed(engines_of: MakeEngines):
    masks: list[torch.Tensor] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        masks.append(model[1](torch.ones(64)))
        return model(batch[0]).mean()

    engines = engines_of(dropout_model(), step=step, exact=True)
    engines.compute(0)
    engines.diagnose(0)
    assert all(torch.equal(masks[shard], masks[4 + shard]) for shard in range(4))


# digests --------------------------------------------------------------------------------------------------------


def with_buffers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


def digests_of(engines: Engines, engine: int) -> list[int]:
    return list(memoryview(engines.replica(engine).digests()).cast("I"))


def names_of(engines: Engines) -> list[str]:
    return [slot.name for slot in engines.master.parameter_layout.slots]


def test_an_engines_copy_is_the_hubs(engines_of: MakeEngines):
    engines = engines_of(with_buffers())
    engines.commit((0, engines.compute(0)))
    engines.compute(0, step=2)
    ours = list(memoryview(engines.master.digests()[1]).cast("I"))
    wanted = ours if engines.transport == "socket" else [0] * len(ours)  # its memory is the hub's own
    assert digests_of(engines, 0) == wanted


def test_a_parameter_that_is_no_longer_the_hubs_has_a_digest_that_tells(engines_of: MakeEngines):
    engines = engines_of(with_buffers())
    before = digests_of(engines, 0)
    model = engines.replica(0)._job.model
    model[0].weight.data = model[0].weight.data + 1.0
    after = digests_of(engines, 0)
    names = names_of(engines)
    assert [names[index] for index in range(len(names)) if before[index] != after[index]] == ["0.weight"]


def test_the_digest_of_a_tensor_is_that_of_its_values_in_row_major_order():
    tensor = torch.arange(6.0).view(2, 3)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)


def test_the_digest_of_no_elements_is_0():
    assert tensor_digest(torch.empty(0, 3)) == 0


# what user code raises and returns ---------------------------------------------------------------------------


class PanicException(BaseException):  # as pyo3 has it
    """A Rust library panicked."""


class MuteError(RuntimeError):
    def __str__(self):
        raise RuntimeError("no")


class Raising:
    """A step function that raises when it sees one sample."""

    def __init__(self, sample: int, error: BaseException) -> None:
        self.marked = samples()[0][sample, 0]
        self.error = error

    def __call__(self, model, batch):
        if (batch[0][:, 0] == self.marked).any():
            raise self.error
        return squared_error(model(batch[0]), batch[1])


ERRORS = [
    PanicException("a Rust library panicked"),
    asyncio.CancelledError(),
    KeyboardInterrupt(),
    GeneratorExit(),
    SystemExit(3),
    StopIteration(),
    RecursionError("too deep"),
    MuteError(),
    BaseExceptionGroup("two", [KeyboardInterrupt(), ValueError()]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("numbers", [{}, {"exact": True}, {"micro_batch": 2}], ids=str)
def test_whatever_a_step_function_raises_comes_out_and_is_placed(engines_of: MakeEngines, error, numbers):
    engines = engines_of(small_model(), step=Raising(4, error), **numbers)
    with pytest.raises(type(error)) as caught:
        engines.compute(0)
    assert engines.place(0, caught.value) == "shard 1, sample 4"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_model_that_cannot_be_probed_is_not_probed_whatever_it_raises(engines_of: MakeEngines, error):
    engines = engines_of(small_model(), step=Raising(4, error))
    assert engines.replica(0).probe() is None


def test_the_place_of_a_failed_evaluation_is_looked_for_without_gradients(engines_of: MakeEngines):
    def step(model, batch):
        if len(batch[0]) and (batch[0][:, 0] == samples()[0][7, 0]).any() and not torch.is_grad_enabled():
            raise ValueError("only in evaluations")
        return float(squared_error(model(batch[0]), batch[1]).detach())

    engines = engines_of(small_model(), step=step)
    with pytest.raises(ValueError, match="only in evaluations") as caught:
        engines.compute(0, kind="evaluation")
    assert engines.place(0, caught.value, kind="evaluation") == "shard 3, sample 7"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: None, "not None"),
        (lambda loss: loss.item(), "not the float .*, from which no gradient comes"),
        (lambda loss: loss.detach(), "without a gradient"),
        (lambda loss: loss * torch.ones(10), r"shape \(10,\): take its mean"),
        (lambda loss: loss.to(torch.complex64), "a tensor of complex64"),
    ],
)
@pytest.mark.parametrize("numbers", [{}, {"exact": True}], ids=str)
def test_a_step_that_returns_no_loss_is_told_before_anything_is_added(engines_of: MakeEngines, change, told, numbers):
    engines = engines_of(
        small_model(), step=lambda model, batch: change(squared_error(model(batch[0]), batch[1])), **numbers
    )
    with pytest.raises(ReturnError, match=f"^step must return the loss .*{told}") as caught:
        engines.compute(0)
    assert engines.gradient(0).abs().max() == 0.0
    assert engines.place(0, caught.value).startswith("shard 0, sample")  # a tensor of one sample may be a loss


def test_a_loss_function_that_returns_no_mean_is_told(engines_of: MakeEngines):
    engines = engines_of(small_model(), loss=lambda output, target: (output - target).square())
    with pytest.raises(ReturnError, match=r"^loss must return a tensor of one number, .* shape \(10, 1\): take its"):
        engines.compute(0)


@pytest.mark.parametrize(
    "shape",
    [lambda output, loss: (output, loss), lambda output, loss: {"loss": loss, "logits": output}],
    ids=["tuple", "mapping"],
)
def test_a_step_may_return_its_loss_as_models_do(engines_of: MakeEngines, shape):
    def step(model, batch):
        output = model(batch[0])
        return shape(output, squared_error(output, batch[1]))

    model = small_model()
    engines = engines_of(model, step=step)
    engines.compute(0, shards=(0, 1))
    engines.compute(1, shards=(2, 3))
    assert relative_error(engines.gradient(0, 1), plain_gradient(model, *samples())) < 1e-10
    assert sum(part.num_samples for part in engines.compute(0, kind="evaluation").parts) == 10


def test_a_metric_that_only_some_parts_have_is_a_mean_over_those(engines_of: MakeEngines):
    def step(model, batch):
        loss = squared_error(model(batch[0]), batch[1])
        return (loss, {"first": 2.0}) if (batch[0][:, 0] == samples()[0][0, 0]).any() else loss

    engines = engines_of(small_model(), step=step, micro_batch=4)
    (sums,) = engines.compute(0).parts
    assert (sums.metric_totals, sums.metric_weights) == ({"first": 8.0}, {"first": 4.0})


@pytest.mark.parametrize("numbers", [{"exact": True}, {"micro_batch": 4}], ids=str)
def test_a_step_that_returns_a_sum_for_some_parts_and_a_mean_for_others_is_refused(engines_of: MakeEngines, numbers):
    def step(model, batch):
        loss = squared_error(model(batch[0]), batch[1])
        return Sum(loss * len(batch[0]), len(batch[0])) if (batch[0][:, 0] == samples()[0][0, 0]).any() else loss

    engines = engines_of(small_model(), step=step, **numbers)
    with pytest.raises(ReturnError, match=r"a step, or for none: it did for 1 of [34] parts"):
        engines.compute(0)


def test_a_mended_step_function_may_bear_other_metrics(engines_of: MakeEngines):
    engines = engines_of(small_model(), step=lambda model, batch: (model(batch[0]).mean(), {"a": 1.0}))
    engines.compute(0)
    engines.replica(0).replace_functions(step=lambda model, batch: (model(batch[0]).mean(), {"b": 1.0}), loss=None)
    assert engines.compute(0).parts[0].metric_totals == {"b": 10.0}
