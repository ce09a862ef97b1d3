"""Nested states (of models, optimizers, schedulers, functions) without pickle: plain JSON, and named tensors beside it.

One walk takes a state apart, one puts it together. What becomes of the two halves is the caller's: a checkpoint writes
JSON and a safetensors file, the hub's log its own shared memory; here they travel as a record with a frame for each
tensor (`encode_state`), or in one piece (`pack_state`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from dnb.protocol.client_messages import StateTree
from dnb.protocol.memory import TensorSlot
from dnb.transport.layout import dtype_name, dtype_named

# What JSON does not have is an object with this key, which says what it is.
TAG = "$"
_LARGEST = 1 << 63  # JSON readers agree on integers of 64 bits


def take_apart(value: Any, *, root: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a nested state as plain JSON, and its tensors under names that begin with `root`; nothing is copied.

    Raises:
        TypeError: it holds something other than containers, numbers, text, None and tensors; says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _walk(value, root, tensors), tensors


def take_items_apart(
    values: Mapping[str, Any], *, root: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[str, ...]]:
    """Take apart the items of a dictionary that can be; functions, say, are made anew by the user's code.

    Returns:
        Trees by key, all their tensors, and the keys of what had to be left out.
    """
    trees: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    left_out: list[str] = []
    for key, value in values.items():
        try:
            trees[key], found = take_apart(value, root=f"{root}.{key}")
        except TypeError:
            left_out.append(key)
        else:
            tensors |= found
    return trees, tensors, tuple(left_out)


def put_together(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the state that `take_apart` took; the tensors are those of the mapping.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the tree is not one.
    """
    if isinstance(tree, list):
        return [put_together(child, tensors) for child in tree]
    if not isinstance(tree, dict):
        return tree
    if TAG not in tree:
        return {key: put_together(child, tensors) for key, child in tree.items()}
    kind, inner = tree[TAG], tree["of"]
    if kind == "tensor":
        return tensors[inner]
    if kind not in _MAKERS:
        raise ValueError(f"{kind!r} is not a kind of value")
    return _MAKERS[kind](put_together(inner, tensors))


def encode_state(state: Any) -> tuple[StateTree, list[memoryview]]:
    """Take a nested state apart, to be sent: a record, and the bytes of each tensor.

    Raises:
        TypeError: it holds something that `take_apart` does not know; says what and where.
    """
    tree, tensors = take_apart(state, root="state")
    slots = [
        TensorSlot(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), offset_bytes=0)
        for name, tensor in tensors.items()
    ]
    packed = msgspec.msgpack.encode(tree)
    return StateTree(tree=packed, tensors=tuple(slots)), [_bytes_of(tensor) for tensor in tensors.values()]


def decode_state(tree: StateTree, frames: Sequence[bytes | memoryview]) -> Any:
    """Return the state that `encode_state` took; tensors own their memory.

    Raises:
        ValueError: a frame does not have the size that its slot declares.
    """
    tensors = {
        slot.name: _tensor_of(slot.name, slot.dtype, slot.shape, frame)
        for slot, frame in zip(tree.tensors, frames, strict=True)
    }
    return put_together(msgspec.msgpack.decode(tree.tree), tensors)


def pack_state(state: Any) -> bytes:
    """Return a nested state in one piece.

    Raises:
        TypeError: it holds something that `take_apart` does not know; says what and where.
    """
    return pack_apart(*take_apart(state, root="state"))


def pack_apart(tree: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return in one piece what `take_apart` gave."""
    told = {name: (dtype_name(each.dtype), tuple(each.shape), _bytes_of(each)) for name, each in tensors.items()}
    return msgspec.msgpack.encode((tree, told))


def unpack_state(packed: bytes | memoryview) -> Any:
    """Return the state that is in one piece; tensors own their memory.

    Raises:
        Exception: it is none; decoding raises more than its own errors.
    """
    tree, told = msgspec.msgpack.decode(packed, type=tuple[Any, dict[str, tuple[str, tuple[int, ...], bytes]]])
    return put_together(tree, {name: _tensor_of(name, *facts) for name, facts in told.items()})


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor_of(name: str, dtype: str, shape: Sequence[int], raw: bytes | memoryview) -> torch.Tensor:
    kind = dtype_named(dtype)
    if min(shape, default=0) < 0 or len(raw) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"tensor {name} of shape {tuple(shape)} came with {len(raw)} bytes")
    if not raw:
        return torch.empty(tuple(shape), dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=kind).view(tuple(shape))


def _walk(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = path
        while name in tensors:  # a key may hold a dot
            name += "~"
        tensors[name] = value.detach()
        return {TAG: "tensor", "of": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, bytes):
        return {TAG: "bytes", "of": value.hex()}
    if isinstance(value, int):
        return value if -_LARGEST <= value < _LARGEST else {TAG: "int", "of": str(int(value))}
    if isinstance(value, float):
        return value if math.isfinite(value) else {TAG: "float", "of": str(value)}
    return _walk_container(value, path, tensors)


def _walk_container(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "pairs"
        if kind == "pairs" and all(isinstance(key, str) and key != TAG for key in value):
            return {key: _walk(child, f"{path}.{key}", tensors) for key, child in value.items()}
        pairs = [[_walk(key, path, tensors), _walk(child, f"{path}.{key}", tensors)] for key, child in value.items()]
        return {TAG: kind, "of": pairs}
    if isinstance(value, list | tuple | deque | set | frozenset):
        inner = [_walk(child, f"{path}.{place}", tensors) for place, child in enumerate(value)]
        kind = next((name for name, of in _KINDS.items() if isinstance(value, of)), "")
        return {TAG: kind, "of": inner} if kind else inner
    raise TypeError(f"{path} is a {type(value).__name__}, which cannot be kept without pickle")


_KINDS: dict[str, Any] = {"tuple": tuple, "deque": deque, "set": set | frozenset}


def _dict_of(pairs: Any) -> dict[Any, Any]:
    return dict(pairs)


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "pairs": _dict_of,
    "counter": lambda pairs: Counter(_dict_of(pairs)),
    "tuple": tuple,
    "deque": deque,
    "set": set,
    "int": int,
    "float": float,
    "bytes": bytes.fromhex,
}
