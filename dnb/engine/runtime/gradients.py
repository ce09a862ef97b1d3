"""Gradients in a slab: backward writes each parameter's into its slot, and slots without one are reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dnb.engine.runtime.allocator import ration
from dnb.protocol.memory import Layout
from dnb.transport.layout import LARGE_ELEMENTS, region_views, slot_views
from dnb.transport.sockets.wires import Flat


class _Direct:
    """A large parameter: autograd makes the gradient, and a hook moves it into the slab at once.

    Nothing is zeroed first, and nothing read to be added to: two passes over the slab fewer.
    """

    __slots__ = ("index", "is_blank", "is_used", "parameter", "version", "view")

    def __init__(self, index: int, parameter: torch.nn.Parameter) -> None:
        self.index = index
        self.parameter = parameter
        self.view = parameter.detach()
        self.is_blank = True  # what the slab holds is of an earlier step
        self.is_used = False  # since `begin`
        self.version = 0  # of the view, at `begin`

    def collect(self) -> None:
        gradient = self.parameter.grad
        if gradient is None or gradient is self.view:
            return
        self.is_used = True
        if gradient.is_sparse and self.is_blank:
            self.view.zero_()
            self.view.add_(gradient)
        elif self.is_blank:
            self.view.copy_(gradient)
        else:
            self.view.add_(gradient)
        self.is_blank = False
        self.parameter.grad = self.view


class Gradients:
    """Binds the gradients of a model's parameters to one slab at a time.

    Args:
        parameters: those that are trained, in the order of the layout's slots.
        layout: of the gradients in a slab.
        is_written: called with a slot's index when backward has written it; called for every parameter, or None.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        layout: Layout,
        *,
        is_written: Callable[[int], None] | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._layout = layout
        self._is_written = is_written
        large = [index for index, p in enumerate(parameters) if p.numel() >= LARGE_ELEMENTS]
        self._direct = [_Direct(index, self._parameters[index]) for index in large]
        self._small = [index for index in range(len(self._parameters)) if index not in set(large)]
        self._slabs: dict[int, _SlabViews] = {}
        self._views: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._handles = [_registered(direct.parameter, self._hook_of(direct)) for direct in self._direct]
        if is_written is not None:
            self._handles += [_registered(self._parameters[index], self._notifier(index)) for index in self._small]

    def begin(self, slab: int, flat: Flat, *, fresh: bool) -> None:
        """Bind the gradients to this slab, into which backward writes from now on; a fresh one starts from zero."""
        views = self._slabs.get(slab)
        if views is None:
            views = self._slabs[slab] = _SlabViews(self._layout, flat, small=self._small)
        if fresh:
            for region in views.small_regions:
                region.zero_()
        self._views = views.gradients
        for direct in self._direct:
            direct.view = self._views[direct.index]
            direct.is_blank = fresh
            direct.is_used = False
            direct.version = direct.view._version
            direct.parameter.grad = None if fresh else direct.view
        for index in self._small:
            parameter, view = self._parameters[index], self._views[index]
            if parameter.grad is not view:
                parameter.grad = view
        self._versions = [self._views[index]._version for index in self._small]

    def versions(self) -> list[int]:
        """Return version numbers, some of which change with each backward, also with one that user code has run."""
        own = [view._version for view in self._views]
        for index in self._small if self._views else ():
            gradient = self._parameters[index].grad
            if gradient is not None and gradient is not self._views[index]:
                own.append(index)
        return own

    def bring_home(self) -> None:
        """Add to the slab, after a backward, gradients that user code has put elsewhere, as `zero_grad` does."""
        for direct in self._direct:
            direct.collect()
        for index in self._small:
            if self._parameters[index].grad is not self._views[index]:
                self._collect_small(index)

    def finish(self) -> tuple[int, ...]:
        """Return the slots that got no gradient since `begin`; in a fresh slab they are zero."""
        self.bring_home()
        unused: list[int] = []
        for direct in self._direct:
            if not direct.is_used and direct.view._version == direct.version:  # zero-bubble schedules call no hook
                unused.append(direct.index)
            if direct.is_blank:
                direct.view.zero_()
        unused += [
            index
            for index, version in zip(self._small, self._versions, strict=True)
            if self._views[index]._version == version
        ]
        return tuple(unused)

    def _collect_small(self, index: int) -> None:
        parameter, view = self._parameters[index], self._views[index]
        if parameter.grad is not None and parameter.grad is not view:
            view.add_(parameter.grad)
        parameter.grad = view

    def first_fault(self) -> tuple[str, str] | None:
        """Return the first slot whose gradient is not finite, by name, and its fault: "NaN" or "inf"."""
        for slot, view in zip(self._layout.slots, self._views, strict=True):
            if not torch.isfinite(view).all():
                return slot.name, "NaN" if torch.isnan(view).any() else "inf"
        return None

    def close(self) -> None:
        """Let the parameters go."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def _hook_of(self, direct: _Direct) -> Callable[[torch.Tensor], None]:
        is_written, collect, index = self._is_written, direct.collect, direct.index

        def hook(_parameter: torch.Tensor) -> None:
            collect()
            ration.check()
            direct.is_used = True
            if is_written is not None:
                is_written(index)

        return hook

    def _notifier(self, index: int) -> Callable[[torch.Tensor], None]:
        assert self._is_written is not None
        is_written = self._is_written

        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not self._views[index]:
                self._collect_small(index)
            is_written(index)

        return hook


def _registered(
    parameter: torch.nn.Parameter, hook: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call a hook for a parameter's gradients, also for one that user code has frozen for now."""
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True)
    handle: torch.utils.hooks.RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(is_trained)
    return handle


class _SlabViews:
    """One slab as tensors."""

    def __init__(self, layout: Layout, flat: Flat, *, small: Sequence[int]) -> None:
        self.gradients = list(slot_views(layout, flat.memory).values())
        regions = region_views(layout, flat.memory)
        self.small_regions = []
        slots = [layout.slots[index] for index in small]
        for region, tensor in zip(layout.regions, regions, strict=True):
            ends = [
                slot.offset_bytes + self.gradients[index].nbytes
                for index, slot in zip(small, slots, strict=True)
                if slot.dtype == region.dtype
            ]
            if ends:
                self.small_regions.append(tensor[: (max(ends) - region.offset_bytes) // tensor.element_size()])
