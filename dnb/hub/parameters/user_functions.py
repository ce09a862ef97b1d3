"""Functions of the user that the hub calls around each update: hooks on gradients and on the step, and `after_step`.

They see what one process would show them: the gradient of the whole batch, and the model once it is updated. What they
keep between two calls is written into shared memory with every commit, so that the next hub goes on from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from dnb.errors import DnbError
from dnb.hub.guarded_calls import user_code
from dnb.job import Job
from dnb.protocol.memory import Layout, SegmentRef
from dnb.transport.layout import plan_layout, slot_views
from dnb.transport.pickling.function_state import KeptState
from dnb.transport.pickling.hooks import GradientHooks, gradient_hooks, step_hooks
from dnb.transport.segments import Segment, create_segment, open_segment
from dnb.transport.state_trees import put_together, take_apart

# Of a place for what functions keep, beyond what they keep now: lists grow.
_SPARE_BYTES = 64 << 10
_ROOT = "kept"


class ModelReplacedError(DnbError):
    """A function that may change values has put another tensor in the place of one."""


class OwnFunctions:
    """The functions of one run, and what they keep.

    Args:
        job: as unpacked.
        optimizer: of the run.
        seed: of the run.
    """

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
        self._model = job.model
        self._after_step = job.after_step
        self._seed = seed
        self._hooked: list[tuple[torch.nn.Parameter, GradientHooks]] = []
        for parameter in job.model.parameters():
            hooks = gradient_hooks(parameter)
            if any(hooks):
                self._hooked.append((parameter, hooks))
        self.has_step_hooks = bool(step_hooks(optimizer))
        self.are_there = self.has_step_hooks or job.after_step is not None or bool(self._hooked)
        self._state = state_of_functions(job.model, optimizer, job.after_step) if self.are_there else None
        self._homes: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @property
    def has_gradient_hooks(self) -> bool:
        """True if `adjust_gradients` has hooks to call."""
        return bool(self._hooked)

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        """Remember the memory of the model's tensors, so that one that a function has moved is brought back there."""
        if self.are_there:
            self._homes = [(name, tensor, tensor.detach()) for name, tensor in tensors.items()]

    def begin(self, step: int) -> None:
        """Seed these functions' random numbers, by the step alone."""
        if self.are_there:
            digest = hashlib.blake2b(f"{self._seed}/{step}/hub".encode(), digest_size=8).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def adjust_gradients(self) -> None:
        """Call the hooks of parameters that have a gradient, as autograd would for that of the whole batch."""
        with user_code("in a hook on a gradient"), torch.no_grad():
            for parameter, hooks in self._hooked:
                gradient = parameter.grad
                if gradient is None:
                    continue
                for hook in hooks.gradient:
                    changed = hook(parameter.grad)
                    if changed is not None and changed is not gradient:
                        gradient.copy_(changed)
                for hook in hooks.accumulated:
                    hook(parameter)
                    if parameter.grad is not None and parameter.grad is not gradient:
                        gradient.copy_(parameter.grad)
                        parameter.grad = gradient

    def after_update(self) -> None:
        """Call `after_step`, and bring home what it or a hook has moved."""
        if self._after_step is not None:
            with user_code("in after_step"), torch.no_grad():
                self._after_step(self._model)
        if self._homes:
            self._bring_back()

    def read(self) -> dict[str, Any]:
        """Return the state that the functions keep."""
        if self._state is None:
            return {}
        with user_code("in what after_step or a hook keeps"):
            return self._state.read()

    def give(self, values: dict[str, Any]) -> tuple[str, ...]:
        """Give functions the state that `read` returned; the names of values without a place here."""
        if self._state is None:
            return tuple(values)
        with user_code("in what after_step or a hook keeps"):
            return self._state.give(values)

    def _bring_back(self) -> None:
        named = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for name, tensor, home in self._homes:
            now = named.get(name)
            if now is tensor and tensor.data_ptr() == home.data_ptr() and tensor.shape == home.shape:
                continue
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            if not is_parameter and (now is None or now.shape != home.shape):
                continue  # a buffer that has grown
            if now is None or now.shape != home.shape or isinstance(now, torch.nn.Parameter) != is_parameter:
                with user_code("in after_step or a hook of the optimizer"):
                    raise ModelReplacedError(
                        f"{name!r} of shape {tuple(home.shape)} {'is gone' if now is None else 'was replaced'}: change "
                        "its values in place, as parameter.data.copy_() does"
                    )
            home.copy_(now.detach())
            if now is tensor:
                tensor.data = home
            else:
                _put_back(self._model, name, tensor, home)


def state_of_functions(model: torch.nn.Module, optimizer: Any, after_step: Any) -> KeptState:
    """Collect the state of the functions that the hub calls, walked alike in the notebook and in the hub."""
    functions: dict[str, Any] = {"after_step": after_step}
    if isinstance(optimizer, torch.optim.Optimizer):
        functions |= {f"hook {number} of the optimizer": hook for number, hook in enumerate(step_hooks(optimizer))}
    for name, parameter in model.named_parameters():
        hooks = gradient_hooks(parameter)
        functions |= {f"hook {number} of {name}": hook for number, hook in enumerate([*hooks[0], *hooks[1]])}
    return KeptState(functions, known=[model, optimizer])


def _put_back(model: torch.nn.Module, name: str, tensor: torch.Tensor, home: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    tensor.data = home
    (module._parameters if key in module._parameters else module._buffers)[key] = tensor  # type: ignore[assignment]


class KeptMemory:
    """The functions' state in shared memory: in one of two places, the other of which holds until the next commit.

    Args:
        segment: as `create_kept_memory` made it.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._memory = memoryview(segment.memory)
        self._room = len(self._memory) // 2

    def write(self, place: int, values: dict[str, Any]) -> bool:
        """Put values into a place; whether there is room."""
        packed, layout, tensors = _laid_out(values)
        if layout.num_bytes > self._room:
            return False
        memory = self._memory[place * self._room : (place + 1) * self._room]
        memory[:8] = len(packed).to_bytes(8, "little")
        memory[8 : 8 + len(packed)] = packed
        for name, view in slot_views(layout, memory).items():
            view.copy_(tensors[name])
        return True

    def read(self, place: int) -> dict[str, Any]:
        """Return the values in a place."""
        memory = self._memory[place * self._room : (place + 1) * self._room]
        length = int.from_bytes(memory[:8], "little")
        tree, packed = msgspec.msgpack.decode(memory[8 : 8 + length], type=tuple[Any, bytes])
        layout = msgspec.msgpack.decode(packed, type=Layout)
        views = slot_views(layout, memory)
        found: dict[str, Any] = put_together(tree, {name: view.clone() for name, view in views.items()})
        return found


def create_kept_memory(values: dict[str, Any], *, name: str, folders: Sequence[Path]) -> KeptMemory:
    """Reserve room for these values, and for more of them.

    Raises:
        SpaceError: there is none.
    """
    room = _laid_out(values)[1].num_bytes
    room = -(-(room + room // 4 + _SPARE_BYTES) // 4096) * 4096
    return KeptMemory(create_segment(name, 2 * room, folders=folders))


def open_kept_memory(ref: SegmentRef) -> KeptMemory:
    """Map the state that another process keeps."""
    return KeptMemory(open_segment(ref))


def _laid_out(values: dict[str, Any]) -> tuple[bytes, Layout, dict[str, torch.Tensor]]:
    """Lay out values: the head, which names the places behind it, and the tensors."""
    tree, tensors = take_apart(values, root=_ROOT)
    room = 4096
    while True:
        layout = plan_layout(tensors.items(), start_bytes=room)
        packed = msgspec.msgpack.encode((tree, msgspec.msgpack.encode(layout)))
        if 8 + len(packed) <= room:
            return packed, layout, tensors
        room = 2 * (8 + len(packed))
