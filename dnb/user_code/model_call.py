"""The call of a model with a batch: its arguments, and the target that a loss compares its output with."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dnb.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Arguments:
    """A batch as a model gets it.

    Args:
        positional: in order.
        keywords: by name.
        target: behind the inputs; None where the model returns its own loss.
    """

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of a forward without a default, and those that may be given by position."""

    required: tuple[str, ...]
    most_positional: int | None  # None: as many as there are


_ANY = _Parameters((), None)
_known: weakref.WeakKeyDictionary[nn.Module, _Parameters] = weakref.WeakKeyDictionary()


def arguments_of(model: nn.Module | None, batch: Any, *, has_target: bool) -> Arguments:
    """Tell apart what of a batch the model gets.

    Args:
        model: asked what it takes; None: by name what has names.
        batch: as collate_fn made it. With a target it is a tuple or list, whose last element that is. Without, the
            elements of a tuple or list are arguments by position, those of a mapping or dataclass by name, unless
            forward takes one argument of another name: then that is the batch, as is any other object.
        has_target: whether a loss compares the output with one; else the model returns its own loss.

    Raises:
        ArgumentError: there is no target in the batch.
    """
    if isinstance(batch, tuple | list):
        if not has_target:
            return Arguments(tuple(batch))
        if len(batch) > 1:
            return Arguments(tuple(batch[:-1]), target=batch[-1])
    elif not has_target:
        named = named_parts(batch)
        if named is None or (model is not None and _takes_whole(model, named)):
            return Arguments((batch,))
        return Arguments((), named)
    raise ArgumentError(no_target(batch, name="the batch"))


def no_target(batch: Any, *, name: str) -> str:
    """Compose the sentence on a batch in which a loss finds no target."""
    if named_parts(batch) is not None:
        return (
            f"{name} is a {type(batch).__name__} with names, so that the model gets it whole and returns its own loss: "
            "leave loss out, or give step=callable(model, batch)"
        )
    kind = "one element" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
    return (
        f"{name} is {kind}, so that the samples have no target: give pairs (X, y), or (X, X) if the model is to give "
        "back its input, or step=callable(model, batch) that returns the loss"
    )


def named_parts(batch: Any) -> Mapping[str, Any] | None:
    """Return the parts of a mapping or a dataclass by name; None if it is neither."""
    if isinstance(batch, torch.Tensor | tuple | list):
        return None
    if isinstance(batch, Mapping):
        return batch if type(batch) is dict else dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}
    if hasattr(batch, "keys") and hasattr(batch, "__getitem__"):
        return {key: batch[key] for key in batch.keys()}  # noqa: SIM118 - it need not iterate over its keys
    return None


def plain_batch(batch: Any) -> Any:
    """Convert a batch so that code which knows only tuples, lists and dictionaries finds its tensors."""
    named = named_parts(batch)
    return batch if named is None else named


def with_parts(batch: Any, parts: Mapping[str, Any]) -> Any:
    """Return a mapping or dataclass like this one, with other parts."""
    if type(batch) is dict:
        return dict(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        return dataclasses.replace(batch, **parts)
    made = copy.copy(batch)
    for key, part in parts.items():
        made[key] = part
    return made


def takes_positional(model: nn.Module, number: int) -> bool:
    """Return whether forward can be called with so many arguments by position; True if that cannot be known."""
    found = _parameters_of(model)
    return found.most_positional is None or len(found.required) <= number <= found.most_positional


def _takes_whole(model: nn.Module, named: Mapping[str, Any]) -> bool:
    required = _parameters_of(model).required
    return len(required) == 1 and required[0] not in named


def _parameters_of(model: nn.Module) -> _Parameters:
    found = _known.get(model)
    if found is None:
        found = _known[model] = _inspected(model)
    return found


def _inspected(model: nn.Module) -> _Parameters:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # of a compiled function
        return _ANY
    by_position = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    required = tuple(
        each.name
        for each in parameters
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    )
    return _Parameters(required, None if takes_any else len(by_position))
