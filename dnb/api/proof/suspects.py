"""Usual reasons for which a run and one process compute different numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dnb.api.proof.comparison import MOST_NAMES, ROUNDING, ProvedStep
from dnb.api.proof.plain_steps import apply_loss
from dnb.engine.replicas.sync_batch_norm import normalizing_layers
from dnb.errors import USER_ERRORS
from dnb.hub.parameters.buffer_rules import default_rule
from dnb.job import DataSource, Job, Sum
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.copies import copy_together
from dnb.transport.system.process_settings import notebook_settings
from dnb.user_code.loader import fetch_batch
from dnb.user_code.module_modes import Modes

BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
# So many samples show what forward draws and writes.
MOST_TRIED = 4
# Of the notebook, by which numbers differ.
SETTINGS = ("default_dtype", "deterministic", "matmul_precision", "numpy_errors")


def suspects_of(job: Job, source: DataSource, spec: RunSpec, *, first: ProvedStep) -> list[str]:
    """List likely reasons for a difference, the likeliest first.

    Args:
        job: of the run, after some steps in this process.
        source: of its samples.
        spec: its numbers.
        first: step that differs.
    """
    data, layers, code = _drawing_data(source, spec), _random_layers(job.model), _drawing_code(job, source, spec)
    norms = _batch_norms(job.model, spec) + _synced_norms(job.model, spec)
    found = [*_changed_settings(spec), *data, *layers, *code, *norms]
    if not (data or code):  # else two losses of one batch differ
        found += _loss_over_batch(job, source, spec) or (
            [] if layers or norms else _model_over_batch(job, source, spec)
        )
    found += _ruled_buffers(job, source, spec)
    if first.step > 1:
        found.append(
            f"steps 1 to {first.step - 1} are the same, so that the update of step {first.step - 1} is not: hooks on "
            "the optimizer, a scheduler, or code that writes parameters; or rounding that grows, if lr is high"
        )
    elif not found:
        found.append(
            "code that differs: engines may have imported another state of it; %dtrain shutdown, then start the pool"
        )
    return found


def _modules(model: torch.nn.Module, is_one: Callable[[torch.nn.Module], bool]) -> str:
    names = [name or type(model).__name__ for name, module in model.named_modules() if is_one(module)]
    shown = ", ".join(repr(name) for name in names[:MOST_NAMES])
    return f"{shown} and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else shown


def _random_layers(model: torch.nn.Module) -> list[str]:
    def draws(module: torch.nn.Module) -> bool:
        rate = getattr(module, "p", None) if "Dropout" in type(module).__name__ else getattr(module, "dropout", None)
        return module.training and isinstance(rate, int | float) and rate > 0

    names = _modules(model, draws)
    if not names:
        return []
    return [
        f"dropout ({names}) draws other numbers in each part of a batch than in the whole: prove the model with p=0"
    ]


def _batch_norms(model: torch.nn.Module, spec: RunSpec) -> list[str]:
    synced = _synced(model, spec)
    names = _modules(model, lambda module: isinstance(module, BATCH_NORMS) and module.training and module not in synced)
    if not names:
        return []
    return [
        f"BatchNorm ({names}) takes its statistics from each part of a batch, as with DDP: that is a stated difference"
    ]


def _synced(model: torch.nn.Module, spec: RunSpec) -> set[torch.nn.Module]:
    return {module for _, module in normalizing_layers(model, all_of_them=spec.sync_batchnorm)}


def _synced_norms(model: torch.nn.Module, spec: RunSpec) -> list[str]:
    synced = _synced(model, spec)
    names = _modules(model, lambda module: module in synced and module.training)
    if not names:
        return []
    if spec.micro_batch is not None:
        how = f"of all engines' micro-batches of at most {spec.micro_batch} samples each, not of the whole batch"
    else:
        how = "of all engines' parts, added up in another order than those of the whole batch are"
    return [f"SyncBatchNorm ({names}) takes its statistics {how}"]


def _drawing_code(job: Job, source: DataSource, spec: RunSpec) -> list[str]:
    """Find a forward, loss or step function that draws random numbers, beside layers of dropout."""
    try:
        copies = copy_together(job, None)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # what cannot be copied was shipped in another way, and is no suspect
        return []
    own, before = copies.generators.states(), _global_states()
    if not _forward(copies.small, source, spec):
        return []
    drawn = [each for each, a, b in zip(copies.generators, own, copies.generators.states(), strict=True) if a != b]
    if drawn:
        names = _holders(copies.small.model, drawn)
        where = f" ({names})" if names else ""
        return [f"a random generator of your own{where} draws other numbers in each part of a batch than in the whole"]
    if _global_states() == before or _random_layers(job.model):
        return []
    return [
        "forward or the loss draws random numbers, others in each part of a batch than in the whole: prove the model "
        "without them"
    ]


def _holders(model: torch.nn.Module, generators: list[Any]) -> str:
    """Name the attributes of a model that are these generators."""
    ids = {id(each) for each in generators}
    names = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if id(getattr(value, "bit_generator", value)) in ids
    ]
    return ", ".join(repr(name) for name in names[:MOST_NAMES])


def _global_states() -> list[bytes]:
    bits = np.random.get_state()
    return [repr(random.getstate()).encode(), repr(bits).encode(), torch.get_rng_state().numpy().tobytes()]


def _forward(job: Job, source: DataSource, spec: RunSpec) -> bool:
    """Compute the loss of a few samples as a step does; return True if it can be computed."""
    try:
        with torch.enable_grad():
            apply_loss(job, fetch_batch(source, torch.arange(min(MOST_TRIED, spec.num_samples, spec.batch_size))))
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:
        return False
    return True


def _ruled_buffers(job: Job, source: DataSource, spec: RunSpec) -> list[str]:
    """Buffers that forward changes, other than the statistics of BatchNorm."""
    statistics = {id(b) for module in job.model.modules() if isinstance(module, BATCH_NORMS) for b in module.buffers()}
    before = {n: b.detach().clone() for n, b in job.model.named_buffers() if id(b) not in statistics}
    if not before or not _forward(job, source, spec):
        return []
    now = dict(job.model.named_buffers())
    changed = [name for name, old in before.items() if name in now and not _is_equal(old, now[name])]
    if not changed:
        return []
    shown = ", ".join(
        f"{name!r} by the rule {spec.buffers.get(name) or default_rule(name, before[name])!r}"
        for name in changed[:MOST_NAMES]
    )
    return [
        f"forward changes buffers, which become one from those of the parts of a batch ({shown}), and in one process "
        "are those of the whole batch: buffers= gives another rule"
    ]


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _changed_settings(spec: RunSpec) -> list[str]:
    """Settings of this process that are not those with which the run began."""
    if spec.settings is None:
        return []
    now, then = notebook_settings(), spec.settings
    changed = [name for name in SETTINGS if getattr(now, name) != getattr(then, name)]
    changed += [name for name, value in now.flags.items() if then.flags.get(name, value) != value]
    changed += sorted(name for name in now.variables if now.variables[name] != then.variables.get(name))
    if not changed:
        return []
    return [
        f"settings of this notebook are not what they were at fit: {', '.join(changed[:MOST_NAMES])}; set them as they "
        "were, and prove again"
    ]


def _drawing_data(source: DataSource, spec: RunSpec) -> list[str]:
    """Samples that are not the same when they are looked at twice."""
    if source.collate is None:
        return []
    first, again = (fetch_batch(source, torch.arange(min(4, spec.num_samples))) for _ in range(2))
    pairs = zip(torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(again), strict=False)
    if all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor)):
        return []
    return ["the data set draws random numbers for each sample, and engines draw others than one process"]


def _loss_over_batch(job: Job, source: DataSource, spec: RunSpec) -> list[str]:
    """Find a loss that is not the mean of those of two halves."""
    found = _whole_and_parts(job, source, spec, mode=False)
    if found is None:
        return []
    whole, mean, number = found
    return [
        f"the loss looks at the whole batch: of {number} samples it is {whole:.4g}, and the mean of their halves "
        f'{mean:.4g}; loss_over="batch" computes it on the gathered outputs, and dnb.Sum is for a mean over something '
        "else than samples"
    ]


def _model_over_batch(job: Job, source: DataSource, spec: RunSpec) -> list[str]:
    """Find a model that looks at the whole batch while it trains, in a way that no layer of torch does."""
    if _whole_and_parts(job, source, spec, mode=True) is None:
        return []
    return [
        "forward looks at the whole batch while the model trains, as for statistics of it: engines take those of their "
        "parts"
    ]


def _whole_and_parts(job: Job, source: DataSource, spec: RunSpec, *, mode: bool) -> tuple[float, float, int] | None:
    """Return the loss of some samples, and the mean of their halves, if they differ by more than rounding."""
    if spec.loss_over == "batch" or spec.reduction == "sum":
        return None
    half = max(1, min(spec.batch_size, spec.num_samples) // 2)
    modes, buffers = Modes([job.model]), [(b, b.detach().clone()) for b in job.model.buffers()]
    modes.set_training(mode=mode)
    try:
        with torch.no_grad():
            loss = [_value(job, source, indices) for indices in _halves(half)]
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # then it is no suspect
        return None
    finally:
        modes.set_training(mode=True)
        _put_back(buffers)
    (whole, weight), *parts = loss
    mean = sum(total for total, _ in parts) / (sum(each for _, each in parts) or 1.0)
    rounding = ROUNDING.get(min((p.element_size() for p in job.model.parameters()), default=4), 1e-2)
    if abs(mean - whole / (weight or 1.0)) <= rounding * max(abs(mean), 1e-30):
        return None
    return whole / (weight or 1.0), mean, 2 * half


def _put_back(buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for buffer, old in buffers:
            if buffer.shape == old.shape:
                buffer.copy_(old)


def _halves(half: int) -> list[torch.Tensor]:
    return [torch.arange(2 * half), torch.arange(half), torch.arange(half, 2 * half)]


def _value(job: Job, source: DataSource, indices: torch.Tensor) -> tuple[float, float]:
    with torch.enable_grad():
        loss = apply_loss(job, fetch_batch(source, indices))
    if isinstance(loss, Sum):
        return float(loss.total), loss.weight
    return float(loss) * len(indices), float(len(indices))
