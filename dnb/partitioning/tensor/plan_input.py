"""Tensor plans as a user, or a model, gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dnb.errors import ArgumentError, PlanError, nearest
from dnb.partitioning.tensor.styles import STYLES, cut_dim, dividable, is_dividable
from dnb.protocol.run import TensorStyle

# How Hugging Face calls them.
OTHER_NAMES: Mapping[str, TensorStyle | None] = {
    "colwise_gather_output": "colwise_rep",
    "rowwise_split_input": "rowwise_rep",
    "vocab_parallel_rowwise": "rowwise",
    "embedding_rowwise": "rowwise",
    "replicate": None,
    "replicated": None,
}
PACKED = {
    nn.MultiheadAttention: "queries, keys and values in one weight",
    nn.TransformerEncoderLayer: "an nn.MultiheadAttention, and layers linear1 and linear2, which can be named",
    nn.TransformerDecoderLayer: "nn.MultiheadAttention, and layers linear1 and linear2, which can be named",
}
WAY_OUT = "say which layers: tensor_plan={'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}"


def plan_of_model(model: nn.Module) -> dict[str, TensorStyle] | None:
    """Read the tensor plan of a Hugging Face transformer; None if it names no layer that can be divided.

    Raises:
        PlanError: it wants a style that is not known here.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    styles: dict[str, TensorStyle] = {}
    for pattern, given in _said_by(model).items():
        found = [name for name in modules if name and _matches(pattern, name)]
        if found and given not in OTHER_NAMES and given not in STYLES:
            raise PlanError(
                f"the model's own tp_plan wants {pattern!r} to be {given!r}, which is not in this release: {WAY_OUT}"
            )
        style = _style(given) if found else None
        styles |= {name: style for name in found if style is not None and is_dividable(modules[name])}
    return _with_ties(model, styles) or None


def _said_by(model: nn.Module) -> dict[str, Any]:
    config = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    prefix = getattr(model, "base_model_prefix", "")
    inside = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    said = {f"{inside}{name}": given for name, given in config.items()} if isinstance(config, Mapping) else {}
    own = getattr(model, "_tp_plan", None)
    return {**said, **own} if isinstance(own, Mapping) else said


def _with_ties(model: nn.Module, styles: dict[str, TensorStyle]) -> dict[str, TensorStyle]:
    """Divide an embedding with the head whose weight it has, if that is divided; other ties stay whole."""
    found = dict(styles)
    for holders in _holders(model).values():
        if len(holders) < 2 or not any(name in styles for name in holders):
            continue
        for name, layer in holders.items():
            if isinstance(layer, nn.Embedding) and is_dividable(layer):
                found[name] = "rowwise"
        if (
            len({cut_dim(layer, "weight", found[name]) if name in found else None for name, layer in holders.items()})
            > 1
        ):
            for name in holders:
                found.pop(name, None)
    return found


def _holders(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Return the modules that have a weight, by its identity."""
    holders: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), {})[name] = module
    return holders


def read_tensor_plan(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, TensorStyle]:
    """Resolve the patterns of a plan: "*" stands for one word between dots, or a part of one.

    Raises:
        ArgumentError: a name matches nothing, or a style is none.
        PlanError: it names a module that cannot be divided, or a weight that others have too.
    """
    if not isinstance(plan, Mapping) or not plan:
        raise ArgumentError(f"tensor_plan must be a dictionary from names to styles, not {plan!r}: {WAY_OUT}")
    modules = dict(model.named_modules(remove_duplicate=False))
    styles: dict[str, TensorStyle] = {}
    for pattern, given in plan.items():
        style = _style(given)
        found = [name for name in modules if name and _matches(pattern, name)]
        if not found:
            known = [name for name, _ in dividable(model)]
            raise ArgumentError(f"tensor_plan: the model has no module {pattern!r}: {nearest(str(pattern), known)}")
        for name in found:
            if style is not None:
                _refuse_undividable(name, modules[name])
                # An embedding's input is whole everywhere, whichever way it is said.
                styles[name] = (
                    "rowwise" if isinstance(modules[name], nn.Embedding) and style == "rowwise_rep" else style
                )
    if not styles:
        raise PlanError(f"tensor_plan divides nothing: {WAY_OUT}")
    _refuse_torn_ties(model, styles)
    return styles


def _style(given: Any) -> TensorStyle | None:
    if not isinstance(given, str):
        return _style_of_object(given)
    if given in OTHER_NAMES:
        return OTHER_NAMES[given]
    for known in STYLES:
        if given == known:
            return known
    raise ArgumentError(f"tensor_plan: no style {given!r}: {nearest(given, STYLES)}")


def _style_of_object(given: Any) -> TensorStyle | None:
    """Return the style of one of torch's own objects, by its input and output layouts."""
    name = type(given).__name__
    is_rep = {
        "ColwiseParallel": lambda: _is_replicate(given.output_layouts),
        "RowwiseParallel": lambda: _is_replicate(given.input_layouts),
    }.get(name)
    if is_rep is None or not given.use_local_output:
        raise ArgumentError(
            f"tensor_plan: {given!r} is no style that can be used here: ColwiseParallel and RowwiseParallel with local "
            f"outputs can, or their names: {', '.join(STYLES)}"
        )
    if name == "ColwiseParallel":
        return "colwise_rep" if is_rep() else "colwise"
    return "rowwise_rep" if is_rep() else "rowwise"


def _is_replicate(layouts: Sequence[Any]) -> bool:
    return all(layout.is_replicate() for layout in layouts)


def _matches(pattern: Any, name: str) -> bool:
    """Match a pattern as torch's `parallelize_module` does: word by word."""
    patterns, words = str(pattern).split("."), name.split(".")
    return len(patterns) == len(words) and all(map(fnmatchcase, words, patterns))


def _refuse_undividable(name: str, module: nn.Module) -> None:
    if is_dividable(module):
        return
    packed = next((text for kind, text in PACKED.items() if isinstance(module, kind)), "")
    holds = f", which holds {packed}," if packed else ""
    raise PlanError(
        f"tensor_plan: {name!r} is a {type(module).__name__}{holds} and cannot be divided: only nn.Linear and plain "
        "nn.Embedding can; leave it out, and every engine computes it whole"
    )


def _refuse_torn_ties(model: nn.Module, styles: Mapping[str, TensorStyle]) -> None:
    """Refuse a weight of several layers that is not cut by all of them, and along one dimension."""
    cuts: dict[int, dict[str, int | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                dim = cut_dim(module, key, styles[name]) if name in styles else None
                cuts.setdefault(id(parameter), {})[name] = dim
    for dims in cuts.values():
        if len(set(dims.values())) > 1:
            torn = ", ".join(
                f"{name!r} {'whole' if dim is None else f'by dimension {dim}'}" for name, dim in dims.items()
            )
            raise PlanError(
                f"tensor_plan: layers that share one weight must cut it alike, and these have it: {torn}; an embedding "
                "'rowwise' goes with a head 'colwise_rep'"
            )
