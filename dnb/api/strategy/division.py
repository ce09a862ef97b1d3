"""The division of a model over engines that `fit` finds and checks before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch

from dnb.engine.replicas.pipeline.micro_batches import model_inputs
from dnb.engine.replicas.sync_batch_norm import has_own_forward, normalizing_layers
from dnb.errors import ArgumentError, PlanError
from dnb.job import Data, Job
from dnb.partitioning.pipeline.partitions import pipelines, read_mesh, read_schedule, read_stages
from dnb.partitioning.tensor.partitions import tensor_partitions
from dnb.partitioning.tensor.trial import ModelTrial
from dnb.planning.search.plans import Plan
from dnb.pool.engine_pool import EnginePool
from dnb.progress import long_work
from dnb.protocol.run import Partition
from dnb.user_code.loader import fetch_batch
from dnb.user_code.model_call import arguments_of
from dnb.user_code.return_values import read_step

# Engines of a pipeline that may come later are planned for, too; more than a host of today holds.
MOST_ENGINES = 16
MOST_SYNCED = 64
# Samples with which a division of layers is tried out.
MOST_TRIED = 2


@dataclass(frozen=True, slots=True)
class ModelDivision:
    """The division of a run's model over engines.

    Args:
        partitions: over one engine of a team, over two, ...
        ties: parameters that more than one engine may use.
        stages: the user's own modules, if he gave some.
        num_teams: of engines, at the start.
        team_size: engines of a team; None: as many as there are.
        wanted: engines of a team that the user asked for.
    """

    partitions: tuple[Partition, ...]
    ties: tuple[str, ...]
    stages: Sequence[torch.nn.Module] | None
    num_teams: int
    team_size: int | None
    wanted: int | None

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        job: Job,
        data: Data,
        *,
        batch_size: int,
        exact: bool,
        transport: Any,
        keeps_cuts: bool = True,
    ) -> ModelDivision:
        """Divide a model as a plan says.

        Args:
            plan: for this model.
            job: as it is shipped.
            data: likewise.
            batch_size: samples of the global batch.
            exact: whether the run is.
            transport: of the run.
            keeps_cuts: else stages begin where they are about as heavy as each other.

        Raises:
            PlanError: the plan is for another model, or cannot be carried out.
        """
        plan.check(job.model)
        assert plan.partition is not None
        size = plan.partition.num_engines
        if batch_size != plan.batch_size:
            raise PlanError(
                f"the plan is for batches of {plan.batch_size} samples, not {batch_size}: give it batch_size"
            )
        return cls.of(
            job,
            data,
            strategy="pipeline",
            stages=None,
            schedule=plan.schedule,
            mesh={"data": plan.mesh.data, "pipeline": size},
            batch_size=batch_size,
            micro_batch=batch_size // plan.mesh.data // plan.num_micro_batches,
            exact=exact,
            transport=transport,
            planned=plan.partition if keeps_cuts else None,
        )

    @classmethod
    def of(  # noqa: PLR0913 - of one call of `fit`
        cls,
        job: Job,
        data: Data,
        *,
        strategy: str,
        stages: Sequence[str | torch.nn.Module] | None,
        schedule: str,
        mesh: str | Mapping[str, int] | None,
        batch_size: int,
        micro_batch: int | None,
        exact: bool,
        transport: Any,
        tensor_plan: Mapping[str, Any] | None = None,
        planned: Partition | None = None,
    ) -> ModelDivision:
        """Divide a model, or say why it cannot be.

        Raises:
            ArgumentError: schedule, stages or mesh are none.
            PlanError: the model or the batch cannot be divided so.
        """
        axes = read_mesh(mesh)
        if strategy == "tensor" or axes.get("tensor", 1) > 1:
            _refuse_what_no_team_can(strategy, axes, stages, batch_size=batch_size, exact=exact, transport=transport)
            return cls._of_tensors(job, data, axes, batch_size=batch_size, plan=tensor_plan)
        if tensor_plan is not None:
            raise PlanError("tensor_plan= divides layers: strategy='tensor', or mesh='data=2,tensor=2', does that")
        if strategy == "hybrid" and axes.get("pipeline", 1) < 2:
            raise PlanError(
                "a hybrid needs to know the size of its teams: mesh='data=2,pipeline=2' or mesh='data=2,tensor=2'"
            )
        _refuse_what_no_pipeline_can(job, exact=exact, transport=transport)
        num_teams = axes.get("data", 1)
        if batch_size % num_teams:
            raise PlanError(f"{num_teams} pipelines cannot share batches of {batch_size} samples evenly")
        wanted = axes.get("pipeline")
        own_stages = read_stages(job.model, stages)
        batch = fetch_batch(data.train, torch.arange(min(batch_size // num_teams, 8)))
        with long_work(f"finding where {type(job.model).__name__} can be cut"):
            partitions, ties = pipelines(
                job.model,
                model_inputs(job, batch),
                most_engines=wanted or MOST_ENGINES,
                num_samples=batch_size // num_teams,
                micro_batch=micro_batch,
                schedule=read_schedule(schedule),
                stages=own_stages,
                planned=planned,
            )
        if wanted is not None and len(partitions) < wanted:
            raise PlanError(
                f"{wanted} pipeline stages need as many layers: this model can be divided over {len(partitions)} "
                f"engines with schedule={schedule!r}, mesh='pipeline={len(partitions)}'"
            )
        team_size = wanted if num_teams > 1 else None
        return cls(partitions, ties, own_stages, num_teams, team_size, wanted)

    @classmethod
    def _of_tensors(
        cls, job: Job, data: Data, axes: Mapping[str, int], *, batch_size: int, plan: Mapping[str, Any] | None
    ) -> ModelDivision:
        """Divide the layers of a model."""
        batch = fetch_batch(data.train, torch.arange(min(batch_size, MOST_TRIED)))
        num_teams, wanted = axes.get("data", 1), axes.get("tensor")
        step: Callable[..., Any] | None = None if job.step is None else partial(_loss_of_step, job.step)
        if job.step is None and job.loss is None:
            step = _loss_of_model
        partitions = tensor_partitions(job.model, ModelTrial(batch, step=step, loss=job.loss), wanted=wanted, plan=plan)
        return cls(partitions, (), None, num_teams, wanted if num_teams > 1 else None, wanted)

    @classmethod
    def synced(
        cls, model: torch.nn.Module, *, wants_all: bool, strategy: str | Plan, exact: bool, transport: Any
    ) -> tuple[ModelDivision | None, str | Plan]:
        """Let all engines share every batch, if layers take statistics of all of it; return the strategy then, too.

        Args:
            model: with its layers.
            wants_all: whether every BatchNorm is to be such a layer.
            strategy: of the run.
            exact: likewise.
            transport: likewise.

        Raises:
            ArgumentError: the model has no BatchNorm.
            PlanError: it cannot be done so.
        """
        layers = normalizing_layers(model, all_of_them=wants_all)
        if not layers:
            if wants_all:
                raise ArgumentError("sync_batchnorm=True, and the model has no BatchNorm: leave it out")
            return None, strategy
        own = next(((name, type(layer).__name__) for name, layer in layers if has_own_forward(layer)), None)
        if own is not None:
            raise PlanError(
                f"{own[0]!r} is a {own[1]}, whose forward is its own: statistics of the whole batch are taken for "
                "nn.BatchNorm1d, 2d, 3d and nn.SyncBatchNorm"
            )
        what = "sync_batchnorm=True" if wants_all else f"{layers[0][0]!r} is a SyncBatchNorm, which"
        if strategy not in ("auto", "data"):
            raise PlanError(f"{what} shares every batch among all engines, not the model: strategy='data'")
        if exact:
            raise PlanError(
                f"{what} takes statistics over all engines, and exact=True computes each shard by itself: leave one out"
            )
        if transport not in (None, "memory"):
            raise PlanError(f"{what} needs engines that share the hub's memory: leave transport out")
        partitions = tuple(Partition(kind="synced", num_engines=number) for number in range(1, MOST_SYNCED + 1))
        return cls(partitions, (), None, 1, None, None), "data"

    def check_pool(self, pool: EnginePool) -> None:
        """Refuse a pool that has too few engines.

        Raises:
            PlanError: it has.
        """
        num_engines = len([engine for engine in pool.engines if engine.state != "spare"])
        needed = self.num_teams * (self.wanted or 1)
        if needed > num_engines:
            team, part = (
                ("pipeline", "stages") if self.partitions[-1].kind == "pipeline" else ("tensor team", "engines")
            )
            raise PlanError(
                f"{self.num_teams} {team}{'s' * (self.num_teams > 1)} of {self.wanted} {part} need {needed} engines, "
                f"and the pool has {num_engines}: %dtrain add {needed - num_engines}, or a smaller mesh"
            )

    def check_metrics(self, whole_metrics: Sequence[str]) -> None:
        """Refuse metrics of all samples at once where no engine has all outputs.

        Raises:
            PlanError: there is one.
        """
        if not whole_metrics:
            return
        why = f"metric {whole_metrics[0]!r} is computed of all samples at once, and"
        if self.num_teams > 1:
            raise PlanError(
                f"{why} {self.num_teams} teams have a part of each batch: use mesh= with one team, strategy='data', or "
                "leave it out"
            )
        if self.partitions[-1].kind == "synced":
            raise PlanError(
                f"{why} outputs are not gathered where BatchNorm takes statistics of all engines: use plain BatchNorm, "
                "or leave it out"
            )

    def for_loss(self, loss_over: str, *, micro_batch: int | None) -> ModelDivision:
        """Let pipelines compute all forwards first, if the loss looks at the whole batch; else nothing changes.

        Raises:
            PlanError: there are several teams, or a team goes through a batch in parts.
        """
        if loss_over == "samples":
            return self
        if self.num_teams > 1:
            raise PlanError(
                f"this loss looks at the whole batch, and {self.num_teams} teams have a part of it each: mesh= "
                "with one team, or strategy='data', which gathers outputs"
            )
        if self.partitions[-1].kind == "synced":
            raise PlanError(
                "this loss looks at the whole batch, whose outputs are not gathered where BatchNorm takes statistics "
                "of all engines: use plain BatchNorm, or loss_over='samples'"
            )
        if self.partitions[-1].kind == "pipeline":
            partitions = tuple(msgspec.structs.replace(each, schedule="gpipe") for each in self.partitions)
            return replace(self, partitions=partitions)
        if micro_batch is not None:
            raise PlanError(
                "this loss looks at the whole batch, of which a tensor team has all outputs at once: leave micro_batch "
                "out, or use strategy='data', which gathers outputs"
            )
        return self


def _refuse_what_no_team_can(
    strategy: str, axes: Mapping[str, int], stages: Any, *, batch_size: int, exact: bool, transport: Any
) -> None:
    """Refuse arguments that tensor parallelism cannot serve."""
    if axes.get("pipeline", 1) > 1 or stages is not None:
        raise PlanError(
            "pipeline stages whose layers are divided, too, are not in this release: mesh='data=2,tensor=2' or "
            "mesh='data=2,pipeline=2'"
        )
    if strategy == "pipeline":
        raise PlanError("a pipeline has no tensor axis: strategy='tensor', or mesh='pipeline=2'")
    if strategy == "hybrid" and axes.get("tensor", 1) < 2:
        raise PlanError("a hybrid needs to know the size of its teams: mesh='data=2,tensor=2'")
    if batch_size < axes.get("data", 1):
        raise PlanError(f"{axes['data']} tensor teams need as many samples in a batch, which has {batch_size}")
    if strategy == "tensor" and axes.get("data", 1) > 1 and "tensor" not in axes:
        raise PlanError("several tensor teams need to know their size: mesh='data=2,tensor=2'")
    if exact:
        raise PlanError(
            "exact=True needs a gradient per shard, and tensor parallelism has one per step, whose bits depend on the "
            "number of engines: leave exact out"
        )
    if transport not in (None, "memory"):
        raise PlanError("the engines of a tensor team share the hub's memory: leave transport out")


def _refuse_what_no_pipeline_can(job: Job, *, exact: bool, transport: Any) -> None:
    if job.step is not None:
        raise PlanError(
            "a pipeline cannot call a step function, as no engine has the whole model: give loss= instead of step="
        )
    if job.metrics and job.loss is None:
        raise PlanError(
            "a pipeline has only the loss of a model that returns its own, so that metrics cannot be computed: give "
            "loss=, or leave metrics out, or strategy='data'"
        )
    if job.val_step is not None:
        raise PlanError("a pipeline cannot call val_step, as no engine has the whole model: leave it out")
    if exact:
        raise PlanError(
            "exact=True needs a gradient per shard, and a pipeline has one per step: its bits depend on the number of "
            "micro-batches, not on the engines; leave exact out"
        )
    if transport not in (None, "memory"):
        raise PlanError("the engines of a pipeline share the hub's memory: leave transport out")


def _loss_of_model(model: torch.nn.Module, batch: Any) -> Any:
    given = arguments_of(model, batch, has_target=False)
    output = model(*given.positional, **given.keywords)
    return read_step(output, needs_gradient=torch.is_grad_enabled(), by="model")[0]


def _loss_of_step(step: Callable[..., Any], model: torch.nn.Module, batch: Any) -> Any:
    return read_step(step(model, batch), needs_gradient=torch.is_grad_enabled())[0]
