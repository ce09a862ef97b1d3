"""Calls a model with a few samples as a run will, to a number that depends on all that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dnb.partitioning.tensor.simulated_ranks import number_of


class ModelTrial:
    """One batch, and the functions of a run.

    Args:
        batch: a few samples.
        step: called if there is one, as it alone knows how the model is called.
        loss: called if the model's output does not say enough.
    """

    def __init__(
        self, batch: Any, *, step: Callable[..., Any] | None = None, loss: Callable[..., Any] | None = None
    ) -> None:
        self._step = step
        self._loss = loss
        self._given = batch
        self._batch = batch

    def convert(self, dtype: torch.dtype) -> None:
        """Convert the samples to this precision, for all calls that follow."""
        self._batch = pytree.tree_map_only(
            torch.Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, self._given
        )

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        """Call a copy of the run's model."""
        batch = self._batch
        if self._step is not None:
            result = self._step(model, batch)
            return _tensor(result[0] if isinstance(result, tuple) else result)
        if isinstance(batch, Mapping):
            return _tensor(model(**batch).loss)
        *inputs, target = batch
        output = model(*inputs)
        value = number_of(output)
        if value.requires_grad or self._loss is None:
            return value
        return _tensor(self._loss(output, target))  # the output is an object of the user's own


def _tensor(loss: Any) -> torch.Tensor:
    total = getattr(loss, "total", loss)  # of a `Sum`
    if not isinstance(total, torch.Tensor):
        raise TypeError(f"the loss is a {type(total).__name__}, not a tensor")
    return total
