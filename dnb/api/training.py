"""`dnb.fit`: a model trained on the pool's engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dnb.api.arguments.checks import USUAL_BATCH_SIZE
from dnb.api.fit_arguments import FitArguments, takes_pairs
from dnb.api.launching import Pool, launch
from dnb.api.pools import current_pool, start
from dnb.api.run_request import read_request
from dnb.api.runs.run import Run
from dnb.api.runs.run_views import check_display, show_new_run
from dnb.planning.search.plans import Plan


@takes_pairs(num_positional=2)
def fit(  # noqa: PLR0913 - the user's own words, each a flag of %dtrain
    model: torch.nn.Module,
    train: Any,
    *,
    val: Any = None,
    loss: str | Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
    optimizer: Any = "adamw",
    lr: float | None = None,
    scheduler: Any = None,
    batch_size: int = USUAL_BATCH_SIZE,
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
    display: str | None = None,
    pool: Pool | None = None,
) -> Run:
    """Train a model on the pool's engines; returns at once, while training goes on.

    Args:
        model: trained in place: it holds the trained state when the run ends, stops or pauses.
        train: a pair (X, y) of tensors or arrays, a map-style Dataset, or a DataLoader (its data set, batch
            size, sampler and collate_fn count).
        val: data to validate on, of the same kinds as `train`; evaluated at the end of every epoch, over all engines.
        loss: callable(output, target) that returns a mean over samples, or a name of torch.nn.functional.
        step: instead of loss: callable(model, batch) -> loss | (loss, {"metric": value}) | `Sum`; what models return
            that compute their own loss will do too: (logits, loss), {"loss": loss}, or an object with `.loss`.
        optimizer: name, torch Optimizer on model.parameters(), or callable(params) -> Optimizer.
        lr: learning rate of an optimizer given by name; torch's default if left out.
        scheduler: LRScheduler on that optimizer, or callable(optimizer); stepped after every step.
        batch_size: samples of the global batch, over all engines together; a DataLoader brings its own.
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs.
        shuffle: draw samples in a new order every epoch, as a DataLoader with a generator seeded by `seed` does.
        seed: start of all random numbers: of sample order and of random numbers in the model.
        shards: logical shards into which a global batch is cut; by its size and the engines if left out.
        exact: losses and weights equal to the bit for any number and any change of engines: every shard is computed
            from the same beginning, and gradients are added up in the order of the shards.
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
        scheduler_every: when the scheduler is stepped: every "step" or every "epoch". With "epoch", ReduceLROnPlateau
            looks at the loss on `val`; a metric takes its place by name, "val_accuracy".
        sync_batchnorm: let every BatchNorm take the statistics of the global batch instead of those of each part,
            as nn.SyncBatchNorm does anyway.
        prove: number of first steps that are computed in this process, too, before `fit` returns, and held against
            those of the run; see `Run.prove`.
        strategy: "data": every engine has the whole model and a part of the batch; "pipeline": every engine has a part
            of the model; "tensor": every engine has a part of every large layer; "hybrid": several pipelines, or
            several teams that divide layers; or what `dnb.plan` returned. "auto" is "data" for models of less than
            64 MB, and otherwise what `dnb.plan` finds; it takes two seconds to measure, and `run.events` says what was
            chosen and why.
        stages: parts of a pipeline: modules of the model, or their names, each of which gets what the one before it
            gives; cut where the model allows it if left out.
        schedule: order of a pipeline's work: "gpipe", "1f1b", "interleaved" or "zero-bubble".
        mesh: engines along each axis, as "data=2,pipeline=2" or "data=2,tensor=2"; all engines in one team if left out.
        tensor_plan: which layers are divided, and how: {"layers.*.up": "colwise", "layers.*.down": "rowwise"}; what the
            model itself says, or what can be shown to be right, if left out.
        memory_limit: bytes per engine for parameters, gradients, activations and input, a number or such as "500 MB":
            what cannot fit is refused, and a pipeline is cut so that it fits. An engine that is measured to hold more
            goes on, and the run's events say so.
        sync: way in which gradients are put together: "hub" in this release.
        checkpoint_every: steps between two checkpoints, which `dnb.resume` continues from; one more is written at
            the end. None writes none by itself.
        checkpoint_keep: number of the last checkpoints that stay.
        checkpoint_best: the best one by this stays too: "val_loss" or another loss, "max:accuracy", "min:error". What
            is measured in evaluations ("val_...") gets a checkpoint whenever it is the best so far.
        transport: way of gradients and parameters, "memory" or "socket"; chosen for each engine if left out; a
            dictionary chooses by engine.
        telemetry: let engines measure their compute, wait, data and idle time, and memory.
        name: name of the run and its folder .dnb/runs/<name>, with a number behind it if that is taken; made from the
            model's class if left out.
        display: "widget", "display" (replaced every few seconds), "text" or "none": how the run is shown; chosen by
            what this kernel is attached to if left out. In a script, `wait` tells each epoch in a line.
        pool: where to train; the kernel's own if left out, started if there is none.

    Raises:
        ArgumentError: an argument is wrong, or a run is active; nothing was started.
        PlanError: what is asked is not in this release.
    """
    check_display(display)
    given = FitArguments(
        model=model,
        train=train,
        val=val,
        loss=loss,
        step=step,
        optimizer=optimizer,
        lr=lr,
        scheduler=scheduler,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        shuffle=shuffle,
        seed=seed,
        shards=shards,
        exact=exact,
        micro_batch=micro_batch,
        clip_norm=clip_norm,
        precision=precision,
        metrics=metrics,
        val_step=val_step,
        after_step=after_step,
        loss_over=loss_over,
        buffers=buffers,
        scheduler_every=scheduler_every,
        sync_batchnorm=sync_batchnorm,
        prove=prove,
        strategy=strategy,
        stages=stages,
        schedule=schedule,
        mesh=mesh,
        tensor_plan=tensor_plan,
        memory_limit=memory_limit,
        sync=sync,
        checkpoint_every=checkpoint_every,
        checkpoint_keep=checkpoint_keep,
        checkpoint_best=checkpoint_best,
        transport=transport,
        telemetry=telemetry,
        name=name,
    )
    request = read_request(given)
    run = launch(request, pool or current_pool() or start())
    show_new_run(run, display=display)
    return run
