"""The steps of a run as a plain loop of one process takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dnb.hub.parameters.optimizers import build_optimizer, build_scheduler
from dnb.job import DataSource, Job, Sum
from dnb.planning.sample_order import iterate_batches
from dnb.protocol.run import RunSpec
from dnb.user_code.loader import fetch_batch
from dnb.user_code.model_call import arguments_of
from dnb.user_code.module_modes import Modes
from dnb.user_code.return_values import read_loss, read_step


def plain_steps(job: Job, source: DataSource, spec: RunSpec) -> Iterator[float]:
    """Train in a plain loop; yield each step's loss when gradients are there, before anything is clipped or applied."""
    model = job.model
    Modes([model]).set_training(mode=True)
    optimizer = build_optimizer(job.optimizer, model.parameters(), lr=job.lr)
    scheduler = build_scheduler(job.scheduler, optimizer, every=spec.scheduler_every, has_val=spec.num_val_samples > 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, indices in enumerate(iterate_batches(job.order), 1):
        optimizer.zero_grad()
        total, value = _loss(job, fetch_batch(source, indices), spec)
        total.backward()
        yield value
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, spec.clip_norm)
        optimizer.step()
        if job.after_step is not None:
            with torch.no_grad():
                job.after_step(model)
        is_epoch_over = number % spec.steps_per_epoch == 0
        if isinstance(scheduler, ReduceLROnPlateau):
            if is_epoch_over:
                return  # it looks at an evaluation, which is not done here
        elif scheduler is not None and (spec.scheduler_every == "step" or is_epoch_over):
            scheduler.step()


def _loss(job: Job, batch: Any, spec: RunSpec) -> tuple[torch.Tensor, float]:
    """Return the loss of a whole batch, and its value."""
    with torch.enable_grad(), _autocast(spec):
        loss = apply_loss(job, batch)
    total = loss.total / loss.weight if isinstance(loss, Sum) else loss
    return total, total.item()


def apply_loss(job: Job, batch: Any) -> torch.Tensor | Sum:
    """Compute a batch's loss as the run does: by its step function, its loss or its model."""
    if job.step is not None:
        return read_step(job.step(job.model, batch), needs_gradient=True)[0]
    given = arguments_of(job.model, batch, has_target=job.loss is not None)
    output = job.model(*given.positional, **given.keywords)
    if job.loss is None:
        return read_step(output, needs_gradient=True, by="model")[0]
    return read_loss(job.loss(output, given.target), needs_gradient=True)


def _autocast(spec: RunSpec) -> Any:
    return nullcontext() if spec.precision == "float32" else torch.autocast("cpu", dtype=torch.bfloat16)
