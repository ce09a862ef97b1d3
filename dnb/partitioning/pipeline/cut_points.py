"""The places at which a model can be cut."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.dry_run import PREFIX, DryRun, no_autocast
from dnb.partitioning.pipeline.graph_split import forbidden_places
from dnb.partitioning.pipeline.symbol_tracer import SymbolTracer, trace_by_symbols
from dnb.partitioning.pipeline.tracing import Inputs, ModelCall, ModelTrace, NotTraceable

Found = TypeVar("Found")


def cut_points(model: nn.Module, inputs: Inputs | None = None) -> list[str]:
    """Return the names of the modules at which a stage can begin, in the order in which they run.

    A model whose forward cannot be followed can be cut nowhere, unless the user gives its stages.

    Args:
        model: no data is read.
        inputs: an example; with it, a forward that looks at shapes can be followed, too.
    """
    if inputs is not None:
        followed = follow(model, inputs, DryRun(model, no_autocast))
        if followed is not None:
            return points_of(model, followed[0])
    begins = _begins_without_values(model)
    return [] if begins is None else _distinct(model, begins)


def follow(model: nn.Module, inputs: Inputs, dry_run: DryRun) -> tuple[ModelTrace, list[str]] | None:
    """Trace a forward down to the smallest modules that can be cut at, with its operations; None if it cannot be.

    It looks into all modules that hold others; where that fails, into those only that can be followed themselves.
    """

    def attempt(opened: Iterable[str]) -> tuple[ModelTrace, list[str]] | None:
        try:
            return trace_by_symbols(ModelCall(model, inputs), inputs, opened, dry_run)
        except NotTraceable:
            return None

    return _follow(attempt, _containers(model), lambda found: found[0].begins)


def _begins_without_values(model: nn.Module) -> dict[str, int] | None:
    """Find the modules that a forward calls, by symbols alone."""
    unknown = Inputs(tuple(torch.empty(0) for _ in range(_num_required(model))))

    def attempt(opened: Iterable[str]) -> dict[str, int] | None:
        tracer = SymbolTracer(opened)
        try:
            tracer.follow(ModelCall(model, unknown), unknown.values, None)
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # a user's forward may do anything with a symbol
            return None
        return tracer.begins

    return _follow(attempt, _containers(model), lambda begins: begins)


def _follow(
    attempt: Callable[[Iterable[str]], Found | None],
    containers: Mapping[str, type],
    begins: Callable[[Found], Mapping[str, int]],
) -> Found | None:
    """Call an attempt that opens all containers, or else as many of them as can be opened, and return its find.

    Containers of one class are opened together, as a forward that cannot be followed cannot be in any of them; only
    sequences, whose forward is torch's own, are tried one by one where they cannot all be opened.
    """
    found = attempt(containers)
    if found is not None:
        return found
    opened: set[str] = set()
    found = attempt(opened)
    refused: set[str] = set()
    while found is not None:
        waiting = [name for name in begins(found) if name in containers and name not in opened | refused]
        if not waiting:
            break
        kind = containers[waiting[0]]
        group = [name for name in waiting if containers[name] is kind]
        for names in [group, *([[name] for name in group] if kind is nn.Sequential and len(group) > 1 else [])]:
            deeper = attempt({*opened, *names})
            if deeper is not None:
                found = deeper
                opened.update(names)
                if names is group:
                    break
        refused.update(group)
    return found


def _num_required(model: nn.Module) -> int:
    """Count the arguments that the model's forward requires."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)


def _containers(model: nn.Module) -> dict[str, type]:
    return {PREFIX + name: type(module) for name, module in model.named_modules() if name and _is_container(module)}


def _is_container(module: nn.Module) -> bool:
    """Return whether a module can be cut inside; torch's own layers stay whole."""
    if next(module.children(), None) is None:
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")


def points_of(model: nn.Module, trace: ModelTrace) -> list[str]:
    """Return the modules of a traced model at which a stage can begin, in the order in which they run.

    A module that computes nothing is none, as the next one begins there. Places at which something could not cross
    the cut are none, unless all are such: then a refusal can say why.
    """
    forbidden = forbidden_places(trace)
    begins = {name: place for name, place in trace.begins.items() if name.startswith(PREFIX) and name not in trace.idle}
    allowed = {
        name: place for name, place in begins.items() if not any(first <= place <= last for first, last in forbidden)
    }
    return _distinct(model, allowed) or _distinct(model, begins)


def _distinct(model: nn.Module, begins: Mapping[str, int]) -> list[str]:
    """Keep one module per place, the outermost; none at the very beginning, and none that works in place."""
    found: list[str] = []
    last = 0
    for name, place in begins.items():
        own = name.removeprefix(PREFIX)
        if place > last and not getattr(model.get_submodule(own), "inplace", False):
            found.append(own)
            last = place
    return found
