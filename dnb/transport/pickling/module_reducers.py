"""Modules that pickle refuses, though torch copies and saves them: parametrized and scripted ones."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch.nn.utils import parametrize


def reduce_module(obj: Any) -> Any:
    """Reduce a module or function of torch's that pickle refuses by itself; None for all others."""
    if isinstance(obj, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return _load_script, (_script_bytes(obj),)
    if isinstance(obj, torch.nn.Module) and is_parametrized(obj):
        base = type(obj).__bases__[0]
        names = [name for name, _ in obj.get_submodule("parametrizations").named_children()]
        return _make_unfilled, (base,), (dict(vars(obj)), names), None, None, _fill
    return None


def is_parametrized(module: torch.nn.Module) -> bool:
    """Say whether `torch.nn.utils.parametrize` has given a module a class of its own."""
    return parametrize.is_parametrized(module) and type(module).__name__.startswith("Parametrized")


def _make_unfilled(base: type[torch.nn.Module]) -> torch.nn.Module:
    return base.__new__(base)


def _fill(module: torch.nn.Module, state: tuple[dict[str, Any], list[str]]) -> None:
    attributes, names = state
    vars(module).update(attributes)
    parametrize._inject_new_class(module)  # torch has no public way but to compute the parametrization backwards
    for name in names:
        parametrize._inject_property(module, name)


def _script_bytes(obj: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases of torch deprecate all of it
        torch.jit.save(obj, file)
    return file.getvalue()


def _load_script(saved: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(io.BytesIO(saved))
