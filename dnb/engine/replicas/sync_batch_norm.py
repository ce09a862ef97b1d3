"""BatchNorm whose statistics are those of all engines of a team: one exchange in forward, and one in backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SharedBatch:
    """A switch for the statistics of a batch that engines share; off, they are those of the samples at hand."""

    def __init__(self) -> None:
        self.is_on = False


def synchronize(modules: Sequence[_BatchNorm], exchange: SharedBatch) -> None:
    """Let normalizing layers of this process take the statistics of the whole team."""
    for module in modules:
        module.__dict__["forward"] = partial(_forward, module, exchange)


def _forward(module: _BatchNorm, exchange: SharedBatch, inputs: torch.Tensor) -> torch.Tensor:
    if not (module.training and exchange.is_on):
        return _BatchNorm.forward(module, inputs)  # SyncBatchNorm's own looks for a GPU
    module._check_input_dim(inputs)
    normalize: Any = _Normalize.apply
    output, mean, variance, count = normalize(inputs, module.weight, module.bias, module.eps)
    if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
        momentum = module.momentum
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            momentum = 1.0 / float(module.num_batches_tracked) if momentum is None else momentum
        _move(module.running_mean, mean, momentum or 0.0)
        _move(module.running_var, variance * (count / max(count - 1, 1)), momentum or 0.0)
    return output  # type: ignore[no-any-return]


@torch.no_grad()
def _move(running: torch.Tensor, now: torch.Tensor, momentum: float) -> None:
    running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)


class _Normalize(torch.autograd.Function):
    """Normalize by the statistics of all engines' samples; one count, mean and variance of each are put together."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: Any, bias: Any, eps: float) -> Any:
        """Give the output, and mean, variance and count of all."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        values = inputs.to(wide)
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        variance, mean = torch.var_mean(values, axes, correction=0)
        own = torch.cat([torch.tensor([values.numel() / values.shape[1]]).double(), mean.double(), variance.double()])
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        each = torch.stack(found)
        counts, means, variances = each[:, :1], *each[:, 1:].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        scale = (variance + eps).rsqrt().to(wide)
        normal = (values - _wide(mean.to(wide), inputs)) * _wide(scale, inputs)
        output = normal if weight is None else normal * _wide(weight.to(wide), inputs)
        output = output if bias is None else output + _wide(bias.to(wide), inputs)
        ctx.save_for_backward(normal, scale, weight)
        ctx.count, ctx.axes, ctx.has_bias = count, axes, bias is not None
        output = output.to(inputs.dtype)
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance, count.item()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        """Compute gradients that come in from all engines, as the statistics depend on all samples."""
        normal, scale, weight = ctx.saved_tensors
        wide = gradient.to(normal.dtype)
        of_bias, of_weight = wide.sum(ctx.axes), (wide * normal).sum(ctx.axes)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([of_bias, of_weight]).double()
            dist.all_reduce(sums)
            shift, slope = (sums / ctx.count).to(normal.dtype)
            of_inputs = wide - _wide(shift, wide) - normal * _wide(slope, wide)
            of_inputs = of_inputs * _wide(scale if weight is None else scale * weight.to(scale.dtype), wide)
            of_inputs = of_inputs.to(gradient.dtype)
        return (
            of_inputs,
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(gradient.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            None,
        )


def _wide(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shape one value for each channel so that it spreads over a tensor."""
    return values.view(1, -1, *(1,) * (like.dim() - 2))


def normalizing_layers(model: nn.Module, *, all_of_them: bool) -> list[tuple[str, _BatchNorm]]:
    """Layers whose statistics are to be those of the whole batch: SyncBatchNorm, or each that normalizes batches."""
    kind = _BatchNorm if all_of_them else nn.SyncBatchNorm
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def has_own_forward(module: _BatchNorm) -> bool:
    """Return True if a layer does more than torch's own, so that it cannot be computed here."""
    return type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
