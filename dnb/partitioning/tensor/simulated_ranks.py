"""Rehearses tensor parallelism in one process: a thread per engine, on a model of doubles, with backward.

A division is right if every engine gives the output of the whole model, and the gradients of all engines together are
those of the whole model. Parameters are moved a little first, as much of a model that was just made is zero, and what
is zero hides mistakes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.dry_run import first_line, users_line
from dnb.partitioning.tensor.styles import cut_dim
from dnb.protocol.run import TensorStyle

# Threads that wait for each other longer than this have come to different layers.
RANK_SECONDS = 60.0
NOISE = 0.2  # relative to weights as torch makes them
# Largest difference relative to a gradient's norm, and to the largest gradient's.
CLOSE = {torch.float64: (1e-7, 1e-10), torch.float32: (2e-3, 1e-5)}

Styles = Mapping[str, TensorStyle]
Evaluate = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True, slots=True)
class WholeResult:
    """A model that was computed whole.

    Args:
        model: a copy, whose parameters were moved.
        evaluate: gives a number that depends on all that a model gives.
        gradients: of that number, by name.
        value: that number.
    """

    model: nn.Module
    evaluate: Evaluate
    gradients: Mapping[str, torch.Tensor]
    value: torch.Tensor


def number_of(output: Any) -> torch.Tensor:
    """Sum an output to one number that depends on every element of its floating-point tensors."""
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            total = total + (leaf.double() * weights).sum()
    return total


def moved_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model in eval mode, all of whose parameters want gradients and are a little off."""
    moved = copy.deepcopy(model).to(dtype).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                scale = NOISE / max(parameter.shape[-1] if parameter.dim() > 1 else 4, 1) ** 0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=scale)
                parameter.requires_grad_(True)
    return moved


def whole_of(model: nn.Module, value: torch.Tensor, evaluate: Evaluate) -> WholeResult:
    """Compute a moved copy whole, with its gradients.

    Args:
        model: the copy.
        value: what `evaluate` gave for it.
        evaluate: computes other copies.
    """
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return WholeResult(model, evaluate, gradients, value.detach())


def fault_of(whole: WholeResult, styles: Styles, shares: Mapping[str, int], num_engines: int) -> str:
    """Compute a division on simulated ranks and describe where it differs from the whole; empty if nowhere."""
    group = _RankGroup(num_engines)
    ranks = [_Rank(whole, styles, shares, group, rank) for rank in range(num_engines)]
    threads = [threading.Thread(target=rank.run, name=f"dnb-rehearsal-{rank.rank}") for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [rank.error for rank in ranks if rank.error is not None]
    if raised:
        own = next((error for error in raised if not isinstance(error, threading.BrokenBarrierError)), raised[0])
        line = users_line(own)
        return first_line(own) + (f", at {line}" if line else "")
    return _difference(whole, ranks)


def _difference(whole: WholeResult, ranks: Sequence[_Rank]) -> str:
    dtypes = {gradient.dtype for gradient in whole.gradients.values()}
    relative, absolute = CLOSE[torch.float64 if dtypes == {torch.float64} else torch.float32]
    scale = max((float(gradient.norm()) for gradient in whole.gradients.values()), default=0.0)
    if any(not torch.allclose(rank.value, whole.value, rtol=relative, atol=absolute * scale) for rank in ranks):
        return "the output differs from the whole model's"
    for name, wanted in whole.gradients.items():
        bound = relative * float(wanted.norm()) + absolute * scale
        for found in _gradients_of(name, ranks):
            if found is None or found.shape != wanted.shape or not float((found - wanted).norm()) <= bound:
                return f"the gradient of {name!r} differs from the whole model's"
    return ""


def _gradients_of(name: str, ranks: Sequence[_Rank]) -> list[torch.Tensor | None]:
    """Return a parameter's gradients as all ranks together have it, or as each has it whole."""
    parts = [rank.parameters[name].grad for rank in ranks]
    dim = ranks[0].dims.get(name)
    present = [part for part in parts if part is not None]
    if dim is None or len(present) < len(parts):
        return list(parts)
    return [torch.cat(present, dim)]


class _RankGroup:
    """Threads that hand each other tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=RANK_SECONDS)
        self._tensors: list[torch.Tensor] = [torch.empty(0)] * size

    def gather(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._tensors[rank] = tensor
        self.barrier.wait()
        found = list(self._tensors)
        self.barrier.wait()
        return found

    def sum(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        first, *others = self.gather(rank, tensor.detach())
        total = first.clone()
        for other in others:
            total += other
        return total


class _Rank:
    """One engine."""

    def __init__(
        self, whole: WholeResult, styles: Styles, shares: Mapping[str, int], group: _RankGroup, rank: int
    ) -> None:
        self.rank = rank
        self.value = torch.zeros(())
        self.error: BaseException | None = None
        self.dims: dict[str, int] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self._group = group
        self._evaluate = whole.evaluate
        self._model = self._divided(whole.model, styles)
        for path, number in shares.items():
            owner, _, attribute = path.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, number)

    def run(self) -> None:
        try:
            value = self._evaluate(self._model)
            value.backward()
            self.value = value.detach()
        except USER_ERRORS as error:  # whatever a user's model raises is the fault of the division
            self.error = error
            self._group.barrier.abort()

    def _divided(self, whole: nn.Module, styles: Styles) -> nn.Module:
        names = dict(whole.named_parameters())
        own = {name: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for name, p in names.items()}
        shared: dict[int, Any] = {id(p): own[name] for name, p in names.items()}
        shared |= {id(buffer): buffer for buffer in whole.buffers()}
        model = copy.deepcopy(whole, shared)
        by_id = {id(p): name for name, p in own.items()}
        self.parameters.update(own)
        for path, style in styles.items():
            layer = model.get_submodule(path)
            for key, parameter in list(layer._parameters.items()):
                if parameter is not None:
                    layer._parameters[key] = self._part(by_id[id(parameter)], parameter, cut_dim(layer, key, style))
            layer.__dict__["forward"] = partial(_forward, layer, style, self._group, self.rank)
        return model

    def _part(self, name: str, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        if dim is None:
            return parameter
        if name not in self.dims:
            self.dims[name] = dim
            local = parameter.detach().chunk(self._group.size, dim)[self.rank]
            self.parameters[name] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        part = self.parameters[name]
        assert isinstance(part, nn.Parameter)
        return part


def _forward(layer: nn.Module, style: TensorStyle, group: _RankGroup, rank: int, values: torch.Tensor) -> torch.Tensor:
    """Compute a divided layer's output on one rank."""
    if isinstance(layer, nn.Embedding):
        if style.startswith("rowwise"):
            return _apply(_Total, _rows_of(layer, values, rank), group, rank)
        output = functional.embedding(values, layer.weight, layer.padding_idx)
    elif style.startswith("rowwise"):
        assert isinstance(layer, nn.Linear)
        part = _apply(_Cut, values, group, rank) if style == "rowwise_rep" else values
        total = _apply(_Total, functional.linear(part, layer.weight), group, rank)
        return total if layer.bias is None else total + layer.bias
    else:
        assert isinstance(layer, nn.Linear)
        output = functional.linear(_apply(_Shared, values, group, rank), layer.weight, layer.bias)
    return _apply(_Joined, output, group, rank) if style == "colwise_rep" else output


def _apply(function: Any, values: torch.Tensor, group: _RankGroup, rank: int) -> torch.Tensor:
    result: torch.Tensor = function.apply(values, group, rank)
    return result


def _rows_of(layer: nn.Embedding, words: torch.Tensor, rank: int) -> torch.Tensor:
    first = rank * len(layer.weight)
    is_here = (words >= first) & (words < first + len(layer.weight))
    local = (words - first).clamp(0, len(layer.weight) - 1)
    found = functional.embedding(local, layer.weight)
    if layer.padding_idx is not None:
        found = torch.where((words == layer.padding_idx).unsqueeze(-1), found.detach(), found)
    return found * is_here.unsqueeze(-1)


class _Shared(torch.autograd.Function):
    """The same everywhere; its gradient is the sum of all."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: _RankGroup, rank: int) -> torch.Tensor:
        ctx.place = group, rank
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        group, rank = ctx.place
        return group.sum(rank, gradient), None, None


class _Total(torch.autograd.Function):
    """The sum of all."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: _RankGroup, rank: int) -> torch.Tensor:  # noqa: ARG004
        return group.sum(rank, values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # noqa: ARG004
        return gradient, None, None


class _Joined(torch.autograd.Function):
    """All parts, one after the other."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: _RankGroup, rank: int) -> torch.Tensor:
        ctx.place = group, rank
        return torch.cat(group.gather(rank, values.detach()), -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        group, rank = ctx.place
        return gradient.chunk(group.size, -1)[rank], None, None


class _Cut(torch.autograd.Function):
    """The own part of what is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: _RankGroup, rank: int) -> torch.Tensor:
        ctx.place = group, rank
        return values.chunk(group.size, -1)[rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        group, rank = ctx.place
        return torch.cat(group.gather(rank, gradient), -1), None, None
