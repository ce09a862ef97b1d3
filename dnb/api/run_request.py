"""A run as it was asked for: read and checked before there is a pool, and launched on one afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch

from dnb.api.arguments.checks import (
    PRECISIONS,
    STRATEGIES,
    SYNCS,
    check_choice,
    check_flags,
    check_model,
    check_number,
    check_positive,
    check_seed,
    read_bytes,
    read_checkpoint_policy,
    read_transport,
)
from dnb.api.arguments.data import count_val_samples, order_of
from dnb.api.arguments.data_sources import read_source
from dnb.api.arguments.losses import (
    are_objects,
    check_loss_over,
    check_metrics_are_computed,
    check_val_step,
    read_loss,
    read_loss_over,
    read_metrics,
)
from dnb.api.fit_arguments import FitArguments
from dnb.api.rehearsal.metrics import whole_metrics_of
from dnb.api.rehearsal.modes import mode_findings
from dnb.api.rehearsal.rehearsal import RehearsedRun, rehearse
from dnb.api.rehearsal.trial import Options
from dnb.api.run_words import describe_arguments
from dnb.api.runs.run_folders import check_name, check_place
from dnb.api.runs.write_back import NotebookObjects, OrderFollower
from dnb.api.strategy.strategy_request import StrategyRequest, cuts_batches, read_division, read_shards
from dnb.api.submission import NOTHING, Upload, own_path, upload
from dnb.errors import ArgumentError
from dnb.hub.parameters.buffer_rules import read_buffer_rules
from dnb.hub.parameters.optimizers import check_optimizer
from dnb.hub.parameters.scheduler_pacing import check_pace
from dnb.job import Data, Job
from dnb.planning.sample_order import BatchOrder, count_batches
from dnb.planning.search.plans import Plan
from dnb.pool.engine_pool import EnginePool
from dnb.protocol.run import CheckpointPolicy, PlainJob, RunSpec
from dnb.transport.pickling.hooks import refuse_global_hooks
from dnb.transport.pickling.module_states import check_extra_states
from dnb.transport.system.process_settings import notebook_settings
from dnb.user_code.gradient_samples import USUAL_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A run that was asked for, and can be launched.

    Args:
        spec: its numbers; its name is the one wanted, and those that depend on the pool are open.
        settle: fills in what depends on the pool, or refuses it.
        own: the notebook's objects, which get the trained state.
        ship_job: sends the job to hub and engines.
        ship_data: sends the data to engines.
        data: the notebook's own, by which the first steps can be computed again; None if they cannot.
        num_proved: so many first steps are proved at once; None: none are.
        first_step: the last one of the run that is continued; 0 if none is.
    """

    spec: RunSpec
    settle: Callable[[RunSpec, EnginePool], RunSpec]
    own: NotebookObjects
    ship_job: Upload
    ship_data: Upload
    data: Data | None = None
    num_proved: int | None = None
    first_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _FitObjects:
    """Arguments as they are shipped, the order of batches, and the policy of checkpoints."""

    job: Job
    data: Data
    order: BatchOrder  # of the notebook's own loader
    num_samples: int
    num_val_samples: int
    buffers: dict[str, str]
    checkpoints: CheckpointPolicy | None


def read_request(given: FitArguments) -> RunRequest:
    """Read what was given to `fit`, check it, and rehearse a few samples; nothing is started.

    Raises:
        ArgumentError: an argument is wrong.
        PlanError: what is asked is not in this release.
    """
    check_model(given.model)
    seed = check_seed(given.seed)
    check_flags(
        shuffle=given.shuffle, exact=given.exact, telemetry=given.telemetry, sync_batchnorm=given.sync_batchnorm
    )
    settings = notebook_settings()
    check_extra_states(given.model)
    _check_words(given)
    memory_limit, num_sampled = read_bytes(given.memory_limit), _num_sampled(given)
    objects = _read_objects(given, seed=seed)
    options = Options(
        seed=seed,
        precision=given.precision,
        loss_over=given.loss_over,
        cuts_batches=cuts_batches(given.strategy, exact=given.exact),
    )
    rehearsed = rehearse(objects.job, objects.data, options)
    strategy = _read_strategy(given, rehearsed, memory_limit=memory_limit, batch_size=objects.order.batch_size)
    spec = msgspec.structs.replace(
        _spec(given, objects, rehearsed, strategy),
        seed=seed,
        settings=settings,
        memory_limit=memory_limit,
        num_sampled=num_sampled,
    )
    check_place()
    return RunRequest(
        spec=spec,
        settle=strategy.settle,
        own=NotebookObjects.of(
            given.model,
            optimizer=given.optimizer,
            scheduler=given.scheduler,
            order=OrderFollower(objects.order, steps_per_epoch=spec.steps_per_epoch),
            after_step=given.after_step,
        ),
        ship_job=partial(upload, strategy.job),
        ship_data=partial(upload, strategy.data),
        data=strategy.data,
        num_proved=None if given.prove is None else num_sampled,
    )


def _check_words(given: FitArguments) -> None:
    if not isinstance(given.strategy, Plan):
        check_choice(given.strategy, name="strategy", known=STRATEGIES, available=STRATEGIES)
    check_choice(given.sync, name="sync", known=SYNCS, available=("hub",))
    check_choice(given.precision, name="precision", known=PRECISIONS, available=PRECISIONS)


def _num_sampled(given: FitArguments) -> int:
    return USUAL_STEPS if given.prove is None else check_positive(given.prove, name="prove")


def _read_objects(given: FitArguments, *, seed: int) -> _FitObjects:
    """Read functions, optimizer and data, and refuse what does not go together."""
    has_val = given.val is not None
    loss_function = read_loss(given.loss, step=given.step)
    check_optimizer_fits(given.optimizer, given.model, lr=given.lr)
    check_pace(given.scheduler, every=given.scheduler_every, has_val=has_val)
    if given.after_step is not None and not callable(given.after_step):
        raise ArgumentError(f"after_step is a {type(given.after_step).__name__}: give a callable(model)")
    refuse_global_hooks()
    rules = {} if given.buffers is None else read_buffer_rules(given.buffers, given.model)
    train = read_source(given.train, name="train", seed=seed)
    val = None if given.val is None else read_source(given.val, name="val", seed=seed)
    check_val_step(given.val_step, has_val=has_val)
    check_metrics_are_computed(given.metrics, step=given.step)
    order = order_of(train, batch_size=given.batch_size, shuffle=given.shuffle, seed=seed)
    job = Job(
        model=given.model,
        loss=loss_function,
        step=given.step,
        metrics=read_metrics(given.metrics),
        optimizer=given.optimizer,
        lr=None if given.lr is None else check_number(given.lr, name="lr"),
        scheduler=given.scheduler,
        order=order,
        after_step=given.after_step,
        val_step=given.val_step,
        val_order=None if val is None else val.order,
    )
    policy = read_checkpoint_policy(
        given.checkpoint_every,
        keep=given.checkpoint_keep,
        best=given.checkpoint_best,
        metrics=None if given.step is not None or given.val_step is not None else list(job.metrics),
        has_val=has_val,
    )
    return _FitObjects(
        job=job,
        data=Data(train=train.data, val=None if val is None else val.data),
        order=order,
        num_samples=train.num_samples,
        num_val_samples=count_val_samples(val),
        buffers=rules,
        checkpoints=policy,
    )


def _read_strategy(
    given: FitArguments, rehearsed: RehearsedRun, *, memory_limit: int | None, batch_size: int
) -> StrategyRequest:
    job, data = rehearsed.job, rehearsed.data
    wanted_over = read_loss_over(given.loss_over)
    loss_over = check_loss_over(wanted_over or rehearsed.loss_over, job)
    division, strategy = read_division(given, job, data, batch_size=batch_size)
    return StrategyRequest(
        job=job if division is None else replace(job, stages=division.stages),
        data=data,
        strategy=strategy,
        division=division,
        batch_size=batch_size,
        exact=given.exact,
        transport=given.transport,
        precision=given.precision,
        micro_batch=given.micro_batch,
        shards=read_shards(given.shards, batch_size=batch_size) if division is None else None,
        memory_limit=memory_limit,
        loss_over=loss_over,
        wanted_over=wanted_over,
        whole_metrics=whole_metrics_of(job, rehearsed.whole_metrics),
        sys_path=own_path(),
    )


def _spec(given: FitArguments, objects: _FitObjects, rehearsed: RehearsedRun, strategy: StrategyRequest) -> RunSpec:
    """Return the run's numbers, as far as they are known without a pool."""
    job, batch_size = strategy.job, strategy.batch_size
    steps_per_epoch = count_batches(objects.order)
    num_steps = steps_per_epoch * check_positive(given.epochs, name="epochs")
    return RunSpec(
        id="",
        name=check_name(given.name) or type(given.model).__name__.lower(),
        folder="",
        num_samples=objects.num_samples,
        num_val_samples=objects.num_val_samples,
        num_steps=num_steps if given.steps is None else check_positive(given.steps, name="steps"),
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        num_shards=0,
        exact=bool(given.exact),
        transport=read_transport(given.transport),
        telemetry=bool(given.telemetry),
        seed=0,
        clip_norm=None if given.clip_norm is None else check_number(given.clip_norm, name="clip_norm"),
        micro_batch=None if given.micro_batch is None else check_positive(given.micro_batch, name="micro_batch"),
        precision=given.precision,
        linger_seconds=0.0,
        notes=(),
        sys_path=strategy.sys_path,
        job=NOTHING,
        data=NOTHING,
        checkpoints=objects.checkpoints,
        plain=_plain_job(given, job),
        findings=(*rehearsed.findings, *mode_findings(given.model)),
        probe=rehearsed.probe,
        probe_samples=rehearsed.probe_samples,
        reduction=rehearsed.reduction,
        val_reduction=rehearsed.val_reduction,
        whole_metrics=strategy.whole_metrics,
        target_metrics=rehearsed.target_metrics,
        loss_over=strategy.loss_over,
        trusts_loss=strategy.wanted_over is not None,
        scheduler_every=given.scheduler_every,
        val_batch_size=_val_batch_size(job, batch_size=batch_size, loss_over=strategy.loss_over),
        buffers=objects.buffers,
        sync_batchnorm=bool(given.sync_batchnorm),
        described=describe_arguments(given, objects.job),
    )


def check_optimizer_fits(optimizer: Any, model: torch.nn.Module, *, lr: Any) -> None:
    """Refuse what is no optimizer, or one of other parameters."""
    check_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    if lr is not None:
        raise ArgumentError(
            "lr is for an optimizer given by name, and this one has its own learning rate: leave lr out"
        )
    own = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ArgumentError(
            f"{strangers} of the optimizer's parameters are not the model's: build it on model.parameters()"
        )


def _val_batch_size(job: Job, *, batch_size: int, loss_over: str) -> int | None:
    """Return the samples of the batches that evaluations compute whole; None if they may be cut anywhere."""
    if job.val_step is None and loss_over != "batch":
        return None
    if job.val_order is None:
        return batch_size
    batch_sampler = job.val_order.batch_sampler
    if batch_sampler is not None and not isinstance(getattr(batch_sampler, "batch_size", None), int):
        raise ArgumentError(
            f"batches of val's batch sampler {type(batch_sampler).__name__} may differ in size, and each has a loss of "
            "its own here: give val a DataLoader with a batch_size"
        )
    return int(job.val_order.batch_size)


def _plain_job(given: FitArguments, job: Job) -> PlainJob:
    """Return the part of a job that is words and numbers; the rest only pickle can keep."""
    order, metrics = job.order, given.metrics
    is_object = {
        "loss": given.loss is not None and not isinstance(given.loss, str),
        "step": given.step is not None,
        "optimizer": not isinstance(given.optimizer, str),
        "scheduler": given.scheduler is not None,
        "metrics": are_objects(metrics),
        "after_step": job.after_step is not None,
        "val_step": job.val_step is not None,
        "val": job.val_order is not None,
        "train": not (order.sampler is None and order.batch_sampler is None and order.generator is None),
    }
    return PlainJob(
        loss=given.loss if isinstance(given.loss, str) else None,
        optimizer=given.optimizer if isinstance(given.optimizer, str) else None,
        lr=job.lr,
        metrics=() if are_objects(metrics) else tuple(job.metrics),
        shuffle=order.shuffle,
        drop_last=order.drop_last,
        others=tuple(name for name, found in is_object.items() if found),
    )
