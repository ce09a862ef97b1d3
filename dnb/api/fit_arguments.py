"""The arguments of `fit`, as one record that can be handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from dnb.api.arguments.checks import USUAL_BATCH_SIZE
from dnb.errors import ArgumentError
from dnb.planning.search.plans import Plan

Given = ParamSpec("Given")
Result = TypeVar("Result")


def takes_pairs(*, num_positional: int) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Let a function say what to type where inputs and targets are given as two arguments.

    Args:
        num_positional: arguments that may be given by position.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        @wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            if len(args) > num_positional:
                raise ArgumentError("inputs and targets go together, as one pair: dnb.fit(model, (X, y))")
            return function(*args, **kwargs)

        return call

    return decorate


@dataclass(frozen=True, slots=True, kw_only=True)
class FitArguments:
    """The arguments of `fit` with its defaults, as they were given: nothing is checked. See there what each means."""

    model: torch.nn.Module
    train: Any
    val: Any = None
    loss: str | Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None
    optimizer: Any = "adamw"
    lr: float | None = None
    scheduler: Any = None
    batch_size: int = USUAL_BATCH_SIZE
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True
    seed: int = 0
    shards: int | None = None
    exact: bool = False
    micro_batch: int | None = None
    clip_norm: float | None = None
    precision: str = "float32"
    metrics: str | Mapping[str, Callable[..., Any]] | None = None
    val_step: Callable[..., Any] | None = None
    after_step: Callable[..., Any] | None = None
    loss_over: str | None = None
    buffers: Mapping[str, str] | None = None
    scheduler_every: str = "step"
    sync_batchnorm: bool = False
    prove: int | None = None
    strategy: str | Plan = "auto"
    stages: Sequence[str | torch.nn.Module] | None = None
    schedule: str = "1f1b"
    mesh: str | Mapping[str, int] | None = None
    tensor_plan: Mapping[str, Any] | None = None
    memory_limit: int | str | None = None
    sync: str = "hub"
    checkpoint_every: int | None = None
    checkpoint_keep: int = 2
    checkpoint_best: str | None = None
    transport: str | Mapping[int, str] | None = None
    telemetry: bool = True
    name: str | None = None
