"""The layers of a model: the units between which it can be cut, and what goes over each cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

# A module that holds less than this share of the parameters is not looked into: a finer cut would gain little.
LEAST_SHARE = 0.25
# Of torch's own modules only these are chains; the insides of others are not modules that are called.
_CHAINS = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)

Forward = Callable[[], Any]  # one micro-batch through the model


@dataclass(frozen=True, slots=True)
class Layer:
    """A module before which a model can be cut; the layer reaches to the next one's beginning."""

    name: str
    module: nn.Module

    @property
    def kind(self) -> str:
        """The module's class."""
        return type(self.module).__name__


class Begin(NamedTuple):
    """When a layer began: by the clock, and by the number of the next node of autograd's graph."""

    seconds: float
    node: int


def begin_now() -> Begin:
    """Return the beginning of a layer that begins now."""
    return Begin(time.perf_counter(), torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


@dataclass(slots=True)
class _LayerCall:
    """A module as it was called, and the modules that it called in turn."""

    name: str
    module: nn.Module
    begin: Begin
    calls: list[_LayerCall] = field(default_factory=list)
    is_passing: bool = False  # it gives the very tensor that it got, as it does nothing, or works in place


@dataclass(slots=True)
class ForwardFlow:
    """The tensors that a forward made, used and kept, in bytes by layer."""

    num_layers: int
    cut_bytes: list[int]  # before each layer; before the first: the model's inputs
    cut_gradient_bytes: list[int]
    kept_bytes: list[int]
    users: dict[str, list[int]]  # of each parameter, the layers, in order


def find_layers(model: nn.Module, forward: Forward) -> list[Layer]:
    """Find the chain of modules that a forward runs one after the other; see `find_beginnings`."""
    return [layer for layer, _ in find_beginnings(model, forward)]


def find_beginnings(model: nn.Module, forward: Forward) -> list[tuple[Layer, Begin]]:
    """Find the chain of modules that a forward runs one after the other, and when each began.

    It looks into the model, into sequences within it, and into modules that hold much of it and are not one of several
    of their kind (those are a chain themselves). A module that is called more than once, does nothing or works in place
    is no beginning of a layer.
    """
    root = _watch_calls(model, forward)
    num_calls: dict[int, int] = {}
    for call in _all_calls(root):
        num_calls[id(call.module)] = num_calls.get(id(call.module), 0) + 1
    chain = list(_chain(root, whole=_parameter_bytes(model)))
    found = [
        call
        for number, call in enumerate(chain)
        if number == 0 or (num_calls[id(call.module)] == 1 and not call.is_passing)
    ]
    return [(Layer(call.name, call.module), call.begin) for call in found]


def _watch_calls(model: nn.Module, forward: Forward) -> _LayerCall:
    names = {id(module): name for name, module in model.named_modules()}
    root = _LayerCall("", model, begin_now())
    stack = [root]

    def enter(module: nn.Module, _: Any) -> None:
        if module is not model:
            call = _LayerCall(names[id(module)], module, begin_now())
            stack[-1].calls.append(call)
            stack.append(call)

    def leave(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        if module is not model:
            stack.pop().is_passing = any(output is value for value in (*given, *named.values()))

    with ExitStack() as hooks:
        for module in model.modules():
            _hold(hooks, module.register_forward_pre_hook(enter))
            _hold(hooks, module.register_forward_hook(leave, with_kwargs=True))
        forward()
    return root


def _hold(stack: ExitStack, handle: RemovableHandle) -> None:
    stack.callback(handle.remove)


def _all_calls(call: _LayerCall) -> Iterator[_LayerCall]:
    for each in call.calls:
        yield each
        yield from _all_calls(each)


def _chain(call: _LayerCall, *, whole: int) -> Iterator[_LayerCall]:
    if not call.calls:
        yield call
        return
    kinds = [type(each.module) for each in call.calls]
    for each in call.calls:
        is_alone = kinds.count(type(each.module)) == 1
        if each.calls and (isinstance(each.module, nn.Sequential) or (is_alone and _is_wide(each, whole=whole))):
            yield from _chain(each, whole=whole)
        else:
            yield each


def _is_wide(call: _LayerCall, *, whole: int) -> bool:
    """Return whether a module is worth opening: a container of several calls, with enough of the parameters."""
    is_own = not type(call.module).__module__.startswith("torch.nn.")
    is_open = is_own or isinstance(call.module, _CHAINS)
    return is_open and len(call.calls) > 1 and _parameter_bytes(call.module) >= LEAST_SHARE * whole


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@contextmanager
def entering(layers: list[Layer], enter: Callable[[int], None]) -> Iterator[None]:
    """Call `enter` with the layer's number whenever one begins, but the first, which begins with the forward."""

    def hook_for(number: int) -> Callable[..., None]:
        return lambda *_: enter(number)

    with ExitStack() as hooks:
        for number, layer in enumerate(layers[1:], 1):
            _hold(hooks, layer.module.register_forward_pre_hook(hook_for(number)))
        yield


@dataclass(slots=True)
class _TensorUse:
    """A tensor that was made in one layer and is used until another."""

    made_in: int
    used_in: int
    num_bytes: int
    comes_back: bool = False  # as a gradient


class _TensorWatch(TorchFunctionMode):
    """Sees every tensor that a torch function takes or returns, as the caller of the function does."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.layer = 0
        self.is_over = False  # the last layer has ended: what is used now, such as targets, need not come to it
        self.traces: list[_TensorUse] = []
        self.users: dict[str, list[int]] = {name: [] for name in parameters}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._known: Any = WeakIdKeyDictionary()  # tensor -> its trace
        self._given: dict[int, int] = {}  # to the function that runs: addresses, and the layers that made them

    def add_input(self, tensor: torch.Tensor) -> None:
        """Add a tensor of the batch, which is there before the first layer."""
        self._known[tensor] = trace = _TensorUse(-1, -1, tensor.nbytes)
        self.traces.append(trace)

    def made_in(self, storage: torch.UntypedStorage) -> int:
        """Return the layer that made a kept tensor: what a function was not given, it has made itself."""
        return self._given.get(storage.data_ptr(), self.layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._given.clear()
        for tensor in _tensors((args, kwargs)):
            name = self._names.get(id(tensor))
            if name is not None:
                self._note_user(name)
            elif (trace := self._known.get(tensor)) is not None:
                if trace.made_in >= 0 or not self.is_over:
                    trace.used_in = max(trace.used_in, self.layer)
                self._given[_address(tensor)] = trace.made_in
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if id(tensor) not in self._names and tensor not in self._known:
                trace = _TensorUse(self.layer, self.layer, tensor.nbytes, tensor.requires_grad)
                self._known[tensor] = trace
                self.traces.append(trace)
        return result

    def _note_user(self, name: str) -> None:
        users = self.users[name]
        if not users or users[-1] != self.layer:
            users.append(self.layer)


def watch_flow(model: nn.Module, layers: list[Layer], forward: Forward, *, inputs: Any) -> ForwardFlow:
    """Run one forward, and record the bytes it makes, keeps, and brings from one layer to a later one.

    Args:
        model: in training mode.
        layers: as found.
        forward: leaves a graph, whose saved tensors are counted where they were made.
        inputs: tensors of the batch, in any nesting.
    """
    watch = _TensorWatch(dict(model.named_parameters()))
    for tensor in _tensors(inputs):
        watch.add_input(tensor)
    kept = [0] * len(layers)
    not_counted = {_address(tensor) for tensor in [*model.parameters(), *model.buffers(), *_tensors(inputs)]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            not_counted.add(storage.data_ptr())  # kept from now on: nothing else gets this address
            kept[max(0, watch.made_in(storage))] += storage.nbytes()
        return tensor

    def enter(number: int) -> None:
        watch.layer = number

    def end(*_: Any) -> None:
        watch.is_over = True

    with (
        ExitStack() as hooks,
        entering(layers, enter),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        watch,
    ):
        _hold(hooks, layers[-1].module.register_forward_hook(end))
        forward()
    _name_unseen_users(model, layers, watch.users)
    crossing = [[trace for trace in watch.traces if trace.made_in < cut <= trace.used_in] for cut in range(len(layers))]
    crossing[0] = [trace for trace in watch.traces if trace.made_in < 0 <= trace.used_in]
    return ForwardFlow(
        num_layers=len(layers),
        cut_bytes=[sum(trace.num_bytes for trace in cut) for cut in crossing],
        cut_gradient_bytes=[sum(trace.num_bytes for trace in cut if trace.comes_back) for cut in crossing],
        kept_bytes=kept,
        users=watch.users,
    )


def _name_unseen_users(model: nn.Module, layers: list[Layer], users: dict[str, list[int]]) -> None:
    """Assign a parameter that no function was seen to take to the layer it lies in, or else to the first."""
    owners = {id(parameter): number for number, layer in reversed(list(enumerate(layers)))
              for parameter in layer.module.parameters()}  # fmt: skip
    for name, parameter in model.named_parameters():
        if not users[name]:
            users[name].append(owners.get(id(parameter), 0))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
