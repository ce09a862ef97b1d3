"""Samples of the gradients of a run's first steps, for those who compare runs."""

from __future__ import annotations

import torch

from dnb.hub.parameters.master import StepResult
from dnb.protocol.client_messages import GradientRows
from dnb.protocol.memory import Layout


class GradientSamples:
    """Some elements of all gradients, with loss and norm, while their layout is that of the first step.

    Args:
        layout: of the gradients.
        last_step: the last one that is looked at.
    """

    def __init__(self, layout: Layout, *, last_step: int) -> None:
        self._layout = layout
        self._last_step = last_step
        self._rows: dict[int, torch.Tensor] = {}  # by step: loss, norm, some elements

    def wants(self, step: int, layout: Layout) -> bool:
        """Return whether some elements of this step's gradients are kept."""
        return step <= self._last_step and layout is self._layout

    def add(self, step: int, result: StepResult) -> None:
        """Keep what was seen of a step's gradients, if anything was."""
        if result.sample is not None:
            numbers = torch.tensor([result.loss, result.grad_norm], dtype=torch.float64)
            self._rows[step] = torch.cat([numbers, result.sample])

    def read(self) -> tuple[GradientRows, list[bytes]]:
        """Return all of them, and their numbers."""
        names = tuple(slot.name for slot in self._layout.slots)
        rows = [row.numpy().tobytes() for row in self._rows.values()]
        return GradientRows(steps=tuple(self._rows), names=names), [b"".join(rows)]
