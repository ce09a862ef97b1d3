"""State that functions of the user keep between two calls: in closures, globals, attributes and modules.

Both sides walk the same way, the notebook its own functions and the hub their copies, so that what has changed there
can be put into its place here. Functions and classes of installed packages are not looked into.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dnb.transport.pickling.module_sources import is_installed

Put = Callable[[Any], None]  # puts another value into the place of one that cannot be changed itself

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_MOST_DEEP = 12


class KeptState:
    """State of some functions, by the names of its places.

    Args:
        functions: by name.
        known: objects that are cared for elsewhere, such as the model; neither they nor what they hold is looked at.
    """

    def __init__(self, functions: Mapping[str, Any], *, known: Iterable[Any]) -> None:
        self._functions = {name: function for name, function in functions.items() if function is not None}
        self._known = {id(each): each for each in _all_within(known)}
        self._first = {place: value for place, value, _ in self._places() if isinstance(value, _PLAIN)}

    @property
    def are_there(self) -> bool:
        """True if there are functions at all."""
        return bool(self._functions)

    def read(self) -> dict[str, Any]:
        """Return containers and tensors, and numbers and words that have changed since the beginning."""
        found: dict[str, Any] = {}
        for place, value, _ in self._places():
            if isinstance(value, _PLAIN):
                if not isinstance(value, complex | bytes) and not _is_same(value, self._first.get(place, _NOWHERE)):
                    found[place] = value
            elif (read := _read_leaf(value)) is not _NOWHERE:
                found[place] = read
        return found

    @torch.no_grad()
    def give(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Put values, as `read` gave them, into their places; the places that are not there."""
        left = dict(values)
        while left:  # an attribute that is put in may have places of its own
            places = [(value, put, left.pop(place)) for place, value, put in self._places() if place in left]
            if not places:
                break
            for value, put, given in places:
                _give_leaf(value, given, put)
        return tuple(place for place, given in left.items() if not self._make(place, given))

    def _make(self, place: str, given: Any) -> bool:
        """Put in what a function has made by itself since; whether there is an object for it."""
        owner_name, _, name = place.rpartition(".")
        for found, owner, _ in self._walk_all(with_owners=True):
            if found == owner_name and _is_own_object(owner):
                setattr(owner, name, given)
                return True
        return False

    def _places(self) -> Iterator[tuple[str, Any, Put]]:
        return self._walk_all(with_owners=False)

    def _walk_all(self, *, with_owners: bool) -> Iterator[tuple[str, Any, Put]]:
        seen: set[int] = set()
        for name, function in self._functions.items():
            yield from self._walk(function, name, _cannot_put, seen, _MOST_DEEP, with_owners)

    def _walk(
        self, value: Any, place: str, put: Put, seen: set[int], depth: int, with_owners: bool
    ) -> Iterator[tuple[str, Any, Put]]:
        if isinstance(value, _PLAIN):
            yield place, value, put
            return
        if id(value) in self._known or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        if _is_leaf(value) and not self._holds_known(value):
            yield place, value, put
            return
        if with_owners:
            yield place, value, put
        for name, child, put_child in _parts_of(value):
            yield from self._walk(child, f"{place}.{name}", put_child, seen, depth - 1, with_owners)

    def _holds_known(self, value: Any) -> bool:
        children: Iterable[Any] = ()
        if isinstance(value, dict):
            children = value.values()
        elif isinstance(value, list | tuple | deque | set):
            children = value
        return any(id(child) in self._known or self._holds_known(child) for child in children)


class _Nowhere:
    """Stands for a value that there is not."""


_NOWHERE = _Nowhere()


def _cannot_put(_: Any) -> None:
    """Do nothing: a function itself is not replaced."""


def _cannot_put_at(_: Any, __: Any) -> None:
    """Do nothing: an element of a tuple is not replaced."""


def _all_within(objects: Iterable[Any]) -> Iterator[Any]:
    for each in objects:
        if each is None:
            continue
        yield each
        if isinstance(each, torch.nn.Module):
            yield from each.modules()
            yield from each.parameters()
            yield from each.buffers()


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and (value == other or value != value)


def _is_leaf(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray | torch.Generator):
        return True
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") and not isinstance(value, type):
        return True
    return _is_plain_container(value)


def _is_plain_container(value: Any) -> bool:
    """Return whether a value is a container of nothing but numbers, strings, tensors and such containers."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) for key in value) and all(map(_is_simple, value.values()))
    return isinstance(value, list | tuple | deque | set) and all(map(_is_simple, value))


def _is_simple(value: Any) -> bool:
    is_number = isinstance(value, bool | int | float | str | type(None) | np.generic)
    return is_number or isinstance(value, torch.Tensor) or _is_plain_container(value)


def _read_leaf(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "fiub" and value.flags.writeable else _NOWHERE
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.nn.Module):
        return {name: each for name, each in value.state_dict().items() if isinstance(each, torch.Tensor)}
    if not isinstance(value, torch.Tensor) and hasattr(value, "state_dict"):
        state = value.state_dict()
        return state if _is_plain_container(state) else _NOWHERE
    return value


def _give_leaf(value: Any, given: Any, put: Put) -> None:
    if isinstance(value, torch.Tensor):
        _give_tensor(value, given, put)
    elif isinstance(value, np.ndarray):
        np.copyto(value, given.numpy())
    elif isinstance(value, torch.Generator):
        value.set_state(given)
    elif isinstance(value, torch.nn.Module):
        value.load_state_dict(given, strict=False)
    elif isinstance(value, dict):
        _give_dict(value, given)
    elif isinstance(value, list):
        value[:] = [_merged(old, new) for old, new in zip(value, given, strict=False)] + given[len(value) :]
    elif isinstance(value, deque | set):
        value.clear()
        value.extend(given) if isinstance(value, deque) else value.update(given)
    elif hasattr(value, "load_state_dict"):
        value.load_state_dict(given)
    else:
        put(given)


def _give_dict(value: dict[Any, Any], given: dict[Any, Any]) -> None:
    merged = {key: _merged(value.get(key), new) for key, new in given.items()}
    value.clear()
    value.update(merged)


def _merged(old: Any, new: Any) -> Any:
    """Return the old object with the new one's content where it can take it, as others may refer to it."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and _is_alike(old, new):
        old.detach().copy_(new)
        return old
    if isinstance(old, dict) and isinstance(new, dict):
        _give_dict(old, new)
        return old
    if isinstance(old, list) and isinstance(new, list):
        _give_leaf(old, new, _cannot_put)
        return old
    return new


def _give_tensor(value: torch.Tensor, given: torch.Tensor, put: Put) -> None:
    if _is_alike(value, given):
        value.detach().copy_(given)
    else:
        put(given)


def _is_alike(value: torch.Tensor, given: torch.Tensor) -> bool:
    return value.shape == given.shape and value.dtype == given.dtype


# where values lie -----------------------------------------------------------------------------


def _parts_of(value: Any) -> Iterator[tuple[str, Any, Put]]:
    if isinstance(value, functools.partial):
        yield "function", value.func, _cannot_put
        yield from _items_of(dict(enumerate(value.args)), _cannot_put_at)
        yield from _items_of(value.keywords, value.keywords.__setitem__)
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__, _cannot_put
        yield "function", value.__func__, _cannot_put
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, dict):
        yield from _items_of(value, value.__setitem__)
    elif isinstance(value, list | tuple):
        yield from _items_of(dict(enumerate(value)), getattr(value, "__setitem__", _cannot_put_at))
    elif _is_own_object(value):
        yield from _items_of(dict(vars(value)), functools.partial(setattr, value))
        call = vars(type(value)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield "call", call, _cannot_put


def _items_of(items: Mapping[Any, Any], put_at: Callable[[Any, Any], None]) -> Iterator[tuple[str, Any, Put]]:
    for key, each in items.items():
        yield str(key), each, functools.partial(put_at, key)


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any, Put]]:
    if is_installed(function.__code__.co_filename):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        yield f"closure {name}", value, functools.partial(setattr, cell, "cell_contents")
    for name in sorted(_names_in(function.__code__)):
        if name in function.__globals__:
            value = function.__globals__[name]
            yield f"global {name}", value, functools.partial(function.__globals__.__setitem__, name)


def _names_in(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _is_own_object(value: Any) -> bool:
    """Return whether an object is of a class that the user has written."""
    kind = type(value)
    if isinstance(value, type | types.ModuleType | types.FunctionType) or not hasattr(value, "__dict__"):
        return False
    if kind.__module__ == "__main__":
        return True
    if kind.__module__.partition(".")[0] in ("dnb", "builtins"):
        return False
    module = sys.modules.get(kind.__module__)
    return module is None or not is_installed(getattr(module, "__file__", None) or "")
