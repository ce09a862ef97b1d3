"""A model's forward as a graph of calls, each of which knows the stage in which it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dnb.errors import USER_ERRORS, PlanError
from dnb.planning.rehearsing import (
    Rehearsal,
    Watch,
    first_line,
    is_plain,
    rehearse,
    target_name,
    users_line,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called with, and whether its output bears the loss."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    has_loss: bool = False

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Of a batch: a dictionary, or inputs with the target behind them."""
        if isinstance(batch, Mapping):
            return cls((), dict(batch), has_loss=True)
        return cls(tuple(batch[:-1]))

    @property
    def values(self) -> tuple[Any, ...]:
        """All of them, in order."""
        return (*self.positional, *self.keywords.values())


class Call(nn.Module):
    """A model under one signature: inputs by position, and out comes what the loss is made of."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # and nothing below: a layer may be in another mode on purpose
        self._num_positional = len(inputs.positional)
        self._names = tuple(inputs.keywords)
        self._has_loss = inputs.has_loss

    def forward(self, *values: Any) -> Any:
        """Call the model."""
        named = dict(zip(self._names, values[self._num_positional :], strict=True))
        output = self.model(*values[: self._num_positional], **named)
        return output.loss if self._has_loss else output


@dataclass(frozen=True, slots=True)
class Trace:
    """A graph whose nodes have a stage, and what became of their values when it was rehearsed."""

    graph: fx.Graph
    root: nn.Module | dict[str, Any]  # what the graph's nodes name
    values: dict[fx.Node, Any]
    restore: Callable[[Any], Any]  # from the graph's output to the model's


class NotTraceable(Exception):  # noqa: N818 - a verdict: there may be another way
    """A forward that cannot be followed.

    Args:
        reason: the first line of the cause.
        operator: the last operation before it.
        line: of the user's code.
    """

    def __init__(self, reason: str, *, operator: str, line: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.operator = operator
        self.line = line


# By symbols ----------------------------------------------------------------------------------------


class _Symbol(fx.Proxy):
    """A value that is not known, of a shape that is."""

    tracer: SymbolTracer

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.values.get(self.node)
        if isinstance(value, torch.Tensor):
            found = getattr(value, name, None)
            if found is not None and not callable(found) and is_plain(found):
                return found
        return super().__getattr__(name)

    def __len__(self) -> int:
        value = self.tracer.values.get(self.node)
        return len(value) if value is not None else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        value = self.tracer.values.get(self.node)
        if value is None:
            return iter(super().__iter__())
        # A tensor is taken apart as torch does it; indexing is among what fx defines for all symbols.
        symbol: Any = self.unbind(0) if isinstance(value, torch.Tensor) else self
        return iter([symbol[index] for index in range(len(value))])


class SymbolTracer(fx.Tracer):
    """Follows a forward down to modules in which no stage begins; those stay whole, so that they know train from eval.

    Beside each symbol goes a value without data, so that what Python asks of a shape is answered.

    Args:
        cuts: names (below `Call`) of the modules at which stages begin.
        opened: names of further modules to look into.
    """

    proxy_buffer_attributes = True

    def __init__(self, cuts: Sequence[str], *, opened: Iterable[str] = ()) -> None:
        super().__init__()
        self.trace_asserts = True
        self._cuts = set(cuts)
        self._opened = {"model", *opened}
        for cut in cuts:
            parts = cut.split(".")
            self._opened.update(".".join(parts[:end]) for end in range(1, len(parts)))
        self.begun: list[str] = []
        self.calls: list[tuple[str, int]] = []  # every module that is called, and the number of nodes before it
        self.values: dict[fx.Node, Any] = {}
        self.last_operation = ""
        self.operations: list[str] = []  # that the graph calls
        self._inputs: tuple[Any, ...] = ()
        self._has_values = True
        self._log: list[str] = []
        self._watch = Watch()
        self._is_computing = False
        self._num_nodes = 0

    def follow(self, call: Call, inputs: tuple[Any, ...], log: list[str] | None) -> fx.Graph:
        """Trace; only tensors become symbols.

        Args:
            call: the model.
            inputs: without data.
            log: to which the rehearsal adds operations; None: nothing is computed beside the symbols.
        """
        self._inputs = inputs
        self._has_values = log is not None
        self._log = [] if log is None else log
        with _Factories(self):
            return self.trace(call)

    @property
    def is_following(self) -> bool:
        """Whether what is called now is the user's forward, not a value beside it."""
        return not self._is_computing and hasattr(self, "graph")

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:  # noqa: ARG002
        """One symbol per tensor."""
        arguments = [
            self.create_proxy("placeholder", f"input_{number}", (), {}) if isinstance(value, torch.Tensor) else value
            for number, value in enumerate(self._inputs)
        ]
        return root_fn, [self.root, *arguments]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Whether a module stays whole."""
        return module_qualified_name not in self._opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Notice where a stage begins."""
        if self._is_computing:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        self.calls.append((name, self._num_nodes))
        if name in self._cuts and name not in self.begun:
            self.begun.append(name)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are symbols to the user's forward only."""
        return attr_val if self._is_computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *arguments: Any, **named: Any) -> fx.Node:
        """Nodes know their stage."""
        node = super().create_node(kind, *arguments, **named)
        node.meta["stage"] = len(self.begun)
        self._num_nodes += kind not in ("placeholder", "get_attr", "output")
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbol that knows its shape."""
        return _Symbol(node, self)

    def create_proxy(self, kind: str, *arguments: Any, **named: Any) -> Any:
        """A symbol; but what is known for every batch of this shape, such as a size, is no symbol."""
        proxy = super().create_proxy(kind, *arguments, **named)
        node = proxy.node
        if node.op.startswith("call"):
            self.last_operation = target_name(node)
        if not self._has_values:
            return proxy
        self._watch.enter(len(self.begun), self.values)
        begin = len(self._log)
        value = self.values[node] = self._computed(node)
        self.operations += self._log[begin:]
        self._watch.check(node)
        if node.op.startswith("call") and value is not None and is_plain(value):
            self.graph.erase_node(node)
            self._num_nodes -= 1
            return value
        return proxy

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._inputs[int(str(node.target).removeprefix("input_"))]
        arguments = fx.map_arg(node.args, self.values.__getitem__)
        named = fx.map_arg(node.kwargs, self.values.__getitem__)
        self._is_computing = True
        try:
            if callable(node.target):
                return node.target(*arguments, **named)
            if node.op == "call_method":
                return getattr(arguments[0], node.target)(*arguments[1:], **named)
            found = operator.attrgetter(str(node.target))(self.root)
            return found(*arguments, **named) if node.op == "call_module" else found
        finally:
            self._is_computing = False


class _Factories(TorchFunctionMode):
    """Tensors that a forward makes from nothing, such as positions or noise, are made anew in every step."""

    def __init__(self, tracer: SymbolTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not self._tracer.is_following or any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return func(*args, **kwargs)
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        if getattr(func, "__module__", "") not in (None, "torch", "torch._C._VariableFunctions"):
            return func(*args, **kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs)


def trace_by_symbols(
    call: Call, inputs: Inputs, cuts: Sequence[str], rehearsal: Rehearsal
) -> tuple[Trace, list[str], list[str]]:
    """The trace of a forward, the cuts in the order in which they were reached, and the operations that are called.

    Raises:
        NotTraceable: Python decided by a value.
        PlanError: an operation changes in place what came over a cut.
    """
    tracer = SymbolTracer(cuts)
    values = tuple(rehearsal.convert(value) for value in inputs.values)
    try:
        with rehearsal.running() as log:
            graph = tracer.follow(call, values, log)
    except (PlanError, KeyboardInterrupt):
        raise
    except USER_ERRORS as error:
        raise NotTraceable(first_line(error), operator=tracer.last_operation, line=users_line(error)) from error
    return Trace(graph, call, tracer.values, lambda output: output), tracer.begun, tracer.operations


def trace_by_export(call: Call, inputs: Inputs, cuts: Sequence[str], rehearsal: Rehearsal) -> tuple[Trace, list[str]]:
    """Like `trace_by_symbols`, by `torch.export`: holds for these shapes and for this mode only.

    Raises:
        NotTraceable: `torch.distributed.pipelining.pipeline` could not trace it, either.
        PlanError: an operation changes in place what came over a cut.
    """
    try:
        program = torch.export.export(call, inputs.values)
        module = program.module(check_guards=False)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:
        raise NotTraceable(first_line(error), operator="", line=users_line(error)) from error
    begun: list[str] = []
    attributes: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            names = _scopes(node)
            begun += [cut for cut in cuts if cut not in begun and cut in names]
        elif node.op == "get_attr":
            attributes[node.target] = _attribute(call, module, node.target)
        node.meta["stage"] = len(begun)
    for node in list(module.graph.nodes):
        if node.op == "call_module":  # guards on shapes, which are kept per shape anyway
            module.graph.erase_node(node)
    spec = program.call_spec.out_spec
    with rehearsal.running():
        values = rehearse(module.graph, attributes, [rehearsal.convert(value) for value in inputs.values])
    return Trace(module.graph, attributes, values, lambda flat: pytree.tree_unflatten(list(flat), spec)), begun


def _scopes(node: fx.Node) -> set[str]:
    """Names of the modules within whose forward an operation was called, outer ones included."""
    names: set[str] = set()
    for path, _kind in node.meta.get("nn_module_stack", {}).values():
        parts = path.removeprefix("L['self'].").split("@")[0].split(".")
        names.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return names


def _attribute(call: Call, module: nn.Module, target: str) -> Any:
    """The model's own tensor of that name, if it has one, as torch.export may make tensors of its own."""
    for owner in (call, module):
        try:
            return operator.attrgetter(target)(owner)
        except AttributeError:
            continue
    raise AttributeError(target)
