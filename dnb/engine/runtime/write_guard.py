"""Parameters that user code has written on an engine, which only the hub may: noticed before a step counts."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Mapping, Sequence

import torch

from dnb.engine.runtime.run_memory import EngineMemory
from dnb.errors import DnbError
from dnb.protocol.memory import TensorSlot
from dnb.transport.layout import ALIGNMENT_BYTES, dtype_named, slot_views

# Held against the hub's memory after every work; more than that costs time, and is looked at now and then.
SMALL_BYTES = 128 << 10
LOOK_EVERY = 100
# A hub may commit while an engine that is late still looks: what differs for a moment was not written here.
MOST_LOOKS = 20
CHUNK_BYTES = 8 << 20
# Compares 20 times as fast as a tensor of bytes does.
_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class ParameterWrittenError(DnbError):
    """Forward or a step function has written a parameter, so that it would be written once per engine, or nowhere."""


class WriteGuard:
    """Holds parameters against what they were when the hub gave them.

    Writes do not reach the hub: engines map its memory as copy on write. A write in place is told by torch's version
    counter; one past it, as through `.data`, by the bytes.

    Args:
        named: the parameters that are bound to the memory.
        memory: of the run.
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter], memory: EngineMemory) -> None:
        self._named = dict(named)
        self._parameters = list(named.values())
        self._versions = self._versions_now()
        self._memory = memory
        self._num_looks = 0
        self._is_small = memory.layout.num_bytes <= SMALL_BYTES
        self._addresses: tuple[int, int] | None = None  # of the engine's mapping and of the hub's
        self._ranges = _ranges_of([slot for slot in memory.layout.slots if slot.name in named])

    def check(self, step: int, *, thoroughly: bool = False) -> None:
        """Raise if a parameter was written since the last look; it is then as the hub has it.

        Args:
            step: that was computed.
            thoroughly: look at the bytes, too, which is done now and then anyway.

        Raises:
            ParameterWrittenError: names the first.
        """
        versions = self._versions_now()
        if versions != self._versions:
            places = zip(self._named, versions, self._versions, strict=True)
            written = [name for name, now, before in places if now != before]
            self._versions = versions
            self._refuse(written, step)
        self._num_looks += 1
        if self._memory.kind != "memory":
            return  # what was sent is not there twice; the hub compares digests
        is_time = self._is_small or thoroughly or self._num_looks <= 2 or self._num_looks % LOOK_EVERY == 0
        if is_time and self._differs():
            written = self._differing()
            if written:
                self._refuse(written, step)

    def _versions_now(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

    def _differs(self) -> bool:
        """Return whether any byte differs."""
        if self._addresses is None:
            self._addresses = _address_of(self._memory.parameters), _address_of(self._memory.hub_parameters())
        left, right = self._addresses
        for first, last in self._ranges:
            for begin in range(first, last, CHUNK_BYTES):
                count = min(last - begin, CHUNK_BYTES)
                if _compare(left + begin, right + begin, count):
                    return True
                if count == CHUNK_BYTES:  # else what is mapped twice would count twice in the engine's memory
                    self._memory.hub_parameters().madvise(mmap.MADV_DONTNEED)
        return False

    def _differing(self) -> list[str]:
        """Return the parameters whose bytes stay others than the hub's."""
        own, hubs = (
            slot_views(self._memory.layout, memory)
            for memory in (self._memory.parameters, self._memory.hub_parameters())
        )
        written = list(self._named)
        for _ in range(MOST_LOOKS):
            written = [name for name in written if not own[name].view(-1).equal(hubs[name].view(-1))]
        return written

    def _refuse(self, written: list[str], step: int) -> None:
        self._memory.forget_writes()
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        raise ParameterWrittenError(
            f"parameter {written[0]!r}{more} was written in forward or step, by step {step}: engines read parameters, "
            "and the hub updates them, so that this would count once per engine, or not at all: write them in "
            "after_step=callable(model), which runs once after each update"
        )


def _address_of(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _ranges_of(slots: Sequence[TensorSlot]) -> list[tuple[int, int]]:
    """Return the byte ranges of the slots, neighbours as one."""
    ranges: list[tuple[int, int]] = []
    for slot in sorted(slots, key=lambda slot: slot.offset_bytes):
        end = slot.offset_bytes + math.prod(slot.shape) * dtype_named(slot.dtype).itemsize
        if ranges and slot.offset_bytes - ranges[-1][1] < ALIGNMENT_BYTES:
            ranges[-1] = ranges[-1][0], end
        elif end > slot.offset_bytes:
            ranges.append((slot.offset_bytes, end))
    return ranges
