"""A run's strategy as it was asked for, and as a pool lets it be carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from dnb.api.arguments.checks import can_divide, check_positive
from dnb.api.fit_arguments import FitArguments
from dnb.api.rehearsal.metrics import called
from dnb.api.strategy.automatic import choose_plan
from dnb.api.strategy.division import ModelDivision
from dnb.api.strategy.measurement import working_engines
from dnb.api.strategy.memory_limit import Limit
from dnb.errors import ArgumentError, PlanError
from dnb.job import Data, Job
from dnb.planning.search.plans import Plan
from dnb.planning.shards import choose_exact_shards, choose_num_shards
from dnb.pool.engine_pool import EnginePool
from dnb.protocol.run import Finding, RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRequest:
    """A request for how engines share a model and its batches; a pool settles what is open.

    Args:
        job: with the stages of a pipeline, if modules were given as such.
        data: of the run.
        strategy: "data" where layers take statistics of the whole batch, whatever was asked for.
        division: of the model, as far as it is known without a pool; None: every engine has all of it.
        batch_size: samples of the global batch.
        exact: as of `fit`.
        transport: likewise.
        precision: likewise.
        micro_batch: likewise.
        shards: likewise.
        memory_limit: bytes.
        loss_over: of the loss, as it was given or found.
        wanted_over: as it was given; None if it was left out.
        whole_metrics: names of metrics that are computed of all samples at once.
        sys_path: where engines that measure a model import it from.
    """

    job: Job
    data: Data
    strategy: str | Plan
    division: ModelDivision | None
    batch_size: int
    exact: bool
    transport: Any
    precision: str
    micro_batch: int | None
    shards: int | None
    memory_limit: int | None
    loss_over: str
    wanted_over: str | None
    whole_metrics: tuple[str, ...]
    sys_path: tuple[str, ...]

    def settle(self, spec: RunSpec, pool: EnginePool) -> RunSpec:
        """Return the run's numbers with those that depend on the pool.

        Raises:
            ArgumentError: outputs would have to be gathered, and are not to be.
            PlanError: the pool cannot carry it out, or the model does not fit.
        """
        plan, choice = self._plan_for(pool, num_samples=spec.num_samples)
        division = self._division_for(plan, pool)
        is_divided, has_val = division is not None, self.data.val is not None
        gathers = self.loss_over == "batch" or (
            division is None and _gathers_for(self.whole_metrics, wanted=self.wanted_over)
        )
        if self.memory_limit is not None:
            division = self._within_memory(self.memory_limit, division, plan, pool)
        return msgspec.structs.replace(
            spec,
            num_shards=self._num_shards(pool) if division is None else division.num_teams,
            partitions=() if division is None else division.partitions,
            team_size=None if division is None else division.team_size,
            ties=() if division is None else division.ties,
            choice=choice,
            prediction=None if plan is None else plan.prediction,
            findings=(
                *spec.findings,
                *_findings_of_loss(self.loss_over, is_divided=is_divided),
                *_findings_of_metrics(self.whole_metrics, is_divided=is_divided, has_val=has_val),
            ),
            reduction="samples" if gathers else spec.reduction,
            loss_over="batch" if gathers else self.loss_over,
        )

    def _plan_for(self, pool: EnginePool, *, num_samples: int) -> tuple[Plan | None, str]:
        """Return the plan that the run follows, if it follows one, and why it was chosen, if nobody gave it."""
        if isinstance(self.strategy, Plan):
            return self.strategy, ""
        if self.strategy != "auto" or self.loss_over != "samples" or not can_divide():
            return None, ""
        return choose_plan(
            self.job,
            self.data,
            pool,
            num_samples=num_samples,
            batch_size=self.batch_size,
            exact=self.exact,
            transport=self.transport,
            sys_path=self.sys_path,
            memory_limit=self.memory_limit,
        )

    def _division_for(self, plan: Plan | None, pool: EnginePool) -> ModelDivision | None:
        division = self.division
        if plan is not None and self.strategy == "auto":
            division = self._division_by(plan)
        if division is not None:
            division.check_pool(pool)
            division = division.for_loss(self.loss_over, micro_batch=self.micro_batch)
            division.check_metrics(self.whole_metrics)
        return division

    def _division_by(self, plan: Plan) -> ModelDivision:
        """Return the division of a plan that nobody has read; what was seen of calls does not tell all of a forward."""
        divide = partial(
            ModelDivision.of_plan,
            plan,
            self.job,
            self.data,
            batch_size=self.batch_size,
            exact=self.exact,
            transport=self.transport,
        )
        try:
            return divide()
        except PlanError:
            return divide(keeps_cuts=False)

    def _within_memory(
        self, num_bytes: int, division: ModelDivision | None, plan: Plan | None, pool: EnginePool
    ) -> ModelDivision | None:
        limit = Limit(num_bytes, self.job, self.data, batch_size=self.batch_size, precision=self.precision)
        num_engines = len(working_engines(pool))
        return limit.settle(division, plan, num_engines=num_engines, micro_batch=self.micro_batch)

    def _num_shards(self, pool: EnginePool) -> int:
        if self.shards is not None:
            return self.shards
        choose = choose_exact_shards if self.exact else choose_num_shards
        num_workers = sum(status.state != "spare" for status in pool.statuses)
        return choose(max(num_workers, 1), batch_size=self.batch_size)


def read_division(
    given: FitArguments, job: Job, data: Data, *, batch_size: int
) -> tuple[ModelDivision | None, str | Plan]:
    """Divide a model as far as no pool is needed for it; return the division, if there is one, and the strategy.

    Args:
        given: to `fit`.
        job: as it is shipped.
        data: likewise.
        batch_size: samples of the global batch.

    Raises:
        ArgumentError: an argument is wrong.
        PlanError: the model or the batch cannot be divided so.
    """
    exact, transport = given.exact, given.transport
    division, strategy = ModelDivision.synced(
        given.model,
        wants_all=bool(given.sync_batchnorm),
        strategy=given.strategy,
        exact=exact,
        transport=transport,
    )
    if isinstance(strategy, Plan) and strategy.partition is not None:
        planned = ModelDivision.of_plan(strategy, job, data, batch_size=batch_size, exact=exact, transport=transport)
        return planned, strategy
    if strategy in ("pipeline", "tensor", "hybrid"):
        divided = ModelDivision.of(
            job,
            data,
            strategy=str(strategy),
            stages=given.stages,
            schedule=given.schedule,
            mesh=given.mesh,
            tensor_plan=given.tensor_plan,
            batch_size=batch_size,
            micro_batch=given.micro_batch,
            exact=exact,
            transport=transport,
        )
        return divided, strategy
    if given.stages is not None or given.mesh is not None or given.tensor_plan is not None:
        raise PlanError(
            "stages=, mesh= and tensor_plan= divide a model: strategy='pipeline', 'tensor' or 'hybrid' does that"
        )
    return division, strategy


def cuts_batches(strategy: str | Plan, *, exact: bool) -> bool:
    """Tell whether engines make parts of a batch by themselves, which one team makes whole."""
    if isinstance(strategy, Plan):
        return strategy.partition is None
    return strategy not in ("pipeline", "tensor") or exact


def read_shards(shards: Any, *, batch_size: int) -> int | None:
    """Return the number of shards that was asked for, if one was.

    Raises:
        ArgumentError: it is none, or more than a batch has samples.
    """
    if shards is None:
        return None
    num_shards = check_positive(shards, name="shards")
    if num_shards > batch_size:
        raise ArgumentError(f"shards={num_shards} is more than the {batch_size} samples of a batch: use at most that")
    return num_shards


def _findings_of_loss(loss_over: str, *, is_divided: bool) -> tuple[Finding, ...]:
    """Return the run's events about a loss that looks at the whole batch."""
    if loss_over != "batch":
        return ()
    how = "it is computed once, on the outputs of all micro-batches" if is_divided else "outputs are gathered"
    return (Finding(kind="loss", text=f"this loss looks at the whole batch: {how}"),)


def _gathers_for(metrics: Sequence[str], *, wanted: str | None) -> bool:
    """Tell whether outputs are gathered for metrics alone.

    Raises:
        ArgumentError: the user wants no gathering.
    """
    if metrics and wanted == "samples":
        raise ArgumentError(
            f"{called(metrics)} computed of all samples at once, and loss_over='samples' gathers no outputs: leave "
            "loss_over or the metric out"
        )
    return bool(metrics)


def _findings_of_metrics(names: Sequence[str], *, is_divided: bool, has_val: bool) -> tuple[Finding, ...]:
    """Return the run's events about metrics that are computed of all samples at once."""
    if not names:
        return ()
    how = [] if is_divided else ["outputs are gathered"]
    how += ["one engine evaluates all validation data"] if has_val and not is_divided else []
    text = f"{called(names)} computed of all samples at once"
    return (Finding(kind="metrics", text=f"{text}: {', and '.join(how)}" if how else text),)
