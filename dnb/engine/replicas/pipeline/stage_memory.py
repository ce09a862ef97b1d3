"""The part of the hub's memory that one engine's stages use: parameters, buffers, and slots of a slab."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dnb.engine.runtime.bound_parameters import refuse_thawed, tensor_digest
from dnb.engine.runtime.gradients import Gradients
from dnb.engine.runtime.loose_states import EngineStates
from dnb.engine.runtime.model_buffers import buffer_owner, fits, put_back
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.engine.runtime.write_guard import WriteGuard
from dnb.errors import PlanError
from dnb.partitioning.pipeline.stage_module import StagePart
from dnb.protocol.engine_messages import Load, RankAssignment
from dnb.protocol.memory import Layout, Region, TensorSlot
from dnb.transport.layout import LARGE_ELEMENTS, dtype_named, slot_views


class StageMemory:
    """Binds what this engine's stages use, and touches nothing else.

    Args:
        model: the whole one; what is not used here stays where it is.
        load: the layouts of the memory.
        memory: parameters and slabs, shared by the team.
        parts: all stages.
        assignment: which of them are here.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        load: Load,
        memory: EngineMemory,
        parts: Sequence[StagePart],
        assignment: RankAssignment,
    ) -> None:
        self._model = model
        self._memory = memory
        self._layout = load.gradient_layout
        self._buffer_layout = load.buffer_layout
        self._num_engines = assignment.partition.num_engines
        self._rank = assignment.rank
        self._master = slot_views(load.parameter_layout, memory.parameters)
        self._bound: dict[str, torch.nn.Parameter] = {}
        self._buffers: list[tuple[torch.nn.Module, str, torch.Tensor, str]] = []
        self._buffer_views: dict[int, dict[str, torch.Tensor]] = {}
        self._indices = {slot.name: index for index, slot in enumerate(self._layout.slots)}
        self._slab_of = _slabs_of_parameters(parts, self._num_engines, assignment.rank)
        self.adopt(parts, trains=True)
        self._gradients = {offset: self._gradients_at(offset) for offset in sorted({0, *self._slab_of.values()})}
        self._written_buffers = _written_buffers(parts, self._buffer_layout, self._num_engines, assignment.rank)

    def adopt(self, parts: Sequence[StagePart], *, trains: bool) -> None:
        """Bind what stages for another shape, or another mode, use besides.

        Raises:
            PlanError: they train what they did not use before.
        """
        for stage in range(self._rank, len(parts), self._num_engines):
            for name, parameter in parts[stage].parameters.items():
                if trains and name in self._indices and name not in self._slab_of:
                    raise PlanError(f"stage {stage} uses {name!r} for batches of one shape only: a pipeline cannot")
                if name not in self._bound:
                    parameter.data = self._master[name]
                    self._bound[name] = parameter
            known = {name for *_, name in self._buffers}
            for name, buffer in parts[stage].buffers.items():
                if name not in known:
                    buffer.data = self._master[name].clone()
                    self._buffers.append((*buffer_owner(self._model, name), buffer, name))
        self._guard = WriteGuard(self._bound, self._memory)

    def check_written(self, step: int) -> None:
        """Raise if user code has written or thawed a parameter that is bound here."""
        self._guard.check(step)
        for name, parameter in self._bound.items():
            if name not in self._indices and parameter.grad is not None:
                refuse_thawed(name, parameter)

    def begin(self, slabs: Sequence[int], *, fresh: bool) -> None:
        """Let backward write into these slabs from now on.

        Args:
            slabs: where first users of a parameter write, where second users do, ...; if too few are given, those with
                the next numbers.
            fresh: start from zero, and from the hub's buffers.
        """
        if fresh:
            self.read_buffers()
        for offset, gradients in self._gradients.items():
            slab = slabs[offset] if offset < len(slabs) else slabs[0] + offset
            if slab >= len(self._memory.slabs):
                raise PlanError(f"a parameter that {offset + 1} engines use needs {offset + 1} slabs")
            gradients.begin(slab, self._memory.slabs[slab], fresh=fresh)

    def finish(self) -> tuple[int, ...]:
        """Return all slots of the layout that got no gradient here."""
        used: set[int] = set()
        for offset, gradients in self._gradients.items():
            left = set(gradients.finish())
            names = [slot.name for slot in self._slots_at(offset)]
            used.update(self._indices[name] for index, name in enumerate(names) if index not in left)
        return tuple(index for index in range(len(self._layout.slots)) if index not in used)

    def first_fault(self) -> tuple[str, str] | None:
        """Return the first of the own slots whose gradient is not finite, by name, and its kind: "NaN" or "inf"."""
        return next((fault for g in self._gradients.values() if (fault := g.first_fault()) is not None), None)

    def read_buffers(self) -> None:
        """Take over what the hub has."""
        for module, key, own, name in self._buffers:
            put_back(module, key, own, self._master[name])

    def misfits(self, states: EngineStates) -> dict[str, torch.Tensor | None]:
        """Buffers that are this engine's to write, and do not fit into their places any more."""
        found: dict[str, torch.Tensor | None] = {}
        for module, key, own, name in self._buffers:
            now = module._buffers.get(key, own)
            is_loose = not fits(now, self._master[name]) or states.is_loose(name)
            if is_loose and name in self._written_buffers:
                found[name] = now
        return found

    def write_buffers(self, slab: int) -> None:
        """Put those that are this engine's to write behind the gradients."""
        if not self._written_buffers:
            return
        views = self._buffer_views.get(slab)
        if views is None:
            views = self._buffer_views[slab] = slot_views(self._buffer_layout, self._memory.slabs[slab].memory)
        own = {name: module._buffers.get(key, tensor) for module, key, tensor, name in self._buffers}
        for name in self._written_buffers:
            now, master = own.get(name), self._master[name]
            views[name].copy_(now.detach() if now is not None and fits(now, master) else master)

    def digests(self) -> bytes:
        """Return digests as `Replica.digests` does, for the parameters that are bound here."""
        found = []
        for slot in self._memory.layout.slots:
            own, master = self._bound.get(slot.name), self._master[slot.name]
            is_own_copy = own is not None and (own.data_ptr() != master.data_ptr() or own.shape != master.shape)
            found.append(tensor_digest(own) if own is not None and is_own_copy else 0)
        return np.array(found, dtype=np.uint32).tobytes()

    def close(self) -> None:
        """Let go of the gradients, and of the hub's memory.

        Graphs and stages refer to each other, and to the parameters: until that garbage is collected, which takes long,
        they would keep the memory of a run that is over.
        """
        for gradients in self._gradients.values():
            gradients.close()
        for parameter in self._bound.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        vars(self).pop("_guard", None)
        self._gradients, self._bound, self._master, self._buffer_views = {}, {}, {}, {}
        vars(self).pop("_memory", None)

    def _slots_at(self, offset: int) -> list[TensorSlot]:
        return [slot for slot in self._layout.slots if self._slab_of.get(slot.name) == offset]

    def _gradients_at(self, offset: int) -> Gradients:
        slots = self._slots_at(offset)
        return Gradients([self._bound[slot.name] for slot in slots], own_layout(self._layout, slots))


def own_layout(layout: Layout, slots: Sequence[TensorSlot]) -> Layout:
    """Return a part of a layout: its regions are the runs of small slots among `slots`, which alone are zeroed.

    Args:
        layout: of the whole slab.
        slots: some of its slots, in order.
    """
    position = {slot.name: index for index, slot in enumerate(layout.slots)}
    runs: list[list[TensorSlot]] = []
    for slot in slots:
        if _num_elements(slot) >= LARGE_ELEMENTS:
            continue
        before = runs[-1][-1] if runs else None
        if before is not None and position[before.name] + 1 == position[slot.name] and before.dtype == slot.dtype:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return Layout(slots=tuple(slots), regions=tuple(_region(run) for run in runs), num_bytes=layout.num_bytes)


def _region(run: Sequence[TensorSlot]) -> Region:
    size = dtype_named(run[0].dtype).itemsize
    end = run[-1].offset_bytes + _num_elements(run[-1]) * size
    begin = run[0].offset_bytes
    return Region(dtype=run[0].dtype, offset_bytes=begin, num_elements=(end - begin) // size)


def _num_elements(slot: TensorSlot) -> int:
    return int(np.prod(slot.shape, dtype=np.int64))


def _slabs_of_parameters(parts: Sequence[StagePart], num_engines: int, rank: int) -> dict[str, int]:
    """Choose the team's slab for each of the parameters here: the first user writes in the first, and so on.

    So no two engines write to one place, though they use one weight.
    """
    users: dict[str, list[int]] = {}
    for stage, part in enumerate(parts):
        for name, parameter in part.parameters.items():
            engines = users.setdefault(name, [])
            if parameter.requires_grad and stage % num_engines not in engines:
                engines.append(stage % num_engines)
    return {name: engines.index(rank) for name, engines in users.items() if rank in engines}


def _written_buffers(parts: Sequence[StagePart], layout: Layout, num_engines: int, rank: int) -> tuple[str, ...]:
    """List the buffers that this engine writes back: each is its first user's, else the first engine's."""
    owner: dict[str, int] = {}
    for stage, part in enumerate(parts):
        for name in part.buffers:
            owner.setdefault(name, stage % num_engines)
    return tuple(slot.name for slot in layout.slots if owner.get(slot.name, 0) == rank)
