"""A model that is measured without a trace: afterwards it is as it was, and so are random numbers and threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn


@contextmanager
def model_as_before(model: nn.Module) -> Iterator[None]:
    """Let a model train inside, its gradients freed as soon as they are there; afterwards everything is as it was."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = torch.zeros(max((parameter.numel() for parameter in trained), default=0))
    hooks = [p.register_post_accumulate_grad_hook(partial(_add_up, sums)) for p in trained]
    for parameter in model.parameters():
        parameter.grad = None
    model.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _add_up(sums: torch.Tensor, parameter: torch.Tensor) -> None:
    """Add a gradient to a sum, as every micro-batch of a run adds its own to the slab, and free it."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None and not gradient.is_sparse:
        sums[: gradient.numel()].view(gradient.shape).add_(gradient)


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Let torch use so many threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if num_threads is not None and num_threads != before:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
