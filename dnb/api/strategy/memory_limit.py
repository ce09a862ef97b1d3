"""`memory_limit`: what an engine may hold of a model, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch

from dnb.api.strategy.division import ModelDivision
from dnb.engine.replicas.pipeline.micro_batches import model_inputs
from dnb.errors import PlanError
from dnb.job import Data, Job
from dnb.partitioning.pipeline.dry_run import no_autocast
from dnb.partitioning.pipeline.flop_counts import balanced_cuts
from dnb.partitioning.pipeline.memory_estimate import Loss, Need, needs_of, whole_need
from dnb.partitioning.pipeline.partitions import ties_of
from dnb.partitioning.pipeline.stage_builder import StageBuilder
from dnb.partitioning.pipeline.traced_forward import follow_once
from dnb.planning.search.plans import Plan
from dnb.protocol.run import Partition
from dnb.units import amount
from dnb.user_code.loader import fetch_batch

# Where memory is short, stages are alike only if they are equal.
EXACTLY = 1e-9


class Limit:
    """The memory that may be held on each engine, and the model that is to be held.

    Args:
        num_bytes: of parameters, gradients, activations and inputs, as `dnb.plan` counts them: without what a process
            with torch needs anyway.
        job: with the model.
        data: whose first samples show the shapes.
        batch_size: samples of the global batch.
        precision: of forwards.
    """

    def __init__(self, num_bytes: int, job: Job, data: Data, *, batch_size: int, precision: str) -> None:
        self._num_bytes = num_bytes
        self._job = job
        self._data = data
        self._batch_size = batch_size
        self._autocast = no_autocast if precision == "float32" else partial(torch.autocast, "cpu", dtype=torch.bfloat16)

    def settle(
        self, division: ModelDivision | None, plan: Plan | None, *, num_engines: int, micro_batch: int | None
    ) -> ModelDivision | None:
        """Return the division under this limit, perhaps cut elsewhere.

        Args:
            division: None: every engine has the whole model.
            plan: that the run follows, if it follows one.
            num_engines: that are there.
            micro_batch: as of `fit`.

        Raises:
            PlanError: it does not fit; with the figures, and what would do.
        """
        if plan is not None:
            self.check_plan(plan)
        elif division is None:
            self.check_whole(num_engines=num_engines, micro_batch=micro_batch)
        if division is None or any(partition.kind != "pipeline" for partition in division.partitions):
            return division
        return self.within(division, num_engines=division.team_size or num_engines, is_settled=plan is not None)

    def check_whole(self, *, num_engines: int, micro_batch: int | None) -> None:
        """Refuse a model of which no engine can hold all.

        Raises:
            PlanError: with the figures, and what would do.
        """
        samples = min(math.ceil(self._batch_size / num_engines), micro_batch or self._batch_size)
        batch = self._batch_of(samples)
        inputs = model_inputs(self._job, batch)
        need = whole_need(self._job.model, inputs, loss=self._loss(batch), autocast=self._autocast)
        if need.num_bytes > self._num_bytes:
            raise PlanError(
                f"{self._name} does not fit: every engine would need {_in_words(need)} for {samples} of the batch's "
                f"{self._batch_size} samples, and memory_limit is {amount(self._num_bytes)}; "
                f"{self._way_out(need, micro_batch=micro_batch)}"
            )

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that needs more.

        Raises:
            PlanError: with the figures.
        """
        worst = max(plan.stages, key=lambda stage: stage.memory_bytes)
        if worst.memory_bytes > self._num_bytes:
            raise PlanError(
                f"the plan needs {amount(worst.memory_bytes)} on engine {worst.engines[0]}, and memory_limit is "
                f"{amount(self._num_bytes)}: dnb.plan(model, batch, memory_limit={self._num_bytes}) looks for one "
                "that fits"
            )

    def within(self, division: ModelDivision, *, num_engines: int, is_settled: bool) -> ModelDivision:
        """Return the division without the pipelines that are too short, and with cuts that fit if even ones do not.

        Args:
            division: as found without a limit.
            num_engines: of one pipeline, as the pool has them.
            is_settled: whether the cuts are the user's own.

        Raises:
            PlanError: no pipeline over so many engines fits; with the figures, and how many would do.
        """
        found: list[Partition] = []
        ties = dict.fromkeys(division.ties)
        needs: dict[int, tuple[Need, ...]] = {}
        samples = self._batch_size // division.num_teams
        for partition in division.partitions:
            if partition.num_engines > num_engines and found:
                found.append(partition)  # if so many engines come, each holds less than now
                continue
            fitted, needs[partition.num_engines] = self._fitted(partition, division, samples, is_settled=is_settled)
            if _largest(needs[partition.num_engines]) <= self._num_bytes:
                found.append(fitted)
                if fitted is not partition:
                    ties.update(dict.fromkeys(self._ties_of(fitted, samples)))
        if not any(partition.num_engines <= num_engines for partition in found):
            self._refuse(needs, [partition.num_engines for partition in found], num_engines=num_engines)
        return replace(division, partitions=tuple(found), ties=tuple(ties))

    def _ties_of(self, partition: Partition, samples: int) -> list[str]:
        """Return the parameters that more than one engine uses where stages begin elsewhere than in even divisions."""
        inputs = model_inputs(self._job, self._batch_of(samples // partition.num_micro_batches))
        return ties_of(follow_once(self._job.model, inputs).users(partition.cuts), partition.num_engines)

    def _fitted(
        self, partition: Partition, division: ModelDivision, samples: int, *, is_settled: bool
    ) -> tuple[Partition, tuple[Need, ...]]:
        """Return a partition, cut elsewhere if it would not fit as it is."""
        stages = division.stages if partition.num_stages > 1 else None
        batch = self._batch_of(samples // partition.num_micro_batches)
        needs = self._needs(partition, stages, batch)
        if _largest(needs) <= self._num_bytes or is_settled or stages is not None or partition.num_stages == 1:
            return partition, needs
        points = follow_once(self._job.model, model_inputs(self._job, batch)).points
        layers = msgspec.structs.replace(partition, num_stages=len(points) + 1, cuts=tuple(points))
        parts = StageBuilder(self._job.model, layers, autocast=self._autocast).parts(model_inputs(self._job, batch))
        weights = [sum(each.nbytes for each in part.parameters.values()) + 1 for part in parts]
        cuts = balanced_cuts(weights, points, partition.num_stages, alike=EXACTLY)
        moved = msgspec.structs.replace(partition, cuts=cuts)
        others = self._needs(moved, None, batch)
        return (moved, others) if _largest(others) < _largest(needs) else (partition, needs)

    def _needs(self, partition: Partition, stages: Sequence[torch.nn.Module] | None, batch: Any) -> tuple[Need, ...]:
        inputs = model_inputs(self._job, batch)
        parts = StageBuilder(self._job.model, partition, stages=stages, autocast=self._autocast).parts(inputs)
        return needs_of(
            self._job.model,
            parts,
            partition,
            inputs,
            num_micro_batches=partition.num_micro_batches,
            loss=self._loss(batch),
            autocast=self._autocast,
        )

    def _refuse(self, needs: dict[int, tuple[Need, ...]], fitting: Sequence[int], *, num_engines: int) -> None:
        size = max(number for number in needs if number <= num_engines)
        rank = max(range(size), key=lambda rank: needs[size][rank].num_bytes)
        what = f"engine {rank} of a pipeline of {size} would need {_in_words(needs[size][rank])}"
        if fitting:
            way_out = f"{min(fitting)} engines would do: %dtrain add {min(fitting) - num_engines}"
        else:
            way_out = f"no pipeline of up to {max(needs)} would do: raise memory_limit, or make layers or batch smaller"
        raise PlanError(f"{self._name} does not fit: {what}, and memory_limit is {amount(self._num_bytes)}; {way_out}")

    def _way_out(self, need: Need, *, micro_batch: int | None) -> str:
        state = need.parameter_bytes + need.gradient_bytes
        pipeline = "strategy='pipeline' divides it over several engines"
        if state > self._num_bytes:
            return pipeline
        return f"{pipeline}, or a smaller micro_batch" + (f" than {micro_batch}" if micro_batch else "")

    @property
    def _name(self) -> str:
        return type(self._job.model).__name__

    def _batch_of(self, samples: int) -> Any:
        return fetch_batch(self._data.train, torch.arange(max(1, samples)))

    def _loss(self, batch: Any) -> Loss | None:
        """Return the loss, whose memory counts, too; a step function's own is not known."""
        loss = self._job.loss
        if loss is None:
            return None
        return lambda output: loss(output, batch[-1])


def _largest(needs: Iterable[Need]) -> int:
    return max(need.num_bytes for need in needs)


def _in_words(need: Need) -> str:
    activations = need.activation_bytes
    text = f"{amount(need.parameter_bytes)} of parameters, {amount(need.gradient_bytes)} of gradients"
    if activations is None:
        return f"at least {amount(need.num_bytes)} ({text}; activations are not known)"
    return f"{amount(need.num_bytes)} ({text}, {amount(activations)} of activations and inputs)"
