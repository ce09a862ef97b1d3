"""The update of Adam and AdamW in chunks that are saved before they are changed, so that another process can finish it.

A chunk that was being changed is put back and changed again; chunks before it are done, those after it untouched. What
is saved fits into the cache, so that most of it costs no time: the kernel reads it next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from dnb.hub.parameters.journal import MOST_PARTS, PARTS, STEPS, Journal
from dnb.hub.parameters.optimizers import AdamGroup, AdamPart, adam_groups, update_adam
from dnb.hub.parameters.thread_team import ThreadTeam
from dnb.transport.layout import ALIGNMENT_BYTES

# Of parameters; the same of each moment. Smaller ones cost calls, larger ones leave the cache before they are read.
CHUNK_BYTES = 1 << 19
# Parameters, moments and largest second moments: what the kernel writes of its lists.
_WRITTEN = (0, 2, 3, 4)

Copy = tuple[Any, Any]  # arrays of bytes: what is changed, and its place in the undo area


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A slice of parameters and state that is saved and changed at once."""

    part: AdamPart
    copies: list[Copy]

    def save(self) -> None:
        for source, place in self.copies:
            np.copyto(place, source)

    def restore(self) -> None:
        for source, place in self.copies:
            np.copyto(source, place)


@dataclass(frozen=True, slots=True)
class _ParameterGroup:
    adam: AdamGroup
    first: int  # number of its first part among those of all groups
    parts: list[list[_Chunk]]


def undo_bytes(tensors: Sequence[torch.Tensor], num_threads: int) -> tuple[int, int]:
    """Return the size of an undo area for these parameters, and the number of areas."""
    total = sum(_room(tensor) for tensor in tensors)
    num_areas = len(ThreadTeam(num_threads).cut(sum(tensor.numel() for tensor in tensors)))
    return len(_WRITTEN) * min(total, CHUNK_BYTES), num_areas


class ChunkedAdam:
    """One way to update, valid until other parameters have gradients or these lie elsewhere.

    Args:
        optimizer: every parameter with a gradient has its state.
        thread_team: shares the work of large groups.
        memories: arrays of bytes in which parameters and moments lie.
        areas: undo areas, one for each thread.
        steps: array of bytes with all step counts, and its undo area.

    Raises:
        ValueError: the update cannot be done so.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        thread_team: ThreadTeam,
        *,
        memories: Sequence[Any],
        areas: Sequence[Any],
        steps: Copy,
    ) -> None:
        self._optimizer = optimizer
        self._thread_team = thread_team
        self._steps, self._saved_steps = steps
        groups = adam_groups(optimizer, thread_team)
        if not groups and any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("a group is out of the ordinary")
        if any(len(group.parts) > len(areas) for group in groups):
            raise ValueError("more parts than undo areas")
        firsts = [0, *accumulate(len(group.parts) for group in groups)]
        if firsts[-1] > MOST_PARTS:
            raise ValueError("more parts than the journal has words")
        self._groups = [
            _ParameterGroup(
                group,
                first,
                [_chunks(part, memories, area) for part, area in zip(group.parts, areas, strict=False)],
            )
            for group, first in zip(groups, firsts, strict=False)
        ]
        counts = [count for group in groups for count in group.steps]
        # One tensor instead of many, if all that lie there are to be raised: padding may be, too.
        num_places = len(self._steps) // ALIGNMENT_BYTES + 1
        self._counts = [_as_floats(self._steps)] if len(counts) == num_places else counts

    def run(self, journal: Journal, step: int) -> None:
        """Do what is not done yet of the update of a step."""
        if self._counts:
            self._raise_steps(journal, step)
        for group in self._groups:
            self._thread_team.share(
                [
                    partial(self._update, journal, step, PARTS + group.first + number, group.adam.options, chunks)
                    for number, chunks in enumerate(group.parts)
                ]
            )

    def _raise_steps(self, journal: Journal, step: int) -> None:
        done = journal.count(STEPS, step)
        if done == 0:
            np.copyto(self._saved_steps, self._steps)
            journal.mark_count(STEPS, step, 1)
        elif done == 1:
            np.copyto(self._steps, self._saved_steps)
        if done < 2:
            torch._foreach_add_(self._counts, 1)
            journal.mark_count(STEPS, step, 2)

    def _update(
        self, journal: Journal, step: int, place: int, options: dict[str, Any], chunks: Sequence[_Chunk]
    ) -> None:
        num_done, is_saved = divmod(journal.count(place, step), 2)
        for number, chunk in enumerate(chunks[num_done:], num_done):
            if is_saved:
                chunk.restore()
                is_saved = 0
            else:
                chunk.save()
                journal.mark_count(place, step, 2 * number + 1)
            update_adam(self._optimizer, options, chunk.part)
            journal.mark_count(place, step, 2 * number + 2)


def _chunks(part: AdamPart, memories: Sequence[Any], area: Any) -> list[_Chunk]:
    """Cut a part into chunks; a large tensor into several, where vectors of the CPU end."""
    chunks: list[_Chunk] = []
    pieces: AdamPart = [[] for _ in part]
    filled = 0
    for index, parameter in enumerate(part[0]):
        most = CHUNK_BYTES // parameter.element_size()
        for begin in range(0, max(parameter.numel(), 1), most):
            tensors = [place[index] if place else None for place in part]
            if parameter.numel() > most:
                flat = [None if each is None else each.view(-1) for each in tensors[:-1]]
                tensors = [None if each is None else each[begin : begin + most] for each in flat] + tensors[-1:]
            assert tensors[0] is not None
            room = _room(tensors[0])
            if pieces[0] and filled + room > CHUNK_BYTES:
                chunks.append(_chunk(pieces, memories, area))
                pieces, filled = [[] for _ in part], 0
            for place, tensor in zip(pieces, tensors, strict=True):
                if tensor is not None:
                    place.append(tensor)
            filled += room
    chunks.append(_chunk(pieces, memories, area))
    return chunks


def _chunk(part: AdamPart, memories: Sequence[Any], area: Any) -> _Chunk:
    copies: list[Copy] = []
    used = 0
    for kind in _WRITTEN:
        for begin, end in _spans(part[kind]):
            if used + end - begin > len(area):
                raise ValueError("the undo area is too small")
            copies.append((bytes_at(memories, begin, end), area[used : used + end - begin]))
            used += end - begin
    return _Chunk(part, copies)


def _spans(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the addresses of tensors, neighbours as one."""
    spans: list[tuple[int, int]] = []
    for begin, end in sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors):
        if begin == end:
            continue
        if spans and begin - spans[-1][1] < ALIGNMENT_BYTES:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((begin, end))
    return spans


def bytes_at(memories: Sequence[Any], begin: int, end: int) -> Any:
    """Return the bytes between two addresses, as a view of the memory that holds them.

    Raises:
        ValueError: nothing of ours.
    """
    for memory in memories:
        base = memory.ctypes.data
        if base <= begin and end <= base + len(memory):
            return memory[begin - base : end - base]
    raise ValueError("a tensor lies outside of shared memory")


def _as_floats(memory: Any) -> torch.Tensor:
    return torch.from_numpy(memory.view(np.float32))


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
