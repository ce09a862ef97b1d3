"""The parameters of a model in an engine, which lie in the hub's memory: user code may use them, and nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch

from dnb.engine.runtime.run_memory import EngineMemory
from dnb.engine.runtime.write_guard import WriteGuard
from dnb.errors import DnbError
from dnb.planning.thawing import thawed_text
from dnb.protocol.memory import Layout


class ModelChangedError(DnbError):
    """User code replaced a parameter, so that its gradient is born elsewhere."""


class BoundParameters:
    """The parameters of a whole model, bound to the memory.

    Args:
        model: as unpacked.
        master: parameters and buffers in the memory, by name.
        memory: in which they lie.
    """

    def __init__(self, model: torch.nn.Module, master: Mapping[str, torch.Tensor], memory: EngineMemory) -> None:
        self._model = model
        self._master = master
        self._memory = memory
        self.named = dict(model.named_parameters())
        for name, parameter in self.named.items():
            parameter.data = master[name]
        self.guard = WriteGuard(self.named, memory)
        self.thawed: dict[str, None] = {}  # names, in the order in which they were found in this work
        self.frozen: set[int] = set()  # slots that user code has frozen in this work
        self.divided: frozenset[str] = frozenset()  # of which the model has a part: they were replaced on purpose
        self._names: list[str] = []  # of those that have a gradient
        self._frozen: list[tuple[str, torch.nn.Parameter]] = []

    def place(self, gradients: Layout) -> list[torch.nn.Parameter]:
        """Return the parameters whose gradients have a place; those among them that were frozen train from now on."""
        before, self._names = set(self._names), [slot.name for slot in gradients.slots]
        placed = set(self._names)
        for name in placed - before:
            self.named[name].requires_grad_(True)
        self._frozen = [(name, each) for name, each in self.named.items() if name not in placed]
        return [self.named[name] for name in self._names]

    def freeze(self, names: Collection[str]) -> None:
        """Let these parameters be frozen, of those that have a place in slabs, and all others train."""
        for name in self._names:
            self.named[name].requires_grad_(name not in names)

    def begin_work(self) -> None:
        """Forget what user code has thawed or frozen in the work before."""
        self.thawed.clear()
        self.frozen.clear()

    def note_frozen(self, slots: Iterable[int] | None = None) -> None:
        """Remember which parameters user code has frozen: all engines are to agree on it.

        Args:
            slots: to be looked at; all if left out.
        """
        if slots is None:
            slots = range(len(self._names))
        self.frozen.update(slot for slot in slots if not self.named[self._names[slot]].requires_grad)

    def find_thawed(self, *, refuses: bool) -> None:
        """Remember gradients that have no place; the hub makes one, and has the step computed again.

        Args:
            refuses: raise instead.

        Raises:
            ModelChangedError: there is one.
        """
        for name, parameter in self._frozen:
            if parameter.grad is None:
                continue
            if refuses:
                refuse_thawed(name, parameter)
            parameter.grad = None
            self.thawed[name] = None

    def check_unused(self, unused: tuple[int, ...]) -> None:
        """Raise if parameters that got no gradient were replaced: then their successors train in vain."""
        for index in unused:
            self._check(self._names[index])

    def check_all(self) -> None:
        """Raise if any parameter was replaced."""
        for name in self.named:
            self._check(name)

    def _check(self, name: str) -> None:
        if name in self.divided:
            return
        master = self._master[name]
        try:
            now = self._model.get_parameter(name)
        except AttributeError:
            now = None
        if now is self.named[name] and now.data_ptr() == master.data_ptr() and now.shape == master.shape:
            return
        exit_state = "is gone" if now is None else f"now has shape {tuple(now.shape)}"
        raise ModelChangedError(
            f"parameter {name!r} of shape {tuple(master.shape)} was replaced while the run went on, and {exit_state}: "
            "change a model before fit, or its values in place (parameter.data.copy_) between runs"
        )

    def digests(self) -> bytes:
        """Return the CRC-32 of every tensor as the model holds it, as uint32; 0 for the hub's own memory."""
        shared = self._memory.kind == "memory"
        found = []
        for slot in self._memory.layout.slots:
            master = self._master[slot.name]
            own: torch.Tensor = self.named.get(slot.name, master)  # buffers are read anew for every step
            is_same = own.data_ptr() == master.data_ptr() and own.shape == master.shape
            found.append(0 if shared and is_same else tensor_digest(own))
        return np.array(found, dtype=np.uint32).tobytes()


def refuse_thawed(name: str, parameter: torch.nn.Parameter) -> None:
    """Refuse a gradient that has no place where engines compute together, as its parameter was frozen at the beginning.

    Raises:
        ModelChangedError: says so.
    """
    parameter.grad = None
    raise ModelChangedError(thawed_text(name))


def tensor_digest(tensor: torch.Tensor) -> int:
    """Return the CRC-32 (ISO 3309) of a tensor's bytes in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
