"""A model's forward as a graph of calls, each of which knows the stage in which it runs."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dnb.errors import USER_ERRORS, PlanError
from dnb.partitioning.pipeline.dry_run import (
    DryRun,
    first_line,
    rehearse,
    target_name,
    users_line,
)
from dnb.user_code.model_call import arguments_of


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments of a model's call, and the way to find the loss in its output."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    find_loss: Callable[[Any], Any] | None = None  # in the output of a model that computes it

    @classmethod
    def of(cls, batch: Any, *, find_loss: Callable[[Any], Any] | None = None, model: nn.Module | None = None) -> Inputs:
        """Take a batch apart into what the model gets by name or by position; a target behind it is left out.

        Args:
            batch: named arguments, inputs with the target behind them, or, for a model that returns its own loss,
                all that it gets.
            find_loss: finds the loss in the model's output; None: the model returns none, unless the batch is a
                dictionary.
            model: tells whether it takes the batch whole.
        """
        if find_loss is None and isinstance(batch, Mapping):
            find_loss = attrgetter("loss")
        given = arguments_of(model, batch, has_target=find_loss is None)
        return cls(given.positional, given.keywords, find_loss)

    @property
    def has_loss(self) -> bool:
        """True if the model's output bears the loss."""
        return self.find_loss is not None

    @property
    def values(self) -> tuple[Any, ...]:
        """All of them, in order."""
        return (*self.positional, *self.keywords.values())


class ModelCall(nn.Module):
    """A model under one signature: inputs by position, and out comes what the loss is made of."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # and nothing below: a layer may be in another mode on purpose
        self._num_positional = len(inputs.positional)
        self._names = tuple(inputs.keywords)
        self._find_loss = inputs.find_loss

    def forward(self, *values: Any) -> Any:
        """Call the model."""
        named = dict(zip(self._names, values[self._num_positional :], strict=True))
        output = self.model(*values[: self._num_positional], **named)
        return output if self._find_loss is None else self._find_loss(output)


@dataclass(frozen=True, slots=True)
class ModelTrace:
    """A graph, what became of its nodes' values when it was rehearsed, and where in it modules begin.

    Args:
        graph: its nodes know how many operations come before them, as `meta["place"]`.
        root: what the graph's nodes name.
        values: of nodes.
        restore: from the graph's output to the model's.
        begins: modules that are called, in that order, and the number of operations before each.
        changes: values that an operation changes in place, and the operation.
        idle: modules that compute nothing when they are first called, such as `nn.Identity`.
    """

    graph: fx.Graph
    root: nn.Module | dict[str, Any]
    values: dict[fx.Node, Any]
    restore: Callable[[Any], Any]
    begins: Mapping[str, int]
    changes: Sequence[tuple[fx.Node, fx.Node]]
    idle: Set[str] = frozenset()

    def begun(self, cuts: Sequence[str]) -> list[str]:
        """Return those of the modules that are called, in that order."""
        return [name for name in self.begins if name in cuts]

    def assign(self, cuts: Sequence[str]) -> None:
        """Let every node know its stage, as `meta["stage"]`.

        Args:
            cuts: modules at which stages begin, in the order in which they are called.

        Raises:
            PlanError: an operation changes in place what came over a cut.
        """
        places = [self.begins[cut] for cut in cuts]
        for node in self.graph.nodes:
            node.meta["stage"] = bisect_right(places, node.meta["place"])
        for changed, by in self.changes:
            made_in, changed_in = changed.meta["stage"], by.meta["stage"]
            if made_in < changed_in:
                raise PlanError(
                    f"stage {changed_in} changes in place ({target_name(by)}) what stage {made_in} has made "
                    f"({target_name(changed)}): set inplace=False there, or begin the stage one layer later"
                )


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


def containing(cuts: Iterable[str]) -> set[str]:
    """Return the modules in which these lie."""
    found: set[str] = set()
    for cut in cuts:
        parts = cut.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return found


def trace_by_export(call: ModelCall, inputs: Inputs, dry_run: DryRun) -> ModelTrace:
    """Trace like `trace_by_symbols`, by `torch.export`: holds for these shapes and for this mode only.

    Raises:
        NotTraceable: `torch.distributed.pipelining.pipeline` could not trace it, either.
    """
    try:
        with _noting_calls(call) as called:
            program = torch.export.export(call, inputs.values)
        module = program.module(check_guards=False)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:
        raise NotTraceable(first_line(error), operator="", line=users_line(error)) from error
    for node in list(module.graph.nodes):
        if node.op == "call_module":  # guards on shapes, which are kept per shape anyway
            module.graph.erase_node(node)
    first: dict[str, int] = {}  # operation within each module that has some
    attributes: dict[str, Any] = {}
    place = 0
    for node in module.graph.nodes:
        node.meta["place"] = place
        if node.op == "get_attr":
            attributes[node.target] = _attribute(call, module, node.target)
        elif node.op not in ("placeholder", "output"):
            for name in _scopes(node):
                first.setdefault(name, place)
            place += 1
    spec = program.call_spec.out_spec
    with dry_run.running():
        values, changes = rehearse(module.graph, attributes, [dry_run.convert(value) for value in inputs.values])
    return ModelTrace(
        module.graph,
        attributes,
        values,
        lambda flat: pytree.tree_unflatten(list(flat), spec),
        _begins(called, first, end=place),
        changes,
        called.keys() - first.keys(),
    )


@contextmanager
def _noting_calls(call: ModelCall) -> Iterator[dict[str, None]]:
    """Enter around a forward; yield the modules that it calls, in the order of their first calls."""
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in call.named_modules()
        if name
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _begins(called: Iterable[str], first: Mapping[str, int], *, end: int) -> dict[str, int]:
    """Return the places at which modules begin; one without an operation begins with the next one that has some."""
    begins: dict[str, int] = {}
    for name in reversed(list(called)):
        begins[name] = end = min(first.get(name, end), end)
    return dict(reversed(begins.items()))


def _scopes(node: fx.Node) -> list[str]:
    """Return the names of the modules within whose forward an operation was called, outer ones first."""
    stack = node.meta.get("nn_module_stack", {}).values()
    return [path.removeprefix("L['self'].").split("@")[0] for path, _kind in stack]


def _attribute(call: ModelCall, module: nn.Module, target: str) -> Any:
    """Return the model's own tensor of that name, if it has one, as torch.export may make tensors of its own."""
    for owner in (call, module):
        try:
            return operator.attrgetter(target)(owner)
        except AttributeError:
            continue
    raise AttributeError(target)
