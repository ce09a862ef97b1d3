"""Usual reasons for which a run and one process compute different numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dnb.engine.loader import fetch_batch
from dnb.errors import USER_ERRORS
from dnb.plain_steps import apply_loss
from dnb.proofs import MOST_NAMES, ROUNDING, ProvedStep
from dnb.records import RunSpec
from dnb.transport.job import DataSource, Job, Sum


def suspects_of(job: Job, source: DataSource, spec: RunSpec, *, first: ProvedStep) -> list[str]:
    """What may be the reason for a difference, likely ones first.

    Args:
        job: of the run, after some steps in this process.
        source: of its samples.
        spec: its numbers.
        first: step that differs.
    """
    found = [
        *_drawing_data(source, spec),
        *_random_layers(job.model),
        *_batch_norms(job.model, spec),
        *_loss_over_batch(job, source, spec),
    ]
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
    kinds = torch.nn.modules.batchnorm._BatchNorm
    names = _modules(model, lambda module: isinstance(module, kinds) and module.training)
    if not names or spec.sync_batchnorm:
        return []
    return [
        f"BatchNorm ({names}) takes its statistics from each part of a batch, as with DDP: that is a stated difference"
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
    """A loss that is not the mean of those of two halves."""
    if spec.loss_over == "batch" or spec.reduction == "sum":
        return []
    half = max(1, min(spec.batch_size, spec.num_samples) // 2)
    model = job.model.eval()
    try:
        with torch.no_grad():
            loss = [_value(job, source, indices) for indices in _halves(half)]
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # then it is no suspect
        return []
    finally:
        model.train()
    (whole, weight), *parts = loss
    mean = sum(total for total, _ in parts) / (sum(each for _, each in parts) or 1.0)
    rounding = ROUNDING.get(min((p.element_size() for p in model.parameters()), default=4), 1e-2)
    if abs(mean - whole / (weight or 1.0)) <= rounding * max(abs(mean), 1e-30):
        return []
    return [
        f"the loss looks at the whole batch: of {2 * half} samples it is {whole / (weight or 1.0):.4g}, and the mean "
        f'of their halves {mean:.4g}; loss_over="batch" computes it on the gathered outputs, and dnb.Sum is for a mean '
        "over something else than samples"
    ]


def _halves(half: int) -> list[torch.Tensor]:
    return [torch.arange(2 * half), torch.arange(half), torch.arange(half, 2 * half)]


def _value(job: Job, source: DataSource, indices: torch.Tensor) -> tuple[float, float]:
    with torch.enable_grad():
        loss = apply_loss(job, fetch_batch(source, indices))
    if isinstance(loss, Sum):
        return float(loss.total), loss.weight
    return float(loss) * len(indices), float(len(indices))
