"""Divides a model into the stages of a pipeline, and says where it can be cut at all.

`torch.distributed.pipelining.pipeline` is not used for it: what it traces is bound to one shape and to train mode, and
its stages know no gradient of a value that two later stages need. Here such a value is handed on from stage to stage,
so that every stage speaks with its neighbours only, under every schedule.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from dnb.errors import PlanError, nearest
from dnb.planning.shards import shard_bounds
from dnb.planning.tracing import (
    PREFIX,
    Call,
    Inputs,
    NotTraceable,
    Rehearsal,
    SymbolTracer,
    Trace,
    is_plain,
    trace_by_export,
    trace_by_symbols,
)
from dnb.records import Partition

WAY_OUT = "give the stages yourself: stages=[first, second, ...]"


@dataclass(frozen=True, slots=True)
class StagePart:
    """One stage: called with what it receives, then with its inputs; gives a tuple, the last one the model's output.

    Args:
        module: what it runs; its tensors are the model's own.
        inputs: positions among the model's inputs.
        receives: of the stage before it, as tensors without data that know whether they want a gradient.
        sends: to the stage behind it.
        parameters: those it uses, by the model's own names.
        buffers: likewise.
        begins: the name of its first module.
    """

    module: nn.Module
    inputs: tuple[int, ...]
    receives: tuple[torch.Tensor, ...]
    sends: tuple[torch.Tensor, ...]
    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    begins: str = ""


def no_autocast() -> AbstractContextManager[Any]:
    """What surrounds a forward in full precision."""
    return nullcontext()


class Divider:
    """Divides one model, for one shape of inputs after the other.

    Args:
        model: its tensors are used, never copied; no data is read unless the model looks at values.
        partition: how many stages, and where they begin.
        stages: the user's own, instead of cuts.
        autocast: what surrounds every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        *,
        stages: Sequence[nn.Module] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = no_autocast,
    ) -> None:
        self._model = model
        self._partition = partition
        self._stages = stages
        self._rehearsal = Rehearsal(model, autocast)
        self._by_symbols: dict[bool, bool] = {}  # by mode, once it was seen whether symbols tell all that is called

    def parts(self, inputs: Inputs) -> tuple[StagePart, ...]:
        """The stages, in the mode (train or eval) that the model is in, for inputs of these shapes.

        Args:
            inputs: of one micro-batch.

        Raises:
            PlanError: the model cannot be divided so.
        """
        partition, model = self._partition, self._model
        if self._stages is not None:
            return _named(model, _divide_chain(list(self._stages), partition, inputs, self._rehearsal))
        call = Call(model, inputs)
        if partition.num_stages == 1 and not partition.cuts:
            return _named(model, [StagePart(call, tuple(range(len(inputs.values))), (), (), {}, {})])
        _check_cuts(model, partition, inputs)
        trace = self._trace(call, inputs, [PREFIX + cut for cut in partition.cuts])
        begins = ["", *partition.cuts]
        built = _split(trace, partition.num_stages, inputs)
        return _named(model, [StagePart(*part, {}, {}, begins[stage]) for stage, part in enumerate(built)])

    def _trace(self, call: Call, inputs: Inputs, cuts: Sequence[str]) -> Trace:
        """By symbols if that calls the very operations that the model calls, else by torch.export."""
        refusal: NotTraceable | None = None
        is_enough = self._by_symbols.get(call.training)
        if is_enough is not False:
            wanted = None if is_enough else _operations(call, inputs, self._rehearsal)
            try:
                trace, begun, operations = trace_by_symbols(call, inputs, cuts, self._rehearsal)
            except NotTraceable as error:
                if self._rehearsal.has_data:  # the model looks at values, which torch.export cannot follow, either
                    raise _untraceable(call, error) from error
                refusal = error
            else:
                self._by_symbols[call.training] = is_enough = is_enough or operations == wanted
                if is_enough:
                    _check_begun(begun, cuts)
                    return trace
        try:
            trace, begun = trace_by_export(call, inputs, cuts, self._rehearsal)
        except NotTraceable as error:
            raise _untraceable(call, refusal if refusal is not None and not error.line else error) from error
        self._by_symbols[call.training] = False
        _check_begun(begun, cuts)
        return trace


def divide(
    model: nn.Module, partition: Partition, inputs: Inputs, *, stages: Sequence[nn.Module] | None = None
) -> tuple[StagePart, ...]:
    """The stages of a model, once; see `Divider`."""
    return Divider(model, partition, stages=stages).parts(inputs)


def cut_points(model: nn.Module, inputs: Inputs | None = None) -> list[str]:
    """Names of the modules at which a stage can begin, in the order in which they run.

    A model whose forward cannot be followed can be cut nowhere, unless the user gives its stages.

    Args:
        model: no data is read.
        inputs: an example; with it, a forward that looks at shapes can be followed, too.
    """
    opened: set[str] = set()
    calls = _calls(model, inputs, opened)
    if calls is None:
        return [] if inputs is None else cut_points(model)
    waiting = [name for name, _ in calls if name != "model"]
    while waiting:
        name = waiting.pop(0)
        module = model.get_submodule(name.removeprefix(PREFIX))
        if name in opened or not _is_container(module):
            continue
        deeper = _calls(model, inputs, {*opened, name})
        if deeper is not None:
            opened.add(name)
            waiting += [inner for inner, _ in deeper if inner.startswith(f"{name}.")]
            calls = deeper
    return _distinct(model, calls)


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
    except Exception:  # noqa: BLE001 - a user's forward may do anything with a symbol
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


# By cuts --------------------------------------------------------------------------------------------


def _check_cuts(model: nn.Module, partition: Partition, inputs: Inputs) -> None:
    names = dict(model.named_modules())
    for cut in partition.cuts:
        if not cut or cut not in names:
            known = cut_points(model, inputs) or [name for name in names if name]
            raise PlanError(f"no layer {cut!r} to begin a stage at; {nearest(cut, known)}")
    if len(partition.cuts) + 1 == partition.num_stages:
        return
    points = cut_points(model, inputs)
    if partition.num_stages > len(points) + 1:
        raise PlanError(
            f"{partition.num_stages} pipeline stages need as many layers, and this model has {len(points) + 1} that "
            f"can be a stage: ask for {len(points) + 1} or fewer, or {WAY_OUT}"
        )
    raise PlanError(
        f"{partition.num_stages} pipeline stages need {partition.num_stages - 1} cuts, and {len(partition.cuts)} were "
        f"given; the model can be cut at {', '.join(points)}"
    )


def _operations(call: Call, inputs: Inputs, rehearsal: Rehearsal) -> list[str]:
    """What the model itself calls, for comparison."""
    if not rehearsal.has_data:
        try:
            with rehearsal.running() as operations:
                call(*[rehearsal.convert(value) for value in inputs.values])
        except Exception:  # noqa: BLE001 - such as a model that looks at values: then with data, and its own error shows
            rehearsal.use_data()
        else:
            return operations
    with rehearsal.running() as operations:
        call(*[rehearsal.convert(value) for value in inputs.values])
    return operations


def _untraceable(call: Call, error: NotTraceable) -> PlanError:
    name = type(call.model).__name__
    after = f" (after the operation {error.operator!r})" if error.operator else ""
    return PlanError(
        f"the forward of {name} cannot be cut, as it cannot be traced: it stops at {error.line or name}{after}: "
        f"{error.reason}; {WAY_OUT}"
    )


def _check_begun(begun: Sequence[str], cuts: Sequence[str]) -> None:
    if list(begun) == list(cuts):
        return
    missing = [cut.removeprefix(PREFIX) for cut in cuts if cut not in begun]
    if missing:
        raise PlanError(f"no stage can begin at {missing[0]!r}: the model's forward never calls it as a module")
    order = ", ".join(cut.removeprefix(PREFIX) for cut in begun)
    raise PlanError(f"stages must begin in the order in which the model runs them: {order}")


# From graph to stages ----------------------------------------------------------------------------------


_Built = tuple[nn.Module, tuple[int, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


def _split(trace: Trace, num_stages: int, inputs: Inputs) -> list[_Built]:
    nodes = list(trace.graph.nodes)
    _check_filled(trace, num_stages)
    received = _crossings(trace, nodes, num_stages)
    positions = [number for number, value in enumerate(inputs.values) if isinstance(value, torch.Tensor)]
    placeholders = {node: positions[i] for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
    built: list[_Built] = []
    for stage in range(num_stages):
        behind = received[stage + 1] if stage + 1 < num_stages else None
        graph, used = _stage_graph(trace, stage, received[stage], behind, placeholders)
        module: nn.Module = fx.GraphModule(trace.root, graph)
        if behind is None:
            module = _Restored(module, trace.restore)
        built.append((module, used, _described(trace, received[stage]), _described(trace, behind or ())))
    return built


class _Restored(nn.Module):
    """The last stage: gives the model's own output."""

    def __init__(self, body: nn.Module, restore: Callable[[Any], Any]) -> None:
        super().__init__()
        self.body = body
        self._restore = restore

    def forward(self, *values: Any) -> Any:
        return self._restore(self.body(*values))


def _check_filled(trace: Trace, num_stages: int) -> None:
    filled = {_stage_of(node) for node in trace.graph.nodes if node.op.startswith("call")}
    for stage in range(num_stages):
        if stage not in filled:
            raise PlanError(f"stage {stage} would have no layer: begin the next one later")


def described(value: torch.Tensor) -> torch.Tensor:
    """A tensor's shape and dtype, and whether it wants a gradient, without data; rows are contiguous."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=value.requires_grad)


def _described(trace: Trace, nodes: Sequence[fx.Node]) -> tuple[torch.Tensor, ...]:
    return tuple(described(trace.values[node]) for node in nodes)


def _crossings(trace: Trace, nodes: Sequence[fx.Node], num_stages: int) -> list[list[fx.Node]]:
    """For every stage the values made before it that it, or one behind it, uses."""
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
            continue  # its elements are nodes behind it, and `_elements` finds them
        _check_tensor(value, node, first)
        for stage in range(first + 1, last + 1):
            received[stage].append(node)
    return received if not _grew(trace, nodes) else _crossings(trace, list(trace.graph.nodes), num_stages)


def _grew(trace: Trace, nodes: Sequence[fx.Node]) -> bool:
    return len(trace.graph.nodes) != len(nodes)


def _stage_of(node: fx.Node) -> int:
    return int(node.meta["stage"])


def _stage_of_use(user: fx.Node, num_stages: int) -> int:
    return num_stages - 1 if user.op == "output" else _stage_of(user)


def _take_apart(trace: Trace, node: fx.Node, value: Sequence[Any]) -> None:
    """Later stages use the elements of a tuple, each of which can be handed on."""
    home = _stage_of(node)
    with trace.graph.inserting_after(node):
        elements = []
        for index in reversed(range(len(value))):
            element = trace.graph.call_function(operator.getitem, (node, index))
            element.meta["stage"] = home
            trace.values[element] = value[index]
            elements.insert(0, element)
    for user in list(node.users):
        if user in elements or (user.op != "output" and _stage_of(user) == home):
            continue
        parts = type(value)(elements) if type(value) in (tuple, list) else tuple(elements)
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
    trace: Trace,
    stage: int,
    received: Sequence[fx.Node],
    behind: Sequence[fx.Node] | None,
    placeholders: Mapping[fx.Node, int],
) -> tuple[fx.Graph, tuple[int, ...]]:
    """The stage alone, and which of the model's inputs it uses, in its arguments' order."""
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


# By the user's own stages ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Modules one after the other; a tuple becomes several inputs."""

    def __init__(self, modules: Sequence[nn.Module], *, is_last: bool) -> None:
        super().__init__()
        self.links = nn.ModuleList(modules)
        self._is_last = is_last

    def forward(self, *values: Any) -> Any:
        """Run them."""
        output: Any = values
        for link in self.links:
            output = link(*as_tuple(output))
        return output if self._is_last else as_tuple(output)


def as_tuple(output: Any) -> tuple[Any, ...]:
    """What a module hands to the next one."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _divide_chain(
    modules: Sequence[nn.Module], partition: Partition, inputs: Inputs, rehearsal: Rehearsal
) -> list[StagePart]:
    if inputs.has_loss:
        raise PlanError("stages= needs batches of inputs and target: a dictionary has no order to hand on")
    if partition.num_stages > len(modules):
        raise PlanError(
            f"{partition.num_stages} pipeline stages need as many modules, and stages= has {len(modules)}: ask for "
            f"{len(modules)} or fewer"
        )
    bounds = shard_bounds(len(modules), num_shards=partition.num_stages)
    chains = [
        Chain(modules[first:last], is_last=stage == len(bounds) - 1) for stage, (first, last) in enumerate(bounds)
    ]
    try:
        crossing = _rehearse_chains(chains, inputs, rehearsal)
    except PlanError:
        raise
    except Exception:  # noqa: BLE001 - such as a stage that looks at values
        rehearsal.use_data()
        crossing = _rehearse_chains(chains, inputs, rehearsal)
    edges = [(), *crossing, ()]
    everything = tuple(range(len(inputs.values)))
    return [
        StagePart(chain, everything if stage == 0 else (), receives, sends, {}, {}, f"stages[{bounds[stage][0]}]")
        for stage, (chain, (receives, sends)) in enumerate(zip(chains, pairwise(edges), strict=True))
    ]


def _rehearse_chains(chains: Sequence[Chain], inputs: Inputs, rehearsal: Rehearsal) -> list[tuple[torch.Tensor, ...]]:
    """What crosses every cut."""
    values: tuple[Any, ...] = tuple(rehearsal.convert(value) for value in inputs.values)
    crossing: list[tuple[torch.Tensor, ...]] = []
    with rehearsal.running():
        for stage, chain in enumerate(chains):
            versions = [value._version for value in values if isinstance(value, torch.Tensor)] if stage else []
            output = chain(*values)
            if stage and versions != [value._version for value in values]:
                raise PlanError(
                    f"stage {stage} changes its input in place: set inplace=False in its first layer, or let the "
                    "stage before it end with that layer"
                )
            if chain is not chains[-1]:
                for value in output:
                    if not isinstance(value, torch.Tensor):
                        raise PlanError(
                            f"stage {stage} hands on a {type(value).__name__}: only tensors and tuples of tensors can"
                        )
                crossing.append(tuple(described(value) for value in output))
                values = output
    return crossing


# Names ----------------------------------------------------------------------------------------------


def _named(model: nn.Module, parts: Sequence[StagePart]) -> tuple[StagePart, ...]:
    """The same with the model's own names of all tensors that they use."""
    parameters = {id(p): name for name, p in model.named_parameters()}
    buffers = {id(b): name for name, b in model.named_buffers()}
    return tuple(
        StagePart(
            part.module,
            part.inputs,
            part.receives,
            part.sends,
            _names_of(part.module.parameters(), parameters, stage),
            _names_of(part.module.buffers(), buffers, stage, foreign_is_fine=True),
            part.begins,
        )
        for stage, part in enumerate(parts)
    )


def _names_of(
    tensors: Iterable[Any], names: Mapping[int, str], stage: int, *, foreign_is_fine: bool = False
) -> dict[str, Any]:
    found = {}
    for tensor in tensors:
        name = names.get(id(tensor))
        if name is not None:
            found[name] = tensor
        elif not foreign_is_fine:
            raise PlanError(
                f"stage {stage} has a parameter of shape {tuple(tensor.shape)} that is not one of the model's: "
                "stages= must be made of the model's own modules"
            )
    return found
