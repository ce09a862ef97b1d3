"""Loose states on an engine: set to what the hub has before a part is computed, collected after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dnb.errors import DnbError
from dnb.transport.pickling.module_states import LooseStates, extra_owners, is_same, put_buffer
from dnb.transport.state_trees import pack_state, unpack_state

# What an engine reports of a step, 32 MB, is to hold these and the rest.
MOST_BYTES = 24_000_000


class StateError(DnbError):
    """A state of the model that cannot be put together with that of other engines."""


@dataclass(slots=True)
class _Table:
    """The buffers of one module."""

    path: str
    module: nn.Module
    num_at_first: int
    empty_at_first: tuple[str, ...]

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _Table:
        buffers = module._buffers
        return cls(path, module, len(buffers), tuple(key for key, value in buffers.items() if value is None))

    def has_other(self) -> bool:
        """Say whether there are more buffers, or fewer, than at first."""
        now = self.module._buffers
        return len(now) != self.num_at_first or any(now.get(key) is not None for key in self.empty_at_first)

    def loose(self, placed: Mapping[str, object]) -> list[str]:
        """Return the names of buffers that are there now, and were not at first."""
        now = self.module._buffers.items()
        return [key for key, value in now if value is not None and self.name(key) not in placed]

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


class EngineStates:
    """Loose states of a model, as of the last step that counts.

    Args:
        model: as unpacked.
        placed: names of the buffers that have a place in the layout.
        rules: of buffers, by name.
    """

    def __init__(self, model: nn.Module, *, placed: Sequence[str], rules: Mapping[str, str]) -> None:
        self._model = model
        self._placed = dict.fromkeys(placed)
        self._rules = rules
        self._owners = extra_owners(model)
        self._extra = {name: pack_state(module.get_extra_state()) for name, module in self._owners.items()}
        self._truth = LooseStates()
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}  # as they were put into the model, with their version
        self._tables = [_Table.of(path, module) for path, module in model.named_modules()]
        # What is looked at in every step: numbers of buffers, and the few tables of which some hold nothing at first.
        self._numbers = [table.num_at_first for table in self._tables]
        self._with_empty = [table for table in self._tables if table.empty_at_first]

    def is_loose(self, name: str) -> bool:
        """Return whether a buffer is kept here, so that its place in the layout does not count."""
        return name in self._truth.buffers

    def adopt(self, packed: bytes) -> None:
        """Take over what the hub has; it is put into the model by `begin`."""
        states = LooseStates.unpack(packed)
        self._truth = states
        self._extra.update({name: pack_state(value) for name, value in states.extra.items()})
        self._seen.clear()

    def begin(self) -> None:
        """Let the model be as it was after the last step that counts."""
        for name, module in self._owners.items():
            if pack_state(module.get_extra_state()) != self._extra[name]:
                module.set_extra_state(unpack_state(self._extra[name]))
        for table in self._others():
            for key in table.loose(self._placed):
                if table.name(key) in self._truth.buffers:
                    continue
                if key in table.empty_at_first:
                    table.module._buffers[key] = None
                else:
                    del table.module._buffers[key]
        for name, value in self._truth.buffers.items():
            self._put(name, value)

    def collect(self, replaced: Mapping[str, torch.Tensor | None]) -> bytes:
        """Pack what has changed since `begin`; mostly nothing, which is empty.

        Args:
            replaced: buffers that do not fit into their places.

        Raises:
            StateError: a rule cannot be followed, or there is too much.
        """
        found = LooseStates()
        for name, module in self._owners.items():
            value = module.get_extra_state()
            if pack_state(value) != self._extra[name]:
                found.extra[name] = value
        buffers = dict(replaced)
        for table in self._others():
            for key in table.loose(self._placed):
                name = table.name(key)
                buffers[name] = table.module._buffers[key]
                if key in table.module._non_persistent_buffers_set:
                    found.transient.add(name)
        for name, value in buffers.items():
            if not self._is_known(name, value):
                self._check_rule(name)
                found.buffers[name] = value
        if not found:
            return b""
        found.transient &= found.buffers.keys()
        packed = found.pack()
        if len(packed) > MOST_BYTES:
            name = next(iter(buffers), "them")
            raise StateError(
                f"buffers that change their shape, and extra states, have {len(packed) / 1e6:.0f} MB in a step, and "
                f"at most {MOST_BYTES / 1e6:.0f} MB travel beside the gradients: give {name} its last shape before fit"
            )
        return packed

    def _others(self) -> list[_Table]:
        """Return the tables that have other buffers than at first; mostly none."""
        numbers = [len(table.module._buffers) for table in self._tables]
        if numbers == self._numbers and not any(table.has_other() for table in self._with_empty):
            return []
        return [table for table in self._tables if table.has_other()]

    def _put(self, name: str, value: torch.Tensor | None) -> None:
        path, _, key = name.rpartition(".")
        now = self._model.get_submodule(path)._buffers.get(key)
        seen = self._seen.get(name)
        if value is not None and seen is not None and now is seen[0] and now._version == seen[1]:
            return
        own = None if value is None else value.clone()
        put_buffer(self._model, name, own, is_transient=name in self._truth.transient)
        if own is not None:
            self._seen[name] = own, own._version

    def _is_known(self, name: str, value: torch.Tensor | None) -> bool:
        if name not in self._truth.buffers:
            return False
        seen = self._seen.get(name)
        if seen is not None and value is seen[0] and seen[0]._version == seen[1]:
            return True
        return is_same(value, self._truth.buffers[name])

    def _check_rule(self, name: str) -> None:
        rule = self._rules.get(name, "first")
        if rule != "first":
            raise StateError(
                f"buffer {name!r} has got another shape or dtype in forward, so that its rule {rule!r} cannot be "
                f"followed: give buffers={{{name!r}: 'first'}}, or change it in place"
            )
