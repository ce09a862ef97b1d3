"""Whether a loss can be computed from micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dnb.errors import USER_ERRORS, PlanError
from dnb.planning.calling import arguments_of
from dnb.transport.job import Sum
from dnb.transport.returned import read_loss, read_step

# So many samples are enough to see it, and few enough to compute in passing.
NUM_SAMPLES = 4
TOLERANCE = 1e-4


def check_loss_of_parts(model: nn.Module, loss: Callable[..., Any] | None, batch: Any) -> None:
    """Compute a loss of a few samples and of their halves, which must come to the same.

    Args:
        model: run without dropout, and left as it was; a forward or loss that raises is left to the run.
        loss: of output and target; None takes it from the output of a dictionary batch.
        batch: of at least `NUM_SAMPLES` samples; of fewer nothing can be seen.

    Raises:
        PlanError: it needs all samples of a batch at once.
    """
    half = NUM_SAMPLES // 2
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            whole = _loss(model, loss, _samples(batch, 0, NUM_SAMPLES))
            parts = [_loss(model, loss, _samples(batch, begin, begin + half)) for begin in (0, half)]
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # it will be told with engine, step and samples
        return
    finally:
        for module, mode in modes:
            module.training = mode
    of_parts = sum(total for total, _ in parts) / (sum(weight for _, weight in parts) or 1.0)
    of_whole = whole[0] / (whole[1] or 1.0)
    if abs(of_parts - of_whole) > TOLERANCE * max(abs(of_parts), abs(of_whole)):
        raise PlanError(
            f"the loss needs the whole batch: of {NUM_SAMPLES} samples it is {of_whole:.4g}, and the mean of their "
            f"halves {of_parts:.4g}, but a pipeline computes it from micro-batches. If it is a mean over something "
            "else than samples, return dnb.Sum(total, weight); else train with strategy='data' and shards=1"
        )


def _loss(model: nn.Module, loss: Callable[..., Any] | None, batch: Any) -> tuple[float, float]:
    """What is summed, and over how much."""
    given = arguments_of(model, batch, has_target=loss is not None)
    output = model(*given.positional, **given.keywords)
    if loss is not None:
        value = read_loss(loss(output, given.target), needs_gradient=False)
    else:
        value, _ = read_step(output, needs_gradient=False, by="model")
    if isinstance(value, Sum):
        return float(value.total), value.weight
    return float(value) * NUM_SAMPLES, NUM_SAMPLES


def _samples(batch: Any, begin: int, end: int) -> Any:
    def take(leaf: Any) -> Any:
        return leaf[begin:end] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    return tree_map(take, batch)
