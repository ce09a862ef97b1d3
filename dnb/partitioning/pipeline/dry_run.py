"""Runs forwards without data, to see which operations and shapes come, and says where one failed."""

from __future__ import annotations

import linecache
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dnb.errors import SUMMARY_LENGTH, clean_text, kind_of, text_of

PREFIX = "model."  # of a module's name below `Call`
TORCH_FOLDER = str(Path(torch.__file__).parent)
OWN_FOLDER = str(Path(__file__).parents[1])


def no_autocast() -> AbstractContextManager[Any]:
    """Return the context of a forward in full precision, which changes nothing."""
    return nullcontext()


class DryRun:
    """Runs forwards without data: shapes only, unless the model looks at values; then with data, and nothing stays.

    Args:
        model: whose buffers are to stay as they are.
        autocast: entered around every forward.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self._model = model
        self._autocast = autocast
        self._fake: FakeTensorMode | None = FakeTensorMode(allow_non_fake_inputs=True)

    def use_data(self) -> None:
        """Compute with values from now on."""
        self._fake = None

    @property
    def has_data(self) -> bool:
        """True if values are computed, not only shapes."""
        return self._fake is None

    def convert(self, value: Any) -> Any:
        """Return a tensor as it is handed to a forward."""
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach() if self._fake is None else self._fake.from_tensor(value.detach())

    @contextmanager
    def running(self) -> Iterator[list[str]]:
        """Enter the modes of a dry run; gives the operations that a forward calls."""
        log = _OperationLog()
        states = random.getstate(), np.random.get_state()
        # Without data, too, a tensor of one element, such as BatchNorm's count, changes: torch takes it for a constant.
        changed = [b for b in self._model.buffers() if self._fake is None or b.numel() <= 1]
        kept = [buffer.clone() for buffer in changed]
        attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in self._model.modules()]
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), self._autocast():
                if self._fake is None:
                    with log:
                        yield log.names
                else:
                    with self._without_data(self._fake), self._fake, log:
                        yield log.names
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            with torch.no_grad():
                for buffer, before in zip(changed, kept, strict=True):
                    buffer.copy_(before)
            for module, values, buffers in attributes:  # what forward assigns would be a tensor without data
                _put_back(vars(module), values)
                _put_back(module._buffers, buffers)

    def _without_data(self, fake: FakeTensorMode) -> AbstractContextManager[Any]:
        """Replace the model's own tensors by fakes: torch remembers results of operations on those only."""
        named = chain(
            self._model.named_parameters(remove_duplicate=False), self._model.named_buffers(remove_duplicate=False)
        )
        return _reparametrize_module(self._model, {name: fake.from_tensor(tensor) for name, tensor in named})


def _put_back(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
        now.clear()
        now.update(before)


class _OperationLog(TorchDispatchMode):
    """The names of all operations in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func)
        if not name.startswith(("aten.detach", "aten.alias", "prim.")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class MutationWatch:
    """Sees which values operations change in place."""

    def __init__(self) -> None:
        self.changes: list[tuple[fx.Node, fx.Node]] = []  # the value's node, and the operation's
        self._sharing: dict[int, list[fx.Node]] = {}  # nodes whose values lie in one piece of memory

    @contextmanager
    def during(self, node: fx.Node, arguments: Any) -> Iterator[Callable[[Any], None]]:
        """Watch an operation; the function it gives is to be called with the result."""
        given = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        versions = [_version(tensor) for tensor in given]

        def made(value: Any) -> None:
            for tensor, version in zip(given, versions, strict=True):
                if _version(tensor) != version:
                    self.changes += [(other, node) for other in self._sharing.get(_memory(tensor), ())]
            if isinstance(value, torch.Tensor):
                self._sharing.setdefault(_memory(value), []).append(node)

        yield made


def _version(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor._version


def _memory(tensor: torch.Tensor) -> int:
    """Return the identity of the storage that all views of a tensor share; a sparse tensor has no views."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except NotImplementedError:
            return id(tensor)


class _KeptValues(fx.Interpreter):
    """Runs a graph, and keeps every value."""

    def __init__(self, module: fx.GraphModule, nodes: Mapping[str, fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}
        self.watch = MutationWatch()
        self._nodes = nodes  # `GraphModule` has copied the graph

    def run_node(self, n: fx.Node) -> Any:
        node = self._nodes[n.name]
        if not n.op.startswith("call"):
            result = super().run_node(n)
        else:
            with self.watch.during(node, self.fetch_args_kwargs_from_env(n)) as made:
                result = super().run_node(n)
                made(result)
        self.values[node] = result
        return result


def rehearse(
    graph: fx.Graph, attributes: dict[str, Any], values: Sequence[Any]
) -> tuple[dict[fx.Node, Any], list[tuple[fx.Node, fx.Node]]]:
    """Run a graph; every node's value, and what was changed in place by which node."""
    run = _KeptValues(fx.GraphModule(attributes, graph), {node.name: node for node in graph.nodes})
    run.run(*[value for value in values if isinstance(value, torch.Tensor)], enable_io_processing=False)
    return run.values, run.watch.changes


def users_line(error: BaseException) -> str:
    """Return the innermost line of the user's own code that an error went through, for people."""
    seen: BaseException | None = error
    while seen is not None:
        frames = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(seen.__traceback__)]
        own = [(name, number) for name, number in frames if _is_users(name)]
        if own:
            name, number = own[-1]
            return f"{name}:{number}: {linecache.getline(name, number).strip()}"
        seen = seen.__cause__ or seen.__context__
    return ""


def _is_users(name: str) -> bool:
    return not name.startswith((TORCH_FOLDER, OWN_FOLDER, "<")) and Path(name).name != "contextlib.py"


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its text."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    kind = kind_of(error)
    return clean_text(f"{kind}: {lines[0]}" if lines else kind, length=SUMMARY_LENGTH)


def is_plain(value: Any) -> bool:
    """Return whether a value holds for every batch of these shapes, such as a size."""
    if isinstance(value, tuple | list):
        return all(is_plain(element) for element in value)
    return value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device | slice)


def target_name(node: fx.Node) -> str:
    """Return the name of the function or module that a node calls, for messages."""
    if isinstance(node.target, str):
        name = node.target.removeprefix(PREFIX)
        return repr(name) if node.op == "call_module" else name
    return str(getattr(node.target, "__name__", node.target))
