"""Layers of which every engine of a team computes its part, and their parts of the hub's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

# Its functions have the group that is there when it is imported for a default, for ever: so there must be none.
import torch.distributed.nn.functional
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.hooks import RemovableHandle

from dnb.engine.replicas.pipeline.stage_memory import own_layout
from dnb.engine.runtime.gradients import Gradients
from dnb.partitioning.tensor.styles import cut_dim
from dnb.protocol.memory import Layout
from dnb.protocol.run import Partition, TensorStyle
from dnb.transport.layout import slot_views
from dnb.transport.sockets.wires import Flat


@dataclass(frozen=True, slots=True)
class DividedParameter:
    """A parameter of which this engine has a part, or which layers that are divided use whole.

    Args:
        name: the model's own.
        parameter: its local part is a view of the hub's memory.
        dim: along which it is cut; None: whole.
    """

    name: str
    parameter: nn.Parameter
    dim: int | None


class Entrance:
    """Layers that read one value, such as those for queries, keys and values, add up its gradient in one message."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._value: torch.Tensor | None = None
        self._state: tuple[int, bool] = (0, False)
        self._entered: DTensor | None = None

    def enter(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Called before a layer that is divided by columns, with what it is called with."""
        value, *others = inputs
        state = value._version, torch.is_grad_enabled()
        if value is not self._value or state != self._state or self._entered is None:
            self._value, self._state = value, state
            self._entered = DTensor.from_local(value, self._mesh, [Replicate()], run_check=False)
        return self._entered, *others

    def forget(self) -> None:
        """Forget the value of a pass that is over."""
        self._value = self._entered = None


@dataclass(frozen=True, slots=True)
class DividedModel:
    """The parameters that were divided, and the entrance of values into them."""

    parameters: Sequence[DividedParameter]
    entrance: Entrance


def divide(
    model: nn.Module, partition: Partition, group: ProcessGroup, master: Mapping[str, torch.Tensor]
) -> DividedModel:
    """Divide a model in place, by DTensor; no data is read or sent.

    Args:
        model: this process's own.
        partition: says which layers, and how.
        group: of the team; this engine's rank in it says which part is here.
        master: the parameters as they lie in the hub's memory.
    """
    mesh = DeviceMesh.from_group(group, "cpu")
    # DTensor keeps meshes for ever, and whoever waits for this engine is freed only when nothing refers to the group:
    # a mesh that has forgotten it finds it by its name.
    getattr(mesh, "_pg_registry", {}).clear()
    for path, number in partition.shares.items():
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, number)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[str, DividedParameter] = {}
    entrance = Entrance(mesh)
    for path, style in partition.styles.items():
        layer = model.get_submodule(path)
        own: dict[str, nn.Parameter] = {}
        for key, parameter in list(layer._parameters.items()):
            if parameter is None:
                continue
            name = names[id(parameter)]
            if name not in made:
                made[name] = _divided(name, parameter, cut_dim(layer, key, style), master[name], mesh)
            own[key] = layer._parameters[key] = made[name].parameter
        parallelize_module(layer, mesh, _torch_style(layer, style), src_data_rank=None)
        layer._parameters.update(own)  # a style wraps parameters anew, and so would untie those that are tied
        layer.register_forward_hook(_wait)
        if style.startswith("colwise") and isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(entrance.enter, prepend=True)
    return DividedModel(list(made.values()), entrance)


def _wait(_layer: nn.Module, _inputs: Any, output: Any) -> None:
    """Wait for a sum: one that nobody waited for would keep the group alive if the next layer raises."""
    if isinstance(output, AsyncCollectiveTensor):
        output.wait()


def _divided(name: str, old: nn.Parameter, dim: int | None, master: torch.Tensor, mesh: DeviceMesh) -> DividedParameter:
    placement: Placement = Replicate() if dim is None else Shard(dim)
    local = master if dim is None else master.chunk(mesh.size(), dim)[mesh.get_local_rank()]
    tensor = DTensor.from_local(local, mesh, [placement], run_check=False, shape=master.shape, stride=master.stride())
    return DividedParameter(name, nn.Parameter(tensor, requires_grad=old.requires_grad), dim)


def _torch_style(layer: nn.Module, style: TensorStyle) -> ParallelStyle:
    replicated = Replicate()
    is_table = isinstance(layer, nn.Embedding)
    match style:
        case "colwise":
            return ColwiseParallel()
        case "colwise_rep":
            return ColwiseParallel(output_layouts=replicated)
        case "rowwise":
            return RowwiseParallel(input_layouts=replicated if is_table else None)
        case "rowwise_rep":
            return RowwiseParallel(input_layouts=replicated)


class TeamGradients:
    """The team's one slab: every engine writes its part of what is divided, and the first one what is whole.

    It has the methods of `Gradients`.

    Args:
        layout: of the gradients in the slab.
        whole: parameters that every engine has whole, of the same gradient on each.
        divided: all others.
        rank: of this engine in the team.
        num_engines: of the team.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        whole: Mapping[str, nn.Parameter],
        divided: Sequence[DividedParameter],
        rank: int,
        num_engines: int,
    ) -> None:
        self._layout = layout
        self._indices = {slot.name: index for index, slot in enumerate(layout.slots)}
        slots = [slot for slot in layout.slots if slot.name in whole] if rank == 0 else []
        self._names = [slot.name for slot in slots]
        self._gradients = Gradients([whole[slot.name] for slot in slots], own_layout(layout, slots))
        self._strangers = list(whole.values()) if rank else []
        self._parts = [_PartialGradient(each, rank, num_engines) for each in divided if each.name in self._indices]
        self._views: dict[int, dict[str, torch.Tensor]] = {}

    def begin(self, slab: int, flat: Flat, *, fresh: bool) -> None:
        """Let backward write into this slab from now on; a fresh one starts from zero."""
        self._forget_strangers()
        self._gradients.begin(slab, flat, fresh=fresh)
        if slab not in self._views:
            self._views[slab] = slot_views(self._layout, flat.memory)
        for part in self._parts:
            part.begin(self._views[slab][part.name], fresh=fresh)

    def versions(self) -> list[int]:
        """Numbers of which some are others after each backward, also after one that user code has run."""
        return [*self._gradients.versions(), *(part.view._version for part in self._parts)]

    def bring_home(self) -> None:
        """After a backward: what user code put elsewhere is added to the slab."""
        self._gradients.bring_home()

    def finish(self) -> tuple[int, ...]:
        """Return all slots of the layout that got no gradient here since `begin`."""
        left = set(self._gradients.finish())
        used = {self._indices[name] for number, name in enumerate(self._names) if number not in left}
        for part in self._parts:
            part.finish()
            if part.is_used:
                used.add(self._indices[part.name])
        self._forget_strangers()
        return tuple(index for index in range(len(self._layout.slots)) if index not in used)

    def first_fault(self) -> tuple[str, str] | None:
        """Return the first of the own gradients that is not finite, by name, and its kind: "NaN" or "inf"."""
        for part in self._parts:
            if not torch.isfinite(part.view).all():
                return part.name, "NaN" if torch.isnan(part.view).any() else "inf"
        return self._gradients.first_fault()

    def close(self) -> None:
        """Let the parameters go."""
        self._gradients.close()
        self._forget_strangers()
        for part in self._parts:
            part.close()

    def _forget_strangers(self) -> None:
        for parameter in self._strangers:
            parameter.grad = None


class _PartialGradient:
    """Moves one parameter's gradient into this engine's part of its slot, as soon as backward has made it."""

    def __init__(self, divided: DividedParameter, rank: int, num_engines: int) -> None:
        self.name = divided.name
        self.is_used = False  # since `begin`
        self.view = torch.empty(0)
        self._dim = divided.dim
        self._rank = rank
        self._num_engines = num_engines
        self._parameter = divided.parameter
        self._placements = cast(DTensor, divided.parameter.data).placements
        self._is_blank = True  # what the slab holds is of an earlier step
        self._handle: RemovableHandle = divided.parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self, slot: torch.Tensor, *, fresh: bool) -> None:
        self.view = slot if self._dim is None else slot.chunk(self._num_engines, self._dim)[self._rank]
        self._is_blank = fresh
        self.is_used = False
        self._parameter.grad = None

    def finish(self) -> None:
        if self._is_blank and self._is_mine:
            self.view.zero_()

    def close(self) -> None:
        self._handle.remove()
        self._parameter.grad = None

    @property
    def _is_mine(self) -> bool:
        """True if this engine writes the gradient: of a part that is whole everywhere, one does."""
        return self._dim is not None or self._rank == 0

    def _take(self, parameter: torch.Tensor) -> None:
        gradient = cast(DTensor, parameter.grad)
        parameter.grad = None
        if gradient.placements != self._placements:  # all engines come here: it may be a sum over them
            gradient = gradient.redistribute(placements=self._placements)
        if not self._is_mine:
            return
        self.is_used = True
        local = gradient.to_local()
        if self._is_blank:
            self.view.copy_(local)
        else:
            self.view.add_(local)
        self._is_blank = False
