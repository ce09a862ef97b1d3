"""Nested states (of optimizers and schedulers) as plain JSON and named tensors, so that nothing is unpickled."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

# What JSON does not have is an object with this key, which says what it is.
TAG = "$"
_LARGEST = 1 << 63  # JSON readers agree on integers of 64 bits


def take_apart(value: Any, *, root: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A nested state as plain JSON, and its tensors under names that begin with `root`; nothing is copied.

    Raises:
        TypeError: it holds something other than containers, numbers, text, None and tensors; says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _walk(value, root, tensors), tensors


def put_together(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The reverse of `take_apart`; the tensors are those of the mapping.

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
