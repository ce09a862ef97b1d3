"""States of modules that have no place of fixed size: extra states, and buffers that are added, or change their shape.

Beside the tensors of a layout, a run may have *loose* states: what `get_extra_state` of a module gives, and buffers of
which forward has made others. They travel whole whenever they have changed, without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dnb.errors import ArgumentError, kind_of, summary_of
from dnb.transport.state_trees import pack_state, unpack_state

# As torch calls them in a state_dict.
EXTRA = "_extra_state"


@dataclass(slots=True)
class LooseStates:
    """Some loose states, by name.

    Args:
        extra: of modules, by their names in a state_dict.
        buffers: likewise; None: the buffer is there and holds nothing.
        transient: names of those buffers that belong in no state_dict.
    """

    extra: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor | None] = field(default_factory=dict)
    transient: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.extra or self.buffers)

    def update(self, later: LooseStates) -> None:
        """Take over what is in another one."""
        self.extra.update(later.extra)
        self.buffers.update(later.buffers)
        self.transient = (self.transient - later.buffers.keys()) | later.transient

    def pack(self) -> bytes:
        """Encode all states in one piece.

        Raises:
            TypeError: an extra state holds what cannot be kept without pickle.
        """
        return pack_state({"extra": self.extra, "buffers": self.buffers, "transient": sorted(self.transient)})

    @classmethod
    def unpack(cls, packed: bytes | memoryview) -> LooseStates:
        """Decode what `pack` has encoded.

        Raises:
            ValueError: it is none.
        """
        try:
            state = unpack_state(packed)
            extra, buffers, transient = state["extra"], state["buffers"], state["transient"]
        except Exception as error:
            raise ValueError(f"loose states cannot be decoded: {summary_of(error)}") from error
        names = [*extra, *buffers, *transient] if isinstance(extra, dict) and isinstance(buffers, dict) else [None]
        is_tensor = all(value is None or isinstance(value, torch.Tensor) for value in buffers.values())
        if not is_tensor or not all(isinstance(name, str) for name in names):
            raise ValueError("loose states have names, and those that are buffers are tensors")
        return cls(extra, buffers, set(transient))


def extra_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have an extra state, by its name in a state_dict."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        kind = type(module)
        has_both = (
            kind.get_extra_state is not nn.Module.get_extra_state
            and kind.set_extra_state is not nn.Module.set_extra_state
        )
        if has_both:
            found[f"{path}.{EXTRA}" if path else EXTRA] = module
    return found


def put_buffer(model: nn.Module, name: str, tensor: torch.Tensor | None, *, is_transient: bool) -> None:
    """Let a module have a buffer, whether it had one of that name or not.

    Raises:
        AttributeError: there is no such module, or it has something else by that name.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key not in module._buffers:
        if hasattr(module, key):
            raise AttributeError(f"{name!r} is no buffer")
        module.register_buffer(key, tensor, persistent=not is_transient)
        return
    module._buffers[key] = tensor


def check_extra_states(model: nn.Module) -> None:
    """Refuse extra states that cannot travel.

    Raises:
        ArgumentError: with the name of one.
    """
    for name, module in extra_owners(model).items():
        try:
            pack_state(module.get_extra_state())
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            owner = name.removesuffix(EXTRA).removesuffix(".") or "the model"
            what = str(error) if isinstance(error, TypeError) else f"{kind_of(error)}: {summary_of(error)}"
            raise ArgumentError(
                f"the extra state of {owner!r} cannot be kept ({what}): let get_extra_state return numbers, text, "
                "bytes, tensors, and lists and dictionaries of them"
            ) from error


def bring_states_home(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model the buffers and extra states that the hub has; call it without gradients.

    Args:
        model: of the notebook.
        state: as the hub gives it: "buffers" by name, and what is "loose".
    """
    packed = state.get("loose")
    loose = LooseStates() if packed is None else LooseStates.unpack(packed.numpy().tobytes())
    for name, buffer in model.named_buffers():
        if name not in loose.buffers:
            buffer.copy_(state["buffers"][name])
    for name, value in loose.buffers.items():
        put_buffer(model, name, value, is_transient=name in loose.transient)
    owners = extra_owners(model)
    for name, value in loose.extra.items():
        if name in owners:
            owners[name].set_extra_state(value)


def is_same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Return whether two buffers are equal to the bit, in shape and dtype."""
    if left is None or right is None:
        return left is right
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
