"""The memory that an engine needs for its part of a model: parameters, gradients, activations and inputs.

Nothing is computed for it: forwards are rehearsed without data, and what autograd would keep is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.dry_run import DryRun, no_autocast
from dnb.partitioning.pipeline.stage_module import StagePart
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.protocol.run import Partition

Loss = Callable[[Any], Any]  # of the model's output


@dataclass(frozen=True, slots=True)
class Need:
    """The bytes that one engine has to hold at once."""

    parameter_bytes: int  # buffers included
    gradient_bytes: int
    activation_bytes: int | None  # of all micro-batches in flight, inputs included; None: the model cannot be rehearsed

    @property
    def num_bytes(self) -> int:
        """In all; at least, if activations are not known."""
        return self.parameter_bytes + self.gradient_bytes + (self.activation_bytes or 0)


@dataclass(slots=True)
class _Kept:
    """The memory that autograd keeps for backward, each piece counted once."""

    left_out: frozenset[int]
    seen: dict[int, int] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.add(tensor)
        return tensor

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.left_out:
            self.seen[storage._cdata] = storage.nbytes()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            yield

    @property
    def num_bytes(self) -> int:
        return sum(self.seen.values())


def whole_need(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss: Loss | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = no_autocast,
) -> Need:
    """Estimate the memory of an engine that has the whole model, for one micro-batch.

    Args:
        model: what is trained.
        inputs: of the micro-batch.
        loss: of the output, if it can be rehearsed.
        autocast: what surrounds every forward.
    """

    def forward(*values: Any) -> Any:
        names = list(inputs.keywords)
        named = dict(zip(names, values[len(values) - len(names) :], strict=True))
        return model(*values[: len(values) - len(names)], **named)

    parts = [StagePart(_Function(forward), tuple(range(len(inputs.values))), (), (), {}, {})]
    kept = _kept_by_stage(model, parts, inputs, loss, autocast)
    return _need(model.parameters(), model.buffers(), None if kept is None else kept[0])


def needs_of(
    model: nn.Module,
    parts: Sequence[StagePart],
    partition: Partition,
    inputs: Inputs,
    *,
    num_micro_batches: int,
    loss: Loss | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = no_autocast,
) -> tuple[Need, ...]:
    """Estimate the memory of each engine of a pipeline, in the order of their ranks.

    Args:
        model: what is divided.
        parts: its stages.
        partition: which engine has which of them.
        inputs: of one micro-batch.
        num_micro_batches: of a step.
        loss: of the output, if it can be rehearsed.
        autocast: what surrounds every forward.
    """
    kept = _kept_by_stage(model, parts, inputs, loss, autocast)
    return tuple(
        _need_of_rank(parts, partition, rank, kept, num_micro_batches=num_micro_batches)
        for rank in range(partition.num_engines)
    )


def _need_of_rank(
    parts: Sequence[StagePart], partition: Partition, rank: int, kept: Sequence[int] | None, *, num_micro_batches: int
) -> Need:
    stages = range(rank, len(parts), partition.num_engines)
    held = num_held(partition, rank, num_micro_batches)
    parameters = {name: each for stage in stages for name, each in parts[stage].parameters.items()}
    buffers = {name: each for stage in stages for name, each in parts[stage].buffers.items()}
    # Of several stages on an engine the largest are taken to be in flight.
    activations = None if kept is None else round(held * sum(kept[stage] for stage in stages) / len(stages))
    return _need(parameters.values(), buffers.values(), activations)


def num_held(partition: Partition, rank: int, num_micro_batches: int) -> int:
    """Count the micro-batches whose activations an engine holds at once, per stage.

    GPipe holds all; 1F1B as many as there are stages from its own on; interleaved as in Megatron-LM (Narayanan et al.
    2021, section 2.2.2), whose warm-up is 2 (p - rank - 1) + (v - 1) p forwards.
    """
    size, per_engine = partition.num_engines, partition.num_stages // partition.num_engines
    every = per_engine * num_micro_batches
    if partition.schedule == "gpipe":
        return every
    if per_engine == 1:
        return min(every, size - rank)
    return min(every, 2 * (size - rank - 1) + (per_engine - 1) * size + 1)


def _need(parameters: Iterable[nn.Parameter], buffers: Iterable[torch.Tensor], activations: int | None) -> Need:
    held = list(parameters)
    return Need(
        parameter_bytes=_bytes_of(held) + _bytes_of(buffers),
        gradient_bytes=_bytes_of(parameter for parameter in held if parameter.requires_grad),
        activation_bytes=activations,
    )


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Function(nn.Module):
    """A function as a stage."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Any) -> Any:
        return self.function(*values)


def _kept_by_stage(
    model: nn.Module,
    parts: Sequence[StagePart],
    inputs: Inputs,
    loss: Loss | None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[int] | None:
    """Return the bytes that each stage keeps of one micro-batch; None if the model needs values."""
    dry_run = DryRun(model, autocast)
    try:
        values = [dry_run.convert(value) for value in inputs.values]
        with dry_run.running():
            return list(_run(model, parts, values, loss))
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # a user's forward may do anything with a value that is none
        return None


def _run(model: nn.Module, parts: Sequence[StagePart], values: Sequence[Any], loss: Loss | None) -> Iterator[int]:
    known = frozenset(parameter.untyped_storage()._cdata for parameter in model.parameters())
    passed: Any = ()
    for stage, part in enumerate(parts):
        kept = _Kept(known)
        received = _received(passed) if stage else ()
        own = [values[position] for position in part.inputs]
        for tensor in tree_leaves((received, own)):
            if isinstance(tensor, torch.Tensor):
                kept.add(tensor)
        with kept.watching():
            passed = part.module(*received, *own)
            if stage == len(parts) - 1 and loss is not None:
                _try(loss, passed)
        yield kept.num_bytes


def _received(passed: Any) -> tuple[Any, ...]:
    """Detach the values that came over a cut: no stage keeps alive the results of the one before it."""
    return tuple(
        value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in passed
    )


def _try(loss: Loss, output: Any) -> None:
    try:
        loss(output)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # a user's loss may need values; it keeps little beside the model
        return
