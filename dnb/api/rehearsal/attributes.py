"""State outside of parameters and buffers: attributes of modules, and what functions keep beside them."""

from __future__ import annotations

import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_INTERNAL = frozenset(vars(torch.nn.Module()))
# Of a container, so many elements are looked at, and of an array so many bytes.
MOST_ELEMENTS = 256
MOST_BYTES = 1 << 20
_STATE = (int, float, complex, str, bytes, torch.Tensor, np.ndarray, list, dict, set, deque)


class Attributes:
    """Remembers what modules and a step function keep, and finds what has changed.

    Args:
        model: whose modules' own attributes are looked at, and what their hooks keep.
        step: whose globals, cells and attributes are looked at; None: there is no such function.
    """

    def __init__(self, model: torch.nn.Module, step: Callable[..., Any] | None) -> None:
        self._model = model
        self._step = step
        self._before = dict(self._found())
        self._marks = {name: _mark(value) for name, value in self._before.items()}

    def changed(self) -> tuple[str, ...]:
        """Names of what is not as it was."""
        return tuple(name for name, value in self._found() if self._is_other(name, value))

    def _is_other(self, name: str, value: Any) -> bool:
        if name not in self._before:
            return _is_state(value)
        before = self._before[name]
        if not (_is_state(before) or _is_state(value)):
            return False
        return _mark(value) != self._marks[name]

    def _found(self) -> Iterator[tuple[str, Any]]:
        for path, module in self._model.named_modules():
            for name, value in list(vars(module).items()):
                if name not in _INTERNAL:
                    yield f"{path}.{name}" if path else name, value
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            for hook in hooks:
                for name, value in _kept_by(hook):
                    yield f"{path}.{name} of a hook" if path else f"{name} of a hook", value
        if self._step is not None:
            for name, value in _kept_by(self._step):
                yield f"step's {name!r}", value


def _kept_by(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values that a function holds in cells, in globals that it names, and as attributes."""
    if isinstance(function, types.MethodType):
        yield from list(getattr(function.__self__, "__dict__", {}).items())
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        if not isinstance(function, torch.nn.Module):
            yield from list(getattr(function, "__dict__", {}).items())
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is empty
            continue
    for name in code.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    yield from list(vars(function).items())


def _is_state(value: Any) -> bool:
    return isinstance(
        value, int | float | complex | str | bytes | torch.Tensor | np.ndarray | list | dict | set | deque
    )


def _mark(value: Any) -> tuple[Any, ...]:
    """Return a value's kind and contents, as far as they are cheap to see."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta or value.nbytes > MOST_BYTES:
            return torch.Tensor, id(value), value._version
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest = zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
        return torch.Tensor, tuple(value.shape), digest
    if isinstance(value, np.ndarray):
        is_small = value.nbytes <= MOST_BYTES and not value.dtype.hasobject
        return (
            np.ndarray,
            value.shape,
            zlib.crc32(np.ascontiguousarray(value).data.cast("B")) if is_small else id(value),
        )
    if isinstance(value, dict):
        return dict, len(value), tuple(_element(each) for each in list(value.items())[-MOST_ELEMENTS:])
    if isinstance(value, list | tuple | set | deque):
        return type(value), len(value), tuple(_element(each) for each in list(value)[-MOST_ELEMENTS:])
    return (_element(value),)


def _element(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_element(each) for each in value)
    return value if isinstance(value, int | float | complex | str | bytes | bool) or value is None else id(value)
