"""Backward from multiples of losses, so that all that is added up in one slab has one unit."""

from __future__ import annotations

import torch

from dnb.user_code.loss_weights import LossPart


class ScaledBackward:
    """The units of gradients in slabs, and backward in them."""

    def __init__(self) -> None:
        self._slab = -1  # that is under way
        self._unit: float | None = None  # of what is added up in it, once there is something
        self._units: dict[int, float | None] = {}  # likewise, of slabs
        self._root_gradient: tuple[object, torch.Tensor] = None, torch.empty(0)  # of backward; mostly the same again

    def begin(self, slab: int, *, fresh: bool) -> None:
        """Add up gradients in a slab; in a fresh one, from zero."""
        self._slab = slab
        self._unit = None if fresh else self._units.get(slab)

    def end(self) -> None:
        """Remember the unit of what is in the slab by now."""
        self._units[self._slab] = self._unit

    def run(self, part: LossPart) -> float:
        """Go back from a part of a batch's loss, and return the unit of its gradients."""
        unit = part.unit
        if part.is_sum:
            unit = self._unit = self._unit or unit  # one for all that is added up in a slab
        if part.tensor.requires_grad:
            self._go_back(part.tensor, part.factor / unit)
        return unit

    def _go_back(self, loss: torch.Tensor, scale: float) -> None:
        """Compute the gradients of a multiple of a loss, without a product that autograd would have to follow."""
        if type(loss) is not torch.Tensor:
            (loss * scale).backward()
            return
        key = scale, loss.dtype, loss.shape
        if self._root_gradient[0] != key:
            self._root_gradient = key, torch.full_like(loss, scale, requires_grad=False)
        loss.backward(self._root_gradient[1])
