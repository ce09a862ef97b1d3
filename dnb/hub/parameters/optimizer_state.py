"""An optimizer's tensors in one shared segment, whose head says which lies where."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.protocol.memory import Layout, SegmentRef
from dnb.transport.layout import ALIGNMENT_BYTES, plan_layout, slot_views
from dnb.transport.segments import Segment, create_segment, open_segment
from dnb.transport.state_trees import pack_apart, put_together, take_apart, take_items_apart, unpack_state

_LENGTH = struct.Struct("<Q")
_ROOT = "state"
_PLAIN = (int, float, str, bool, type(None))

# The state of Adam and AdamW, in the order in which their kernel takes it; the last one for amsgrad.
ADAM_NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class SharedOptimizerState:
    """The tensors of an optimizer's state.

    Args:
        segment: as `create_optimizer_state` made it.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        memory = memoryview(segment.memory)
        (length,) = _LENGTH.unpack_from(memory)
        self.layout = msgspec.msgpack.decode(memory[_LENGTH.size : _LENGTH.size + length], type=Layout)
        tensors = memory[_begin(length) :]
        self.views = slot_views(self.layout, tensors)
        self.flat: Any = np.frombuffer(tensors, dtype=np.uint8)
        self._seen: list[Any] = []
        self._base = self.flat.ctypes.data
        self._described: bytes | None = None
        self.has_moved = False  # whether the last `hold` has given the optimizer other tensors

    def find(self, index: int, key: str) -> torch.Tensor:
        """Return the place of one parameter's tensor; zeros until it is used."""
        return self.views[_name(index, key)]

    def hold(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let the optimizer work on these tensors, if each of its own has a place here.

        Raises:
            TypeError: its state holds what cannot be written down.
        """
        self.has_moved = False
        if self._described is not None and self._is_unchanged(optimizer):
            return True
        tree, tensors = take_apart(_states(optimizer), root=_ROOT)
        if not all(name in self.views and _is_alike(self.views[name], each) for name, each in tensors.items()):
            return False
        moved = [name for name, tensor in tensors.items() if tensor.data_ptr() != self.views[name].data_ptr()]
        if moved:
            for name in moved:
                self.views[name].copy_(tensors[name])
            give_state(optimizer, put_together(tree, self.views))
            self.has_moved = True
        self._seen = _values(optimizer)
        self._described = msgspec.msgpack.encode(tree)
        return True

    def describe(self, optimizer: torch.optim.Optimizer) -> bytes:
        """Encode the state without its tensors, which lie here."""
        if not self.hold(optimizer) or self._described is None:
            raise ValueError("the optimizer's state has outgrown its place")
        return self._described

    def forget(self) -> None:
        """Drop the state's description, as other parameters have a state now."""
        self._described = None

    def _is_unchanged(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer still uses these very tensors, and nothing else that can change within."""
        values = _values(optimizer)
        return len(values) == len(self._seen) and all(
            new is old and (isinstance(new, _PLAIN) or (isinstance(new, torch.Tensor) and self._has(new)))
            for new, old in zip(values, self._seen, strict=True)
        )

    def _has(self, tensor: torch.Tensor) -> bool:
        return self._base <= tensor.data_ptr() < self._base + len(self.flat) or tensor.numel() == 0


def create_optimizer_state(
    tensors: Iterable[tuple[str, torch.Tensor]], *, name: str, folders: Sequence[Path]
) -> SharedOptimizerState:
    """Reserve a place for each of these tensors.

    Args:
        tensors: only shape and dtype count.
        name: begins the file's name.
        folders: where it may lie.

    Raises:
        SpaceError: no room.
    """
    layout = plan_layout(tensors)
    packed = msgspec.msgpack.encode(layout)
    segment = create_segment(name, _begin(len(packed)) + max(layout.num_bytes, 1), folders=folders)
    _LENGTH.pack_into(segment.memory, 0, len(packed))
    segment.memory[_LENGTH.size : _LENGTH.size + len(packed)] = packed
    return SharedOptimizerState(segment)


def open_optimizer_state(ref: SegmentRef) -> SharedOptimizerState:
    """Map the state of another process."""
    return SharedOptimizerState(open_segment(ref))


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state's tensors, by the names of their places.

    Raises:
        TypeError: its state holds what cannot be written down.
    """
    return take_apart(_states(optimizer), root=_ROOT)[1]


def adam_tensors(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Return stand-ins for the state that Adam will have of every parameter that can get a gradient.

    Neighbours among the parameters are neighbours among each of their moments.
    """
    found: list[tuple[str, torch.Tensor]] = []
    amsgrad = {id(p): bool(group.get("amsgrad")) for group in optimizer.param_groups for p in group["params"]}
    numbered = sorted(
        ((p.data_ptr(), index, p) for index, p in enumerate(parameters_of(optimizer)) if p.requires_grad),
        key=lambda item: item[:2],
    )
    for key in ADAM_NAMES:
        found += [
            (_name(index, key), parameter.detach())
            for _, index, parameter in numbered
            if key != ADAM_NAMES[-1] or amsgrad[id(parameter)]
        ]
    return found + [(_name(index, "step"), torch.empty((), dtype=torch.float32)) for _, index, _ in numbered]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return all parameters of an optimizer, in the order that numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def give_state(optimizer: torch.optim.Optimizer, states: Mapping[str, Any]) -> None:
    """Replace the state of an optimizer, by the parameters' numbers."""
    parameters = parameters_of(optimizer)
    optimizer.state.clear()
    for index, state in states.items():
        optimizer.state[parameters[int(index)]] = state


def unpack_optimizer_state(packed: bytes, optimizer_state: SharedOptimizerState | None) -> dict[str, Any]:
    """Decode the states, by the parameters' numbers, that `SharedOptimizerState.describe` encoded."""
    tree = msgspec.msgpack.decode(packed) if packed else {}
    found: dict[str, Any] = put_together(tree, optimizer_state.views if optimizer_state is not None else {})
    return found


def pack_groups(optimizer: torch.optim.Optimizer) -> bytes:
    """Encode the options of each parameter group."""
    return msgspec.msgpack.encode(
        [_pack({name: value for name, value in group.items() if name != "params"}) for group in optimizer.param_groups]
    )


def give_groups(optimizer: torch.optim.Optimizer, packed: bytes) -> None:
    """Give an optimizer the options that `pack_groups` encoded."""
    for group, options in zip(optimizer.param_groups, msgspec.msgpack.decode(packed, type=list[bytes]), strict=True):
        group.update(unpack_state(options))


def pack_scheduler(scheduler: LRScheduler | None) -> bytes:
    """Encode a scheduler's state."""
    return b"" if scheduler is None else _pack(scheduler.state_dict())


def give_scheduler(scheduler: LRScheduler | None, packed: bytes) -> None:
    """Give a scheduler the state that `pack_scheduler` encoded."""
    if scheduler is not None:
        scheduler.load_state_dict(unpack_state(packed))


def _pack(values: Mapping[str, Any]) -> bytes:
    """Pack what can be written down of a dictionary; functions are made anew by the user's code."""
    tree, tensors, _ = take_items_apart(values, root=_ROOT)
    return pack_apart(tree, tensors)


def _states(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if not optimizer.state:
        return {}
    numbers = {id(parameter): index for index, parameter in enumerate(parameters_of(optimizer))}
    states: dict[str, Any] = {}
    for owner, state in optimizer.state.items():
        if id(owner) not in numbers:
            raise TypeError(f"the optimizer's state has a {type(owner).__name__} for a key, which is no parameter")
        states[str(numbers[id(owner)])] = state
    return states


def _values(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value for state in optimizer.state.values() for value in (state.values() if state else ())]


def _is_alike(place: torch.Tensor, tensor: torch.Tensor) -> bool:
    return place.shape == tensor.shape and place.dtype == tensor.dtype


def _name(index: int, key: str) -> str:
    return f"{_ROOT}.{index}.{key}"


def _begin(length: int) -> int:
    return -(-(_LENGTH.size + length) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
