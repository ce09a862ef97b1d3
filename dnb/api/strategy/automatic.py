"""`strategy="auto"`: whether a model is divided over the engines at all, and how."""

from __future__ import annotations

import socket

import torch

from dnb.api.strategy.measurement import profile_on, site_of, working_engines
from dnb.engine.profiling.profiler import ProfileInput
from dnb.errors import PlanError
from dnb.job import Data, Job
from dnb.planning.search.plans import Alternative, Plan, draw_up
from dnb.planning.search.prediction import Question
from dnb.pool.engine_pool import EnginePool
from dnb.units import amount, milliseconds
from dnb.user_code.loader import fetch_batch

# A smaller model is not profiled: the gradients of so few parameters are added up in the time that it would take to
# send activations, and its state fits anywhere.
LEAST_BYTES = 64 << 20
# Engines come and go more easily when each has the whole model: a pipeline must gain at least so much.
LEAST_GAIN = 1.1


def choose_plan(
    job: Job,
    data: Data,
    pool: EnginePool,
    *,
    num_samples: int,
    batch_size: int,
    exact: bool,
    transport: object,
    sys_path: tuple[str, ...],
    memory_limit: int | None = None,
) -> tuple[Plan | None, str]:
    """Return a plan that divides the model, or None for data parallelism; and why, for people.

    A model of less than 64 MB, and whatever only data parallelism can do, is not profiled. Otherwise one batch goes
    through the model layer by layer on the engines, about two seconds long, as for `dnb.plan`.

    Raises:
        PlanError: it does not fit into `memory_limit`, however it is divided.
    """
    num_bytes = sum(each.nbytes for each in job.model.parameters())
    if not _may_be_divided(job, pool, exact=exact, transport=transport):
        return None, ""
    if num_bytes < LEAST_BYTES and memory_limit is None:
        return None, ""
    batch = fetch_batch(data.train, torch.arange(min(batch_size, num_samples)))
    question = Question(batch_size=batch_size, optimizer=job.optimizer if isinstance(job.optimizer, str) else "adamw")
    try:
        profile = profile_on(pool, ProfileInput(model=job.model, batch=batch, loss=job.loss), sys_path=sys_path)
    except PlanError as error:
        return None, f"data parallel, as the model could not be profiled: {error}"
    site = site_of(pool, memory_limit=memory_limit)
    try:
        plan = draw_up(profile, site, question)
    except PlanError as error:
        if memory_limit is not None:
            raise
        return None, f"data parallel, although memory is short: {error}"
    if plan.partition is None:
        return None, f"data parallel, {milliseconds(plan.step_seconds)} per step predicted{_next_best(plan)}"
    rival = next((lost for lost in plan.alternatives if lost.mesh.pipeline == 1 and lost.fits), None)
    if rival is not None and rival.step_seconds < LEAST_GAIN * plan.step_seconds:
        return None, (
            f"data parallel, {milliseconds(rival.step_seconds)} per step predicted: {plan.mesh} would gain too little"
        )
    return plan, f"{plan.mesh}, {milliseconds(plan.step_seconds)} per step predicted: {_why(plan, rival, num_bytes)}"


def _may_be_divided(job: Job, pool: EnginePool, *, exact: bool, transport: object) -> bool:
    engines = working_engines(pool)
    here = socket.gethostname()
    return (
        len(engines) > 1
        and all(engine.host == here for engine in engines)
        and job.step is None
        and job.val_step is None
        and not (job.metrics and job.loss is None)
        and not exact
        and transport in (None, "memory")
    )


def _next_best(plan: Plan) -> str:
    divided = [lost for lost in plan.alternatives if lost.mesh.pipeline > 1]
    return f"; {divided[0].mesh} would take {milliseconds(divided[0].step_seconds)}" if divided else ""


def _why(plan: Plan, rival: Alternative | None, num_bytes: int) -> str:
    if rival is None:
        limits = [stage.memory_limit for stage in plan.stages if stage.memory_limit is not None]
        return f"the model has {amount(num_bytes)}, and one engine has {amount(min(limits, default=0))} for all"
    return f"data parallel engines would take {milliseconds(rival.step_seconds)}"
