"""What a user calls: start a pool, fit a model on it, find a run again."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.automatic import choose_plan
from dnb.data_sources import read_source
from dnb.division import Division
from dnb.errors import USER_ERRORS, ArgumentError, HubError, PlanError, PoolError, SpaceError, is_text, summary_of
from dnb.homecoming import OrderFollower
from dnb.hub.optimizers import check_optimizer
from dnb.hub.pacing import check_pace
from dnb.input_checks import (
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
from dnb.input_data import count_val_samples, order_of
from dnb.input_losses import (
    are_objects,
    check_loss_over,
    check_metrics_are_computed,
    check_val_step,
    read_loss,
    read_loss_over,
    read_metrics,
)
from dnb.limits import Limit
from dnb.planning.buffers import read_buffer_rules
from dnb.planning.gradient_samples import USUAL_STEPS
from dnb.planning.plans import Plan
from dnb.planning.sample_order import count_batches
from dnb.planning.shards import choose_exact_shards, choose_num_shards
from dnb.pool.engine_pool import EnginePool
from dnb.pool.found import Found, clear_doubtful, find_pools, reap_dead
from dnb.pool.starting import adopt_pool, profile_folder, start_pool
from dnb.progress import long_work
from dnb.proving import Submission
from dnb.records import ENDED, Done, Finding, ParcelRef, PlainJob, PoolFacts, RunSpec, Submit
from dnb.rehearsal.metrics import called, whole_metrics_of
from dnb.rehearsal.modes import mode_findings
from dnb.rehearsal.rehearsing import rehearse
from dnb.rehearsal.trial import Options
from dnb.run import Run
from dnb.run_folders import RUNS_FOLDER, check_name, check_place, reserved_folder
from dnb.surveying import working_engines
from dnb.transport.hooks import refuse_global_hooks
from dnb.transport.job import Data, Job
from dnb.transport.module_states import check_extra_states
from dnb.transport.parcels import explain_unpicklable, pack, sign
from dnb.transport.process_settings import notebook_settings
from dnb.transport.segments import Segment

log = logging.getLogger(__name__)

LINGER_SECONDS = 1800.0
# More engines than this are started only when asked for.
MOST_BY_DEFAULT = 4
RESTARTS = ("never", "always")

_pool: Pool | None = None
# Held by whoever starts or ends it: a cell and the control panel may want to at the same time.
_changing = threading.RLock()


class Pool(EnginePool):
    """A pool that can train; made by `start`."""

    linger_seconds = LINGER_SECONDS
    run: Run | None = None  # the last one that this kernel submitted or attached to

    def follow(self, run: Run) -> Run:
        """Let a run be the one that this kernel looks at, and the pool have what it needs to go on."""
        run.add_listener(lambda run: self.fill_up() if run.num_owed else None)
        self.run = run.watch()
        return run

    def fit(self, model: torch.nn.Module, train: Any, **options: Any) -> Run:
        """`dnb.fit` on this pool."""
        return fit(model, train, pool=self, **options)


def start(
    n: int | None = None,
    *,
    profile: str | None = None,
    launcher: str = "local",
    threads_per_engine: int | None = None,
    timeout_seconds: float = 60.0,
    linger_seconds: float = LINGER_SECONDS,
    restart: str = "never",
) -> Pool:
    """Start a pool of engines with a hub, or return the one that is running.

    Args:
        n: number of engines; one per core, at most 4, if left out.
        profile: IPython profile whose folder holds the connection files.
        launcher: how ipyparallel starts engines: "local", or another of its launchers.
        threads_per_engine: threads for torch in each engine; the host's cores are shared out if left out.
        timeout_seconds: how long the start may take.
        linger_seconds: how long the pool outlives a dead kernel after its run has ended.
        restart: "always" replaces engines that die, as long as this kernel lives; "never" leaves them dead.

    Raises:
        ArgumentError: n is not a number of engines that this host can hold.
        PoolError: the pool did not come up.
    """
    pool, notices = open_pool(
        n,
        profile=profile,
        launcher=launcher,
        threads_per_engine=threads_per_engine,
        timeout_seconds=timeout_seconds,
        linger_seconds=linger_seconds,
        restart=restart,
    )
    for notice in notices:
        log.warning(notice)
    return pool


def open_pool(
    n: int | None,
    *,
    profile: str | None,
    launcher: str,
    threads_per_engine: int | None,
    timeout_seconds: float,
    linger_seconds: float,
    restart: str = "never",
) -> tuple[Pool, list[str]]:
    """`start`, with sentences on what was found: a running pool, one that a dead kernel left, remains."""
    check_choice(restart, name="restart", known=RESTARTS, available=RESTARTS)
    with _changing:
        pool, notices = _open_pool(
            n,
            profile=profile,
            launcher=launcher,
            threads_per_engine=threads_per_engine,
            timeout_seconds=timeout_seconds,
            linger_seconds=linger_seconds,
        )
    if restart == "always":
        pool.restart = "always"
    return pool, notices


def _open_pool(
    n: int | None,
    *,
    profile: str | None,
    launcher: str,
    threads_per_engine: int | None,
    timeout_seconds: float,
    linger_seconds: float,
) -> tuple[Pool, list[str]]:
    global _pool
    num_engines = min(os.cpu_count() or 1, MOST_BY_DEFAULT) if n is None else n
    if _pool is not None and _pool.is_open:
        return _pool, [_already(_pool, asked=n)]
    if threads_per_engine is not None:
        check_positive(threads_per_engine, name="threads_per_engine")
    check_number(timeout_seconds, name="timeout_seconds")
    if _pool is not None:
        _pool.shutdown()  # its hub has died: clear up what it left
        _pool = None
    profile_dir = profile_folder(profile)
    found = find_pools(profile_dir / "security")
    notices = _clear(found, profile_dir)
    _pool = _adopt_first(found.orphans, profile_dir, told=notices)
    if _pool is not None:
        return _pool, [*notices, _adopted(_pool)]
    _pool = start_pool(
        Pool,
        n=num_engines,
        profile_dir=profile_dir,
        launcher=launcher,
        threads_per_engine=threads_per_engine,
        timeout_seconds=timeout_seconds,
    )
    _pool.linger_seconds = linger_seconds
    return _pool, notices


def current_pool() -> Pool | None:
    """The pool that this kernel steers, if it is open."""
    return _pool if _pool is not None and _pool.is_open else None


def last_pool() -> Pool | None:
    """The pool that this kernel has, also one whose hub has died; None once it was shut down."""
    return _pool


def shutdown() -> bool:
    """End the pool of this kernel; whether there was one."""
    global _pool
    with _changing:
        if _pool is None:
            return False
        _pool.shutdown()
        _pool = None
        return True


def fit(
    model: torch.nn.Module,
    train: Any,
    *,
    val: Any = None,
    loss: str | Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
    optimizer: Any = "adamw",
    lr: float | None = None,
    scheduler: Any = None,
    batch_size: int = 64,
    epochs: int = 1,
    steps: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    shards: int | None = None,
    exact: bool = False,
    micro_batch: int | None = None,
    clip_norm: float | None = None,
    precision: str = "float32",
    metrics: str | Mapping[str, Callable[..., Any]] | None = None,
    val_step: Callable[..., Any] | None = None,
    after_step: Callable[..., Any] | None = None,
    loss_over: str | None = None,
    buffers: Mapping[str, str] | None = None,
    scheduler_every: str = "step",
    sync_batchnorm: bool = False,
    prove: int | None = None,
    strategy: str | Plan = "auto",
    stages: Sequence[str | torch.nn.Module] | None = None,
    schedule: str = "1f1b",
    mesh: str | Mapping[str, int] | None = None,
    tensor_plan: Mapping[str, Any] | None = None,
    memory_limit: int | str | None = None,
    sync: str = "hub",
    checkpoint_every: int | None = None,
    checkpoint_keep: int = 2,
    checkpoint_best: str | None = None,
    transport: str | Mapping[int, str] | None = None,
    telemetry: bool = True,
    name: str | None = None,
    pool: Pool | None = None,
) -> Run:
    """Train a model on the pool's engines; returns at once, while training goes on.

    Args:
        model: trained in place: it holds the trained state when the run ends, stops or pauses.
        train: a pair (X, y) of tensors or arrays, a map-style Dataset, or a DataLoader (its data set, batch
            size, sampler and collate_fn count).
        val: likewise; evaluated at the end of every epoch, over all engines.
        loss: callable(output, target) that returns a mean over samples, or a name of torch.nn.functional.
        step: instead of loss: callable(model, batch) -> loss | (loss, {"metric": value}) | `Sum`; what models return
            that compute their own loss will do too: (logits, loss), {"loss": loss}, or an object with `.loss`.
        optimizer: name, torch Optimizer on model.parameters(), or callable(params) -> Optimizer.
        lr: learning rate of an optimizer given by name; torch's default if left out.
        scheduler: LRScheduler on that optimizer, or callable(optimizer); stepped after every step.
        batch_size: samples of the global batch, over all engines together.
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs.
        shuffle: as a DataLoader with a generator seeded by `seed` does.
        seed: of sample order and of random numbers in the model.
        shards: logical shards of a global batch; see `dnb.planning.shards.choose_num_shards`.
        exact: equal to the bit for any number and any change of engines: every shard is computed from the same
            beginning, and gradients are added up in the order of the shards.
        micro_batch: most samples that go through forward at once.
        clip_norm: largest global norm of the gradient.
        precision: "float32", or "bfloat16" for autocast in forward.
        metrics: {"name": callable(output, target)}, or "accuracy". One that is no mean over samples, or keeps a state
            as those of torchmetrics do, is computed of all samples at once.
        val_step: instead of loss or step where `val` is evaluated: callable(model, batch), returning as `step` does.
        after_step: callable(model), run once by the hub after each update, without gradients, for averages and the
            clipping of weights; what it keeps (modules, tensors, lists, numbers) comes home as the model does.
        loss_over: "samples": the loss of a batch is the mean of the losses of its parts; "batch": it looks at the whole
            batch, so that outputs are gathered first. The rehearsal finds out if left out.
        buffers: by name, or by a pattern of names, how what engines make of a buffer becomes one: "first" keeps what
            the engine with the batch's first shard has, "sum" adds up what each part has added, "mean" averages. Left
            out, running statistics are averaged, and the first of all others kept.
        scheduler_every: "step" or "epoch": when the scheduler is stepped. With "epoch", ReduceLROnPlateau looks at the
            loss on `val`; a metric takes its place by name, "val_accuracy".
        sync_batchnorm: whether every BatchNorm takes the statistics of the global batch instead of those of each part,
            as nn.SyncBatchNorm does anyway.
        prove: so many first steps are computed in this process, too, before `fit` returns, and held against those of
            the run; see `Run.prove`.
        strategy: "data": every engine has the whole model and a part of the batch; "pipeline": every engine has a part
            of the model; "tensor": every engine has a part of every large layer; "hybrid": several pipelines, or
            several teams that divide layers; or what `dnb.plan` returned. "auto" is "data" for models of less than
            64 MB, and otherwise what `dnb.plan` finds; it takes two seconds to measure, and `run.events` says what was
            chosen and why.
        stages: of a pipeline: modules of the model, or their names, each of which gets what the one before it gives;
            cut where the model allows it if left out.
        schedule: of a pipeline: "gpipe", "1f1b", "interleaved" or "zero-bubble".
        mesh: engines along each axis, as "data=2,pipeline=2" or "data=2,tensor=2"; all engines in one team if left out.
        tensor_plan: which layers are divided, and how: {"layers.*.up": "colwise", "layers.*.down": "rowwise"}; what the
            model itself says, or what can be shown to be right, if left out.
        memory_limit: bytes per engine for parameters, gradients, activations and input, a number or such as "500 MB":
            what cannot fit is refused, and a pipeline is cut so that it fits. An engine that is measured to hold more
            goes on, and the run's events say so.
        sync: "hub" in this release.
        checkpoint_every: steps between two checkpoints, which `dnb.resume` continues from; one more is written at
            the end. None writes none by itself.
        checkpoint_keep: how many of the last checkpoints stay.
        checkpoint_best: the best one by this stays too: "val_loss" or another loss, "max:accuracy", "min:error". What
            is measured in evaluations ("val_...") gets a checkpoint whenever it is the best so far.
        transport: "memory" or "socket", how gradients and parameters travel; chosen for each engine if left out; a
            dictionary chooses by engine.
        telemetry: whether engines measure what they do.
        name: of the run and its folder .dnb/runs/<name>, with a number behind it if that is taken; made from the
            model's class if left out.
        pool: where to train; the kernel's own if left out, started if there is none.

    Raises:
        ArgumentError: an argument is wrong, or a run is active; nothing was started.
        PlanError: what is asked is not in this release.
    """
    check_model(model)
    seed = check_seed(seed)
    check_flags(shuffle=shuffle, exact=exact, telemetry=telemetry, sync_batchnorm=sync_batchnorm)
    settings = notebook_settings()
    check_extra_states(model)
    if not isinstance(strategy, Plan):
        check_choice(strategy, name="strategy", known=STRATEGIES, available=STRATEGIES)
    check_choice(sync, name="sync", known=SYNCS, available=("hub",))
    check_choice(precision, name="precision", known=PRECISIONS, available=PRECISIONS)
    most_bytes = read_bytes(memory_limit)
    num_sampled = USUAL_STEPS if prove is None else check_positive(prove, name="prove")
    loss_function = read_loss(loss, step=step)
    check_optimizer_fits(optimizer, model, lr=lr)
    check_pace(scheduler, every=scheduler_every, has_val=val is not None)
    if after_step is not None and not callable(after_step):
        raise ArgumentError(f"after_step is a {type(after_step).__name__}: give a callable(model)")
    refuse_global_hooks()
    rules = {} if buffers is None else read_buffer_rules(buffers, model)
    train_source = read_source(train, name="train", seed=seed)
    val_source = None if val is None else read_source(val, name="val", seed=seed)
    check_val_step(val_step, has_val=val is not None)
    check_metrics_are_computed(metrics, step=step)
    order = order_of(train_source, batch_size=batch_size, shuffle=shuffle, seed=seed)
    job = Job(
        model=model,
        loss=loss_function,
        step=step,
        metrics=read_metrics(metrics),
        optimizer=optimizer,
        lr=None if lr is None else check_number(lr, name="lr"),
        scheduler=scheduler,
        order=order,
        after_step=after_step,
        val_step=val_step,
        val_order=None if val_source is None else val_source.order,
    )
    policy = read_checkpoint_policy(
        checkpoint_every,
        keep=checkpoint_keep,
        best=checkpoint_best,
        metrics=None if step is not None or val_step is not None else list(job.metrics),
        has_val=val is not None,
    )
    data = Data(train=train_source.data, val=None if val_source is None else val_source.data)
    rehearsed = rehearse(job, data, Options(seed=seed, precision=precision, loss_over=loss_over))
    job, data = rehearsed.job, rehearsed.data
    wished_over = read_loss_over(loss_over)
    loss_over = check_loss_over(wished_over or rehearsed.loss_over, job)
    whole_metrics = whole_metrics_of(job, rehearsed.whole_metrics)
    division, strategy = Division.synced(
        model, wants_all=bool(sync_batchnorm), strategy=strategy, exact=exact, transport=transport
    )
    if isinstance(strategy, Plan) and strategy.partition is not None:
        division = Division.of_plan(strategy, job, data, batch_size=order.batch_size, exact=exact, transport=transport)
    elif strategy in ("pipeline", "tensor", "hybrid"):
        division = Division.of(
            job,
            data,
            strategy=str(strategy),
            stages=stages,
            schedule=schedule,
            mesh=mesh,
            tensor_plan=tensor_plan,
            batch_size=order.batch_size,
            micro_batch=micro_batch,
            exact=exact,
            transport=transport,
        )
        job = dataclasses.replace(job, stages=division.stages)
    elif stages is not None or mesh is not None or tensor_plan is not None:
        raise PlanError(
            "stages=, mesh= and tensor_plan= divide a model: strategy='pipeline', 'tensor' or 'hybrid' does that"
        )
    steps_per_epoch = count_batches(order)
    num_steps = steps_per_epoch * check_positive(epochs, name="epochs")
    wish = check_name(name) or type(model).__name__.lower()
    check_place()
    pool = pool or current_pool() or start()
    refuse_busy_or_empty(pool)
    followed = strategy if isinstance(strategy, Plan) else None
    choice = ""
    if strategy == "auto" and loss_over == "samples":
        followed, choice = choose_plan(
            job,
            data,
            pool,
            num_samples=train_source.num_samples,
            batch_size=order.batch_size,
            exact=exact,
            transport=transport,
            sys_path=own_path(),
            memory_limit=most_bytes,
        )
        if followed is not None:
            division = Division.of_plan(
                followed, job, data, batch_size=order.batch_size, exact=exact, transport=transport
            )
    if division is not None:
        division.check_pool(pool)
        division = division.for_loss(loss_over, micro_batch=micro_batch)
        division.check_metrics(whole_metrics)
    gathers = loss_over == "batch" or (division is None and gathers_for(whole_metrics, wished=wished_over))
    if most_bytes is not None:
        limit = Limit(most_bytes, job, data, batch_size=order.batch_size, precision=precision)
        division = limit.settle(division, followed, num_engines=len(working_engines(pool)), micro_batch=micro_batch)
    spec = RunSpec(
        id=uuid.uuid4().hex,
        name=wish,
        folder="",
        num_samples=train_source.num_samples,
        num_val_samples=count_val_samples(val_source),
        num_steps=num_steps if steps is None else check_positive(steps, name="steps"),
        steps_per_epoch=steps_per_epoch,
        batch_size=order.batch_size,
        num_shards=_num_shards(shards, exact=exact, pool=pool, batch_size=order.batch_size)
        if division is None
        else division.num_teams,
        exact=bool(exact),
        transport=read_transport(transport),
        telemetry=bool(telemetry),
        seed=seed,
        clip_norm=None if clip_norm is None else check_number(clip_norm, name="clip_norm"),
        micro_batch=None if micro_batch is None else check_positive(micro_batch, name="micro_batch"),
        precision=precision,
        linger_seconds=pool.linger_seconds,
        notes=(),
        sys_path=own_path(),
        job=NOTHING,
        data=NOTHING,
        checkpoints=policy,
        plain=plain_job(loss=loss, step=step, optimizer=optimizer, scheduler=scheduler, metrics=metrics, job=job),
        partitions=() if division is None else division.partitions,
        team_size=None if division is None else division.team_size,
        ties=() if division is None else division.ties,
        choice=choice,
        memory_limit=most_bytes,
        prediction=None if followed is None else followed.prediction,
        findings=(
            *rehearsed.findings,
            *mode_findings(model),
            *findings_of_loss(loss_over, is_divided=division is not None),
            *findings_of_metrics(whole_metrics, is_divided=division is not None, has_val=val is not None),
        ),
        probe=rehearsed.probe,
        probe_samples=rehearsed.probe_samples,
        settings=settings,
        reduction="samples" if gathers else rehearsed.reduction,
        whole_metrics=whole_metrics,
        loss_over="batch" if gathers else loss_over,
        num_sampled=num_sampled,
        scheduler_every=scheduler_every,
        val_batch_size=val_batch_size(job, batch_size=order.batch_size, loss_over=loss_over),
        buffers=rules,
        sync_batchnorm=bool(sync_batchnorm),
    )
    spec, submission = _submit(pool, spec, job, data)
    run = Run(
        spec.name,
        pool.hub,
        folder=Path(spec.folder),
        model=model,
        optimizer=optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
        scheduler=scheduler if isinstance(scheduler, LRScheduler) else None,
        order=OrderFollower(order, steps_per_epoch=spec.steps_per_epoch),
        after_step=after_step,
        key=pool.key,
    )
    run.num_steps, run.steps_per_epoch = spec.num_steps, spec.steps_per_epoch
    run.submission = submission
    return _proved(pool.follow(run), prove)


def _submit(pool: Pool, spec: RunSpec, job: Job, data: Data) -> tuple[RunSpec, Submission]:
    """`submit`, and what is kept to compute the run's first steps again."""
    shipped: list[bytes] = []

    def ship_job(name: str, pool: Pool, segments: list[Segment]) -> tuple[bytes, ParcelRef]:
        pickled, ref = ship(job, name, pool, segments)
        shipped.append(pickled)
        return pickled, ref

    spec = submit(pool, spec, ship_job, partial(ship, data))
    return spec, Submission(spec=spec, job=shipped[0], data=data)


def _proved(run: Run, steps: int | None) -> Run:
    """The run, whose first steps were computed here, too, if that was asked for; it goes on whatever comes of it."""
    if steps is not None:
        try:
            proof = run.prove(steps)
            log.log(logging.INFO if proof.is_same else logging.WARNING, proof.verdict)
        except KeyboardInterrupt:
            log.warning("run %r goes on; %%dtrain prove computes its first steps here", run.name)
        except USER_ERRORS as error:
            log.warning("run %r goes on, and could not be proved: %s", run.name, summary_of(error))
    return run


def findings_of_loss(loss_over: str, *, is_divided: bool) -> tuple[Finding, ...]:
    """What the run's events say of a loss that looks at the whole batch."""
    if loss_over != "batch":
        return ()
    how = "it is computed once, on the outputs of all micro-batches" if is_divided else "outputs are gathered"
    return (Finding(kind="loss", text=f"this loss looks at the whole batch: {how}"),)


def gathers_for(metrics: Sequence[str], *, wished: str | None) -> bool:
    """Tell whether outputs are gathered for metrics alone.

    Raises:
        ArgumentError: the user wants no gathering.
    """
    if metrics and wished == "samples":
        raise ArgumentError(
            f"{called(metrics)} computed of all samples at once, and loss_over='samples' gathers no outputs: leave "
            "loss_over or the metric out"
        )
    return bool(metrics)


def findings_of_metrics(names: Sequence[str], *, is_divided: bool, has_val: bool) -> tuple[Finding, ...]:
    """What the run's events say of metrics that are computed of all samples at once."""
    if not names:
        return ()
    how = [] if is_divided else ["outputs are gathered"]
    how += ["one engine evaluates all validation data"] if has_val and not is_divided else []
    text = f"{called(names)} computed of all samples at once"
    return (Finding(kind="metrics", text=f"{text}: {', and '.join(how)}" if how else text),)


def val_batch_size(job: Job, *, batch_size: int, loss_over: str) -> int | None:
    """Samples of the batches that evaluations compute whole; None: they may be cut anywhere."""
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


def attach(
    name: str | None = None, *, model: torch.nn.Module | None = None, steer: bool = False, clear: bool = False
) -> Run:
    """Find a run again, after a kernel restart, beside the kernel that steers it, or in its folder.

    Args:
        name: of the run; the one that a pool's hub holds if left out.
        model: gets the trained state when the run ends, like the one that was given to `fit`.
        steer: take over from a living kernel, which then only watches; from one that is gone anyway.
        clear: first remove the records of pools of other hosts and containers that do not answer from here, and those
            of other versions of dnb whose processes are gone; what has died on this host is cleared anyway.

    Raises:
        ArgumentError: no folder has that name, or it was written by a newer dnb.
        PoolError: nothing is running; says which pools were found that cannot be reached.
    """
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"a run is found by its name, a text, not {name!r}: dnb.attach('digits')")
    pool, told = current_pool(), list[str]()
    if pool is None or clear:
        pool, told = _adopt_any(clear=clear)
    if pool is not None and steer:
        pool.take_over()
    held = None if pool is None else pool.facts.run
    if pool is not None and held is not None and name in (None, held):
        if pool.run is not None and pool.run.name == held and model is None:
            return pool.run
        run = pool.follow(Run(held, pool.hub, folder=RUNS_FOLDER / held, model=model, key=pool.key))
        if not pool.is_steered_here:
            log.warning(
                "run %r is steered by the kernel with pid %d, this one watches: %%dtrain attach --steer takes over",
                held,
                pool.facts.owner.pid if pool.facts.owner is not None else 0,
            )
        return run
    if name is not None:
        with long_work(f"reading run {name!r} from its folder"):
            return Run.open(RUNS_FOLDER / name)
    found = "; ".join(told) or "no pool holds a run"
    raise PoolError(f"nothing to attach to: {found}. dnb.attach('NAME') reads one that has ended from .dnb/runs")


NOTHING = ParcelRef(buffers=(), arrays=(), segment=None)


Ship = Callable[[str, "Pool", "list[Segment]"], tuple[bytes, ParcelRef]]  # name, pool, segments that it adds to


def submit(pool: Pool, spec: RunSpec, ship_job: Ship, ship_data: Ship) -> RunSpec:
    """Ship everything once; if the hub refuses, folder and shared memory are given back.

    Args:
        pool: where the run goes.
        spec: of the run; what it is called is only a wish.
        ship_job: see `ship`.
        ship_data: likewise.

    Returns:
        The spec with the run's own name and folder.
    """
    segments: list[Segment] = []
    try:
        with reserved_folder(spec.name) as folder:
            spec = msgspec.structs.replace(spec, name=folder.name, folder=str(folder))
            job_bytes, job_ref = ship_job(f"{spec.name}-job", pool, segments)
            data_bytes, data_ref = ship_data(f"{spec.name}-data", pool, segments)
            notes = tuple(segment.note for segment in segments if segment.note)
            spec = msgspec.structs.replace(spec, job=job_ref, data=data_ref, notes=notes)
            frames = [_encoded(spec), job_bytes, data_bytes]
            with long_work(f"handing run {spec.name!r} to the hub"):
                pool.hub.ask(Submit(), Done, frames=[*frames, sign(pool.key, frames)], timeout_seconds=120.0)
    except BaseException:
        for segment in segments:
            segment.unlink()
        raise
    return spec


def _encoded(spec: RunSpec) -> bytes:
    try:
        return msgspec.msgpack.encode(spec)
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{error.object!a} is no text, as a file name in another encoding: a run cannot be sent with it"
        ) from error


def ship(obj: Job | Data, name: str, pool: Pool, segments: list[Segment]) -> tuple[bytes, ParcelRef]:
    """Pickle an object, its tensors into shared memory."""
    try:
        pickled, ref, segment = pack(obj, name=name, folders=pool.segment_folders)
    except (SpaceError, KeyboardInterrupt):
        raise
    except USER_ERRORS as error:
        raise _why_unpicklable(obj) or error from error
    if segment is not None:
        segments.append(segment)
    return pickled, ref


def _why_unpicklable(obj: Job | Data) -> Exception | None:
    if isinstance(obj, Job):
        names = ("model", "loss", "step", "metrics", "optimizer", "scheduler", "after_step", "val_step")
        named = {name: getattr(obj, name) for name in names}
        named["the sampler"] = obj.order
        named["the sampler of val"] = obj.val_order
    else:
        named = {"train": obj.train.samples, "train's collate_fn": obj.train.collate}
        if obj.val is not None:
            named |= {"val": obj.val.samples, "val's collate_fn": obj.val.collate}
    found = (explain_unpicklable(value, name=name) for name, value in named.items())
    return next((error for error in found if error is not None), None)


def own_path() -> tuple[str, ...]:
    """Where this kernel imports from; folders whose names are no text are left out, as they cannot be sent."""
    found = (os.path.abspath(path) for path in ["", *sys.path])
    return tuple(path for path in found if is_text(path))


def _num_shards(shards: Any, *, exact: bool, pool: Pool, batch_size: int) -> int:
    if shards is None:
        choose = choose_exact_shards if exact else choose_num_shards
        num_workers = sum(status.state != "spare" for status in pool.statuses)
        return choose(max(num_workers, 1), batch_size=batch_size)
    num_shards = check_positive(shards, name="shards")
    if num_shards > batch_size:
        raise ArgumentError(f"shards={num_shards} is more than the {batch_size} samples of a batch: use at most that")
    return num_shards


def check_optimizer_fits(optimizer: Any, model: torch.nn.Module, *, lr: Any) -> None:
    """Refuse what is no optimizer, or one of other parameters."""
    check_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    if lr is not None:
        raise ArgumentError("lr is for an optimizer given by name: this one has its own learning rate")
    own = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ArgumentError(
            f"{strangers} of the optimizer's parameters are not the model's: build it on model.parameters()"
        )


def plain_job(*, loss: Any, step: Any, optimizer: Any, scheduler: Any, metrics: Any, job: Job) -> PlainJob:
    """What of a job is words and numbers; the rest only pickle can keep."""
    order = job.order
    is_object = {
        "loss": loss is not None and not isinstance(loss, str),
        "step": step is not None,
        "optimizer": not isinstance(optimizer, str),
        "scheduler": scheduler is not None,
        "metrics": are_objects(metrics),
        "after_step": job.after_step is not None,
        "val_step": job.val_step is not None,
        "val": job.val_order is not None,
        "train": not (order.sampler is None and order.batch_sampler is None and order.generator is None),
    }
    return PlainJob(
        loss=loss if isinstance(loss, str) else None,
        optimizer=optimizer if isinstance(optimizer, str) else None,
        lr=job.lr,
        metrics=() if are_objects(metrics) else tuple(job.metrics),
        shuffle=order.shuffle,
        drop_last=order.drop_last,
        others=tuple(name for name, found in is_object.items() if found),
    )


def refuse_busy_or_empty(pool: Pool) -> None:
    """Refuse a pool that cannot take a run now."""
    facts = pool.await_engines()
    if not facts.engines and facts.returning:
        raise PoolError(
            f"the hub was started again, and none of its {len(facts.returning)} engines has come back yet: "
            "%dtrain status says when they are there, %dtrain add 2 starts others"
        )
    if not facts.engines:
        raise PoolError("no engine of the pool is alive: %dtrain add 2 starts some")
    if facts.run is not None and facts.run_status not in ENDED:
        raise ArgumentError(
            f"run {facts.run!r} is active: wait for it with %dtrain wait, or end it with %dtrain stop, "
            "before the next fit"
        )


def _already(pool: Pool, *, asked: int | None) -> str:
    num_engines = len(pool.engines)
    differs = asked is not None and asked != num_engines
    change = f"; %dtrain shutdown first to start {asked}" if differs else ""
    if asked is not None and asked > num_engines:
        change = f"; %dtrain add {asked - num_engines} makes them {asked}"
    return f"a pool of {num_engines} engines is already running, and is used{change}"


def _adopted(pool: Pool) -> str:
    facts = pool.facts
    return (
        f"found a pool of {len(facts.engines)} engines, which a kernel that is gone had started, and took it over: "
        f"run {facts.run!r} is {facts.run_status}; %dtrain attach shows it, %dtrain shutdown ends both"
    )


def _clear(found: Found, profile_dir: Path) -> list[str]:
    """Reap dead pools; say what else is there."""
    notices = [*_clear_dead(found, profile_dir), *found.doubtful]
    num_foreign = sum(len(facts.engines) for facts in found.foreign)
    if num_foreign:
        notices.append(f"another kernel runs {num_foreign} engines on this host, which share its cores")
    return notices


def _clear_dead(found: Found, profile_dir: Path, *, and_doubtful: bool = False) -> list[str]:
    """Remove what dead pools have left; a sentence, if there were any."""
    places = {"security_dir": profile_dir / "security", "log_dir": profile_dir / "log"}
    num_cleared = reap_dead(found, **places)
    if and_doubtful:
        num_cleared += clear_doubtful(found, **places)
    return [f"cleared what {num_cleared} dead pool{'s' if num_cleared > 1 else ''} had left"] if num_cleared else []


def _adopt_any(*, clear: bool) -> tuple[Pool | None, list[str]]:
    """Find a pool that holds a run: one whose kernel is gone, or else one that another kernel steers, to watch it.

    Returns:
        The pool, and sentences on what else was found.
    """
    global _pool
    profile_dir = profile_folder(None)
    with _changing:
        with long_work("looking for pools that hold a run"):
            found = find_pools(profile_dir / "security")
        told = [*_clear_dead(found, profile_dir, and_doubtful=clear), *found.doubtful]
        if current_pool() is None:
            _pool = _adopt_first(found.orphans, profile_dir, told=told)
            _pool = _pool or _adopt_first(found.foreign, profile_dir, wish="watch", told=told)
        return _pool, told


def _adopt_first(
    candidates: Sequence[PoolFacts],
    profile_dir: Path,
    *,
    wish: Literal["steer", "watch"] = "steer",
    told: list[str],
) -> Pool | None:
    """Take over, or watch, a pool that holds a run, if there is one; why others were passed over is added to `told`."""
    for facts in candidates:
        if facts.run is not None:
            try:
                return adopt_pool(Pool, facts, profile_dir=profile_dir, wish=wish)
            except (HubError, PoolError) as error:
                log.info("a pool that was found could not be taken: %s", error)
                told.append(str(error))
    return None
