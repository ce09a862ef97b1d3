"""Where a model can be cut at all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from dnb.errors import USER_ERRORS
from dnb.planning.rehearsing import PREFIX, Rehearsal, no_autocast
from dnb.planning.tracing import Call, Inputs, SymbolTracer


def cut_points(model: nn.Module, inputs: Inputs | None = None) -> list[str]:
    """Names of the modules at which a stage can begin, in the order in which they run.

    A model whose forward cannot be followed can be cut nowhere, unless the user gives its stages.

    Args:
        model: no data is read.
        inputs: an example; with it, a forward that looks at shapes can be followed, too.
    """
    containers = {PREFIX + name for name, module in model.named_modules() if name and _is_container(module)}
    calls = _calls(model, inputs, containers) or _calls_of_what_opens(model, inputs, containers)
    if calls is None:
        return [] if inputs is None else cut_points(model)
    return _distinct(model, calls)


def _calls_of_what_opens(
    model: nn.Module, inputs: Inputs | None, containers: Iterable[str]
) -> list[tuple[str, int]] | None:
    """All modules that a forward calls; inside those containers only that can be followed themselves."""
    opened: set[str] = set()
    calls = _calls(model, inputs, opened)
    waiting = [name for name, _ in calls or ()]
    while waiting:
        name = waiting.pop(0)
        if name in opened or name not in containers:
            continue
        deeper = _calls(model, inputs, {*opened, name})
        if deeper is not None:
            opened.add(name)
            waiting += [inner for inner, _ in deeper if inner.startswith(f"{name}.")]
            calls = deeper
    return calls


def _calls(model: nn.Module, inputs: Inputs | None, opened: Iterable[str]) -> list[tuple[str, int]] | None:
    """All modules that a forward calls, with their places, or None if it cannot be followed."""
    rehearsal = Rehearsal(model, no_autocast)
    tracer = SymbolTracer([], opened=opened)
    try:
        if inputs is None:
            unknown = Inputs(tuple(torch.empty(0) for _ in range(_num_required(model))))
            tracer.follow(Call(model, unknown), unknown.values, None)
        else:
            values = tuple(rehearsal.convert(value) for value in inputs.values)
            with rehearsal.running() as log:
                tracer.follow(Call(model, inputs), values, log)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # a user's forward may do anything with a symbol
        return None
    return tracer.calls


def _num_required(model: nn.Module) -> int:
    """Of a forward's arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)


def _is_container(module: nn.Module) -> bool:
    """Whether there is something to cut inside; torch's own layers stay whole."""
    if next(module.children(), None) is None:
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")


def _distinct(model: nn.Module, calls: Sequence[tuple[str, int]]) -> list[str]:
    """One name per place, the outermost; none at the very beginning, and none that works in place."""
    found: dict[str, None] = {}
    last = 0
    for name, place in calls:
        own = name.removeprefix(PREFIX)
        if place > last and own not in found and not getattr(model.get_submodule(own), "inplace", False):
            found[own] = None
            last = place
    return list(found)
