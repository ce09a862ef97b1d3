"""From a graph whose nodes know their stage to one module per stage."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dnb.errors import PlanError
from dnb.partitioning.pipeline.dry_run import is_plain
from dnb.partitioning.pipeline.stage_module import WAY_OUT, described
from dnb.partitioning.pipeline.tracing import Inputs, ModelTrace

Built = tuple[nn.Module, tuple[int, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


def split(trace: ModelTrace, cuts: Sequence[str], inputs: Inputs) -> list[Built]:
    """Build the module, the inputs, and the values received and sent, of every stage.

    Args:
        trace: of the whole model; split only once, as values that cross a cut are taken apart in it.
        cuts: modules at which all stages but the first begin.
        inputs: as traced.

    Raises:
        PlanError: a stage is empty, or something other than a tensor would cross a cut, or is changed beyond it.
    """
    num_stages = len(cuts) + 1
    trace.assign(cuts)
    nodes = list(trace.graph.nodes)
    _check_filled(trace, num_stages)
    received = _crossings(trace, nodes, num_stages)
    positions = [number for number, value in enumerate(inputs.values) if isinstance(value, torch.Tensor)]
    placeholders = {node: positions[i] for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
    built: list[Built] = []
    for stage in range(num_stages):
        behind = received[stage + 1] if stage + 1 < num_stages else None
        graph, used = _stage_graph(trace, stage, received[stage], behind, placeholders)
        module: nn.Module = fx.GraphModule(trace.root, graph)
        if behind is None:
            module = _Restored(module, trace.restore)
        built.append((module, used, _described(trace, received[stage]), _described(trace, behind or ())))
    return built


def users_of_parameters(trace: ModelTrace, cuts: Sequence[str]) -> dict[str, set[int]]:
    """Return the stages that use each tensor, by its name below `Call`, if the model is cut so; builds nothing.

    Raises:
        PlanError: as of `split`.
    """
    num_stages = len(cuts) + 1
    trace.assign(cuts)
    _check_filled(trace, num_stages)
    users: dict[str, set[int]] = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                users.setdefault(str(node.target), set()).add(_stage_of_use(user, num_stages))
            continue
        if not node.op.startswith("call"):
            continue
        first = _stage_of(node)
        if any(_stage_of_use(user, num_stages) > first for user in node.users):
            _check_crossing(trace.values[node], node, first)
        if node.op == "call_module":
            module = trace.root.get_submodule(str(node.target)) if isinstance(trace.root, nn.Module) else None
            for name, _ in () if module is None else module.named_parameters(remove_duplicate=False):
                users.setdefault(f"{node.target}.{name}", set()).add(first)
    return users


def forbidden_places(trace: ModelTrace) -> list[tuple[int, int]]:
    """Return the spans of places, (first, last), where no stage can begin: a value there could not cross the cut."""
    found = [(changed.meta["place"] + 1, by.meta["place"]) for changed, by in trace.changes]
    end = max((node.meta["place"] for node in trace.graph.nodes), default=0)
    for node in trace.graph.nodes:
        if node.op.startswith("call"):
            try:
                _check_crossing(trace.values[node], node, 0)
            except PlanError:
                uses = [end if user.op == "output" else user.meta["place"] for user in node.users]
                found.append((node.meta["place"] + 1, max(uses, default=0)))
    return found


def _check_crossing(value: Any, node: fx.Node, stage: int) -> None:
    """Refuse what is neither a tensor, nor made of tensors, nor known for every batch."""
    if is_plain(value):
        return
    if isinstance(value, tuple | list):
        for element in value:
            _check_crossing(element, node, stage)
        return
    _check_tensor(value, node, stage)


class _Restored(nn.Module):
    """The last stage: gives the model's own output."""

    def __init__(self, body: nn.Module, restore: Callable[[Any], Any]) -> None:
        super().__init__()
        self.body = body
        self._restore = restore

    def forward(self, *values: Any) -> Any:
        return self._restore(self.body(*values))


def _check_filled(trace: ModelTrace, num_stages: int) -> None:
    filled = {_stage_of(node) for node in trace.graph.nodes if node.op.startswith("call")}
    for stage in range(num_stages):
        if stage not in filled:
            raise PlanError(f"stage {stage} would have no layer: begin the next one later")


def _described(trace: ModelTrace, nodes: Sequence[fx.Node]) -> tuple[torch.Tensor, ...]:
    return tuple(described(trace.values[node]) for node in nodes)


def _crossings(trace: ModelTrace, nodes: Sequence[fx.Node], num_stages: int) -> list[list[fx.Node]]:
    """Return for every stage the values made before it that it, or one behind it, uses."""
    received: list[list[fx.Node]] = [[] for _ in range(num_stages)]
    for node in nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        first = _stage_of(node)
        last = max((_stage_of_use(user, num_stages) for user in node.users), default=first)
        value = trace.values[node]
        if last == first or is_plain(value):
            continue
        if isinstance(value, tuple | list):
            _take_apart(trace, node, value)
            continue  # its elements are new nodes, found by another round
        _check_tensor(value, node, first)
        for stage in range(first + 1, last + 1):
            received[stage].append(node)
    has_grown = len(trace.graph.nodes) != len(nodes)
    return _crossings(trace, list(trace.graph.nodes), num_stages) if has_grown else received


def _stage_of(node: fx.Node) -> int:
    return int(node.meta["stage"])


def _stage_of_use(user: fx.Node, num_stages: int) -> int:
    return num_stages - 1 if user.op == "output" else _stage_of(user)


def _take_apart(trace: ModelTrace, node: fx.Node, value: Sequence[Any]) -> None:
    """Let later stages use the elements of a tuple, each of which can be handed on."""
    home = _stage_of(node)
    with trace.graph.inserting_after(node):
        elements: list[fx.Node] = []
        for index in reversed(range(len(value))):
            element = trace.graph.call_function(operator.getitem, (node, index))
            element.meta["stage"] = home
            trace.values[element] = value[index]
            elements.insert(0, element)
    for user in list(node.users):
        if user in elements or (user.op != "output" and _stage_of(user) == home):
            continue
        parts = list(elements) if isinstance(value, list) else tuple(elements)
        user.args = _replaced(user.args, node, parts)
        user.kwargs = _replaced(user.kwargs, node, parts)


def _replaced(arguments: Any, node: fx.Node, by: Any) -> Any:
    return fx.map_arg(arguments, lambda other: by if other is node else other)


def _check_tensor(value: Any, node: fx.Node, stage: int) -> None:
    if not isinstance(value, torch.Tensor):
        raise PlanError(
            f"stage {stage} would hand on a {type(value).__name__} ({node.name}): only tensors and tuples of tensors "
            f"can cross a cut; cut elsewhere, or {WAY_OUT}"
        )


def _stage_graph(
    trace: ModelTrace,
    stage: int,
    received: Sequence[fx.Node],
    behind: Sequence[fx.Node] | None,
    placeholders: Mapping[fx.Node, int],
) -> tuple[fx.Graph, tuple[int, ...]]:
    """Build the graph of one stage, and list the model's inputs it uses, in its arguments' order."""
    mine = [n for n in trace.graph.nodes if _stage_of(n) == stage and n.op.startswith("call")]
    output = next(node for node in trace.graph.nodes if node.op == "output")
    needs = {read for node in mine for read in node.all_input_nodes}
    if behind is None:
        needs |= set(output.all_input_nodes)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {node: graph.placeholder(f"received_{i}") for i, node in enumerate(received)}
    used = [node for node in placeholders if node in needs]
    env.update({node: graph.placeholder(str(node.target)) for node in used})

    def load(node: fx.Node) -> Any:
        if node not in env:
            env[node] = graph.create_node("get_attr", node.target) if node.op == "get_attr" else trace.values[node]
        return env[node]

    for node in mine:
        env[node] = graph.node_copy(node, load)
    graph.output(fx.map_arg(output.args[0], load) if behind is None else tuple(load(node) for node in behind))
    return graph, tuple(placeholders[node] for node in used)
