"""Nested states (of models and optimizers) as msgpack and raw tensors, so that nothing is unpickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from dnb.protocol.client_messages import StateTree
from dnb.protocol.memory import TensorSlot
from dnb.transport.layout import dtype_name, dtype_named
from dnb.transport.state_trees import put_together, take_apart

# An inner dictionary is tagged, so that it is not taken for a tensor;
# an optimizer's state is keyed by integers: such dictionaries become lists of pairs.
_PAIRS = "pairs"
_TENSOR = "tensor"
_DICT = "dict"
_TUPLE = "tuple"


def encode_state(state: Any) -> tuple[StateTree, list[memoryview]]:
    """Take a nested state apart.

    Raises:
        TypeError: it holds something other than containers, numbers, text, None and tensors.
    """
    slots: list[TensorSlot] = []
    frames: list[memoryview] = []

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            flat = value.detach().contiguous().cpu()
            index = len(slots)
            slots.append(
                TensorSlot(
                    name=str(index),
                    shape=tuple(flat.shape),
                    dtype=dtype_name(flat.dtype),
                    offset_bytes=0,
                )
            )
            frames.append(flat.reshape(-1).view(torch.uint8).numpy().data)
            return {_TENSOR: index}
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value):
                return {_DICT: {key: walk(child) for key, child in value.items()}}
            return {_PAIRS: [[walk(key), walk(child)] for key, child in value.items()]}
        if isinstance(value, tuple):
            return {_TUPLE: [walk(child) for child in value]}
        if isinstance(value, list):
            return [walk(child) for child in value]
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} in the state cannot travel without pickle")

    tree = msgspec.msgpack.encode(walk(state))  # not JSON: a NaN must survive
    return StateTree(tree=tree, tensors=tuple(slots)), frames


def decode_state(tree: StateTree, frames: Sequence[bytes]) -> Any:
    """Put a nested state together again; tensors own their memory.

    Raises:
        ValueError: a frame does not have the size that its slot declares.
    """
    tensors = [_tensor(slot, frame) for slot, frame in zip(tree.tensors, frames, strict=True)]

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(child) for child in value]
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == _TENSOR:
            return tensors[inner]
        if kind == _DICT:
            return {key: walk(child) for key, child in inner.items()}
        if kind == _TUPLE:
            return tuple(walk(child) for child in inner)
        return {walk(key): walk(child) for key, child in inner}

    return walk(msgspec.msgpack.decode(tree.tree))


def pack_state(state: Any) -> bytes:
    """A nested state in one piece; it may hold bytes and sets, too.

    Raises:
        TypeError: it holds something that `take_apart` does not know; says what and where.
    """
    plain, named = take_apart(state, root="state")
    tree, frames = encode_state({"tree": plain, "tensors": named})
    return msgspec.msgpack.encode((tree.tree, tree.tensors, frames))


def unpack_state(packed: bytes | memoryview) -> Any:
    """The reverse of `pack_state`.

    Raises:
        Exception: it is none; decoding raises more than its own errors.
    """
    tree, tensors, frames = msgspec.msgpack.decode(packed, type=tuple[bytes, tuple[TensorSlot, ...], list[bytes]])
    state = decode_state(StateTree(tree=tree, tensors=tensors), frames)
    return put_together(state["tree"], state["tensors"])


def _tensor(slot: TensorSlot, frame: bytes) -> torch.Tensor:
    dtype = dtype_named(slot.dtype)
    empty = torch.empty(slot.shape, dtype=dtype)
    if len(frame) != empty.numel() * dtype.itemsize:
        raise ValueError(f"tensor {slot.name} of shape {slot.shape} came with {len(frame)} bytes")
    if len(frame):
        empty.view(-1).copy_(torch.frombuffer(bytearray(frame), dtype=dtype))
    return empty
