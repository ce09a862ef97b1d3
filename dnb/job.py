"""The user's objects as they travel: what is trained, and on what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Sum:
    """A loss that is a mean over something other than samples, such as tokens that are not padding.

    The global loss is the sum of all totals over the sum of all weights, and so is its gradient.

    Args:
        total: scalar tensor, the summed loss.
        weight: how much it is a sum of.
    """

    total: torch.Tensor
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The user's objects that hub and engines both need."""

    model: torch.nn.Module
    loss: Callable[..., Any] | None
    step: Callable[..., Any] | None
    metrics: Mapping[str, Callable[..., Any]]
    optimizer: Any  # name | Optimizer on model.parameters() | callable(params) -> Optimizer
    lr: float | None
    scheduler: Any  # LRScheduler on that optimizer | callable(optimizer) -> LRScheduler | None
    order: Any  # planning.sample_order.BatchOrder
    stages: Sequence[torch.nn.Module] | None = (
        None  # of a pipeline, if the user has cut the model; they share its tensors
    )
    val_step: Callable[..., Any] | None = None  # instead of loss or step in evaluations
    after_step: Callable[..., Any] | None = None  # callable(model), run by the hub after each update
    val_order: Any = None  # of the samples of an evaluation, if val is a DataLoader

    def __setstate__(self, state: Any) -> None:
        """Read a pickle, also one of a release in which a job had fewer fields."""
        for place, each in enumerate(fields(self)):
            object.__setattr__(self, each.name, state[place] if place < len(state) else each.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set and how its samples become a batch."""

    samples: Any  # tuple of tensors or arrays | map-style Dataset
    collate: Callable[[list[Any]], Any] | None  # None: index the tensors at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The user's data, which only engines need."""

    train: DataSource
    val: DataSource | None
