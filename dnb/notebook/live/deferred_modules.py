"""Modules that others import and hardly ever call: while those are imported, functions that load them when called."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def deferred(name: str, *, functions: tuple[str, ...]) -> Iterator[None]:
    """Let what is imported meanwhile have these functions of a module, which is itself imported at their first call.

    Nothing is changed if the module is there already, or is not installed.
    """
    if name in sys.modules or importlib.util.find_spec(name) is None:
        yield
        return
    stand_in = ModuleType(name)
    for function in functions:
        setattr(stand_in, function, _call_later(name, function))
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _call_later(name: str, function: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(name), function)(*arguments, **options)

    return call
