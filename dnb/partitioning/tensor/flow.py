"""Layers that may be divided together: by columns, and by rows where their outputs come together again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dnb.partitioning.tensor.styles import cut_dim, dividable
from dnb.protocol.run import TensorStyle

# Layers with fewer elements cost more in messages than they save, unless their outputs may stay divided.
LEAST_ELEMENTS = 1 << 15


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that are divided together, or not at all.

    Args:
        styles: how, by name.
        kind: the same for layers that are alike, such as those of all blocks.
        counts: numbers of heads that the forward around them may read, by name; an engine has its share of them.
        otherwise: what else may be done with these layers, if that turns out to be wrong.
    """

    styles: Mapping[str, TensorStyle]
    kind: tuple[Any, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    otherwise: tuple[LayerGroup, ...] = ()


@dataclass(slots=True)
class _LayerFlow:
    """The inputs and outputs of a layer, as nodes of autograd's graph."""

    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class FlowWatch:
    """Sees which layers a forward calls, and whose outputs reach which layer.

    Args:
        model: all of its parameters want gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = dict(dividable(model))
        self._flows: dict[str, _LayerFlow] = {}
        self._handles = [layer.register_forward_hook(self._hook_of(name)) for name, layer in self._layers.items()]

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def groups(self, value: torch.Tensor) -> list[LayerGroup]:
        """Return the layers that may be divided together, as far as the flow of values says; in the order of calls.

        Args:
            value: what the model gave.
        """
        sources = {name: self._sources(flow.inputs) for name, flow in self._flows.items()}
        readers: dict[str, set[str]] = {}
        for name, found in sources.items():
            for source in found or ():
                readers.setdefault(source, set()).add(name)
        for source in self._sources([value.grad_fn], strict=False) or ():
            readers.setdefault(source, set()).add("")  # it is seen from outside
        taken: set[str] = set()
        groups: list[LayerGroup] = []
        for name, found in sources.items():
            if not self._is_pair(name, found, readers, taken):
                continue
            assert found is not None
            taken |= {name, *found}
            styles: dict[str, TensorStyle] = dict.fromkeys(sorted(found), "colwise")
            alone = [group for each in (*sorted(found), name) for group in self._alone(each)]
            groups.append(replace(self._group({**styles, name: "rowwise"}), otherwise=tuple(alone)))
        return groups + [group for name in self._flows if name not in taken for group in self._alone(name)]

    def _is_pair(self, name: str, found: set[str] | None, readers: Mapping[str, set[str]], taken: set[str]) -> bool:
        if not found or not isinstance(self._layers[name], nn.Linear) or name in taken or taken & found:
            return False
        if any(not isinstance(self._layers[source], nn.Linear) or readers[source] != {name} for source in found):
            return False
        return not any(self._is_tied(each) for each in (name, *found))

    def _alone(self, name: str) -> Iterator[LayerGroup]:
        """Yield the group of one layer whose output is put together again at once, if it can be divided."""
        layer = self._layers[name]
        assert isinstance(layer, nn.Linear | nn.Embedding)
        if layer.weight.numel() < LEAST_ELEMENTS:
            return
        holders = self._holders(name)
        if any(holder not in self._flows for holder in holders) or name != holders[0]:
            return
        yield self._group(
            {
                holder: "rowwise" if isinstance(self._layers[holder], nn.Embedding) else "colwise_rep"
                for holder in holders
            }
        )

    def _holders(self, name: str) -> list[str]:
        """Return the modules that have a layer's weight."""
        weight = self._layers[name]._parameters["weight"]
        modules = self._model.named_modules(remove_duplicate=False)
        return [other for other, module in modules if any(each is weight for each in module._parameters.values())]

    def _is_tied(self, name: str) -> bool:
        return len(self._holders(name)) > 1

    def _group(self, styles: dict[str, TensorStyle]) -> LayerGroup:
        parents = [type(self._model.get_submodule(name.rpartition(".")[0])).__qualname__ for name in styles]
        shapes = [str(self._layers[name]) for name in styles]
        words = [re.sub(r"\d+", "*", name) for name in styles]
        return LayerGroup(styles, (*parents, *words, *shapes), head_counts(self._model, styles))

    def _sources(self, nodes: Iterable[Any], *, strict: bool = True) -> set[str] | None:
        """Return the layers whose outputs reach nodes directly; None if other parameters are on the way."""
        owners = {node: name for name, flow in self._flows.items() for node in flow.outputs}
        found: set[str] = set()
        seen: set[Any] = set()
        waiting = [node for node in nodes if node is not None]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in owners:
                found.add(owners[node])
                continue
            if strict and isinstance(getattr(node, "variable", None), nn.Parameter):
                return None
            waiting += [following for following, _ in node.next_functions if following is not None]
        return found

    def _hook_of(self, name: str) -> Any:
        def hook(_layer: nn.Module, inputs: Any, output: Any) -> None:
            flow = self._flows.setdefault(name, _LayerFlow())
            flow.inputs += [value.grad_fn for value in inputs if isinstance(value, torch.Tensor)]
            flow.outputs.append(output.grad_fn)

        return hook


def head_counts(model: nn.Module, styles: Mapping[str, TensorStyle]) -> dict[str, int]:
    """Return the numbers of heads in the modules whose layers are divided by columns.

    A forward that says `view(batch, time, self.num_heads, self.head_dim)` is right on every engine if it counts the
    heads that are there; see PyTorch's tutorial on tensor parallelism.
    """
    found: dict[str, int] = {}
    for name, style in styles.items():
        owner = name.rpartition(".")[0]
        for key, value in vars(model.get_submodule(owner)).items() if style == "colwise" else ():
            if type(value) is int and value > 1 and "head" in key and "dim" not in key and "size" not in key:
                found[f"{owner}.{key}" if owner else key] = value
    return found


def uneven(model: nn.Module, group: LayerGroup, num_engines: int) -> str:
    """Name the first size that so many engines cannot share evenly, for people; empty if there is none."""
    for name, number in group.counts.items():
        if number % num_engines:
            return f"{name!r} is {number}, which {num_engines} engines cannot share evenly"
    for name, style in group.styles.items():
        layer = model.get_submodule(name)
        for key, parameter in layer._parameters.items():
            dim = None if parameter is None else cut_dim(layer, key, style)
            if parameter is None or dim is None or parameter.shape[dim] % num_engines == 0:
                continue
            sides = ("rows", "columns") if isinstance(layer, nn.Embedding) else ("outputs", "inputs")
            return f"{name!r} has {parameter.shape[dim]} {sides[dim]}, which {num_engines} engines cannot share evenly"
    return ""
