"""The buffers of a model in an engine: as the hub has them before a step, and in a slab after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dnb.engine.runtime.loose_states import EngineStates
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.protocol.memory import Layout
from dnb.transport.layout import slot_views


class ModelBuffers:
    """The buffers of a whole model, and its states that have no place in the layout.

    Args:
        model: as unpacked; its buffers become copies of those in the memory.
        master: parameters and buffers in the memory, by name.
        layout: of buffers in a slab.
        memory: with the slabs.
        rules: of buffers, by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        master: Mapping[str, torch.Tensor],
        *,
        layout: Layout,
        memory: EngineMemory,
        rules: Mapping[str, str],
    ) -> None:
        self._master = master
        self._layout = layout
        self._memory = memory
        self._places: list[tuple[torch.nn.Module, str, torch.Tensor, str]] = []
        self._views: dict[int, dict[str, torch.Tensor]] = {}  # by slab
        self._found = 0, b""  # step, and what its first shard has made of the states
        self.is_writer = True  # of a team, one engine is
        for name, buffer in model.named_buffers():
            buffer.data = master[name].clone()
            self._places.append((*buffer_owner(model, name), buffer, name))
        self.states = EngineStates(model, placed=[name for *_, name in self._places], rules=rules)

    def move(self, layout: Layout) -> None:
        """Go on with slabs of another layout."""
        self._layout = layout
        self._views.clear()

    def read(self) -> None:
        """Let the model have its buffers and states as the hub has them."""
        for module, key, own, name in self._places:
            put_back(module, key, own, self._master[name])
        self.states.begin()

    def write(self, slab: int) -> None:
        """Copy the buffers into a slab, as forward has left them."""
        if not self._places or not self.is_writer:
            return
        views = self._views.get(slab)
        if views is None:
            views = self._views[slab] = slot_views(self._layout, self._memory.slabs[slab].memory)
        for module, key, own, name in self._places:
            now, master = module._buffers.get(key, own), self._master[name]
            views[name].copy_(now.detach() if now is not None and fits(now, master) else master)

    def found_states(self, step: int) -> bytes:
        """Return the states that have changed in a step; empty if they were not collected in it."""
        return self._found[1] if self._found[0] == step else b""

    def collect_states(self, step: int) -> None:
        """Pack the states that have changed, with buffers that do not fit into their places any more."""
        misfits: dict[str, torch.Tensor | None] = {}
        for module, key, own, name in self._places:
            now = module._buffers.get(key, own)
            if not fits(now, self._master[name]) or self.states.is_loose(name):
                misfits[name] = now
        self._found = step, self.states.collect(misfits)

    def keep(self) -> list[torch.Tensor | None]:
        """Return the buffers as the last forward has left them; no other forward shall change these tensors."""
        found = [module._buffers[key] for module, key, _, _ in self._places]
        # The graph may hold them: the next forward gets others instead of these with other values.
        self._places = [(module, key, own.clone(), name) for module, key, own, name in self._places]
        return found

    def put(self, buffers: Sequence[torch.Tensor | None]) -> None:
        """Let the model have buffers that were kept."""
        for (module, key, _, _), buffer in zip(self._places, buffers, strict=True):
            module._buffers[key] = buffer


def fits(buffer: torch.Tensor | None, place: torch.Tensor) -> bool:
    """Return whether a buffer still has the shape and dtype of its place."""
    return buffer is not None and buffer.shape == place.shape and buffer.dtype == place.dtype


def put_back(module: torch.nn.Module, key: str, own: torch.Tensor, master: torch.Tensor) -> None:
    """Let a module have its own buffer again, as the hub has it."""
    if own.shape == master.shape:
        own.copy_(master)
    else:  # user code has given it other data
        own.data = master.clone()
    module._buffers[key] = own


def buffer_owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return the module that holds a tensor, and its name there."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
