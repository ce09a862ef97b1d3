"""One stage of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

WAY_OUT = "give the stages yourself: stages=[first, second, ...]"


@dataclass(frozen=True, slots=True)
class StagePart:
    """One stage: called with what it receives, then with its inputs; gives a tuple, the last one the model's output.

    Args:
        module: what it runs; its tensors are the model's own.
        inputs: positions among the model's inputs.
        receives: of the stage before it, as tensors without data that know whether they want a gradient.
        sends: to the stage behind it.
        parameters: those it uses, by the model's own names.
        buffers: likewise.
        begins: the name of its first module.
    """

    module: nn.Module
    inputs: tuple[int, ...]
    receives: tuple[torch.Tensor, ...]
    sends: tuple[torch.Tensor, ...]
    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    begins: str = ""


def described(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor without data, of the same shape, dtype and want of a gradient; rows are contiguous."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=value.requires_grad)
