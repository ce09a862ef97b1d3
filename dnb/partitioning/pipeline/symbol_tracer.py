"""Traces of a forward by symbols: its own code run with proxies in the place of tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.dry_run import (
    DryRun,
    MutationWatch,
    first_line,
    is_plain,
    target_name,
    users_line,
)
from dnb.partitioning.pipeline.tracing import Inputs, ModelCall, ModelTrace, NotTraceable


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


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[_Symbol, Any], Any]:
    """Make an augmented assignment that changes its tensor: fx would make a new value of it."""
    return lambda symbol, other: symbol.tracer.create_proxy("call_function", function, (symbol, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
                  operator.ipow, operator.iand, operator.ior, operator.ixor):  # fmt: skip
    setattr(_Symbol, f"__{_function.__name__}__", _in_place(_function))


class SymbolTracer(fx.Tracer):
    """Follows a forward down to modules in which no stage begins; those stay whole, so that they know train from eval.

    Beside each symbol goes a value without data, so that what Python asks of a shape is answered.

    Args:
        opened: names (below `ModelCall`) of the modules to look into.
    """

    proxy_buffer_attributes = True

    def __init__(self, opened: Iterable[str]) -> None:
        super().__init__()
        self.trace_asserts = True
        self._opened = {"model", *opened}
        self.begins: dict[str, int] = {}  # every module that is called, and the number of operations before it
        self.idle: set[str] = set()  # of these, modules that compute nothing when they are first called
        self.values: dict[fx.Node, Any] = {}
        self.last_operation = ""
        self.operations: list[str] = []  # that the graph calls
        self._inputs: tuple[Any, ...] = ()
        self._has_values = True
        self._log: list[str] = []
        self.watch = MutationWatch()
        self._is_computing = False
        self._num_nodes = 0

    def follow(self, call: ModelCall, inputs: tuple[Any, ...], log: list[str] | None) -> fx.Graph:
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
        """True while the user's forward is traced, not a value beside it."""
        return not self._is_computing and hasattr(self, "graph")

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:  # noqa: ARG002
        """Create one symbol per tensor."""
        arguments = [
            self.create_proxy("placeholder", f"input_{number}", (), {}) if isinstance(value, torch.Tensor) else value
            for number, value in enumerate(self._inputs)
        ]
        return root_fn, [self.root, *arguments]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Return whether a module stays whole."""
        return module_qualified_name not in self._opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record the place at which a module begins."""
        if self._is_computing:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if name in self.begins:
            return super().call_module(m, forward, args, kwargs)
        self.begins[name] = self._num_nodes
        before = len(self._log)
        output = super().call_module(m, forward, args, kwargs)
        if self._has_values and len(self._log) == before:
            self.idle.add(name)
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return parameters and buffers as symbols to the user's forward only."""
        return attr_val if self._is_computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *arguments: Any, **named: Any) -> fx.Node:
        """Create a node that knows its place."""
        node = super().create_node(kind, *arguments, **named)
        node.meta["place"] = self._num_nodes
        self._num_nodes += kind not in ("placeholder", "get_attr", "output")
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Create a symbol that knows its shape."""
        return _Symbol(node, self)

    def create_proxy(self, kind: str, *arguments: Any, **named: Any) -> Any:
        """Create a symbol; a value known for every batch of this shape, such as a size, stays a value."""
        proxy = super().create_proxy(kind, *arguments, **named)
        node = proxy.node
        if node.op.startswith("call"):
            self.last_operation = target_name(node)
        if not self._has_values:
            return proxy
        begin = len(self._log)
        value = self.values[node] = self._computed(node)
        self.operations += self._log[begin:]
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
            if node.op == "get_attr":
                return operator.attrgetter(str(node.target))(self.root)
            with self.watch.during(node, (arguments, named)) as made:
                if callable(node.target):
                    value = node.target(*arguments, **named)
                elif node.op == "call_method":
                    value = getattr(arguments[0], node.target)(*arguments[1:], **named)
                else:
                    value = operator.attrgetter(str(node.target))(self.root)(*arguments, **named)
                made(value)
            return value
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
    call: ModelCall, inputs: Inputs, opened: Iterable[str], dry_run: DryRun
) -> tuple[ModelTrace, list[str]]:
    """Trace a forward by symbols, and record the operations that are called.

    Args:
        call: the model.
        inputs: an example.
        opened: names of modules that are looked into.
        dry_run: computes values beside the symbols.

    Raises:
        NotTraceable: Python decided by a value.
    """
    tracer = SymbolTracer(opened)
    values = tuple(dry_run.convert(value) for value in inputs.values)
    try:
        with dry_run.running() as log:
            graph = tracer.follow(call, values, log)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:
        raise NotTraceable(first_line(error), operator=tracer.last_operation, line=users_line(error)) from error
    trace = ModelTrace(
        graph, call, tracer.values, lambda output: output, tracer.begins, tracer.watch.changes, tracer.idle
    )
    return trace, tracer.operations
