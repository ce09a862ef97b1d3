"""Loose states as the hub has them: what the last step that counts has made of them, for engines, notebook and disk.

Each change is written into one of two segments in turn before the step is committed, with the step's number written
last, so that the hub that takes a run over finds the states of whichever step the journal says.
"""

from __future__ import annotations

import glob
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dnb.errors import SpaceError
from dnb.hub.guarded_calls import user_code
from dnb.protocol.memory import SegmentRef
from dnb.transport.pickling.module_states import LooseStates, extra_owners, put_buffer
from dnb.transport.segments import Segment, create_segment, open_segment

KIND = "states"
_HEADER = struct.Struct("<qQ")  # step, or -1 while it is written; bytes that follow
_SPARE_BYTES = 64 << 10


class HubStates:
    """The loose states of one run.

    Args:
        model: the hub's, which is kept as engines have made it.
        folders: where segments may lie.
        prefix: of the segments' file names.
    """

    def __init__(self, model: nn.Module, *, folders: Sequence[Path], prefix: str) -> None:
        self._model = model
        self._folders = folders
        self._prefix = prefix
        self._owners = extra_owners(model)
        with user_code("in get_extra_state"):
            self._now = LooseStates(extra={name: module.get_extra_state() for name, module in self._owners.items()})
        self.version = 0  # that engines are sent
        self.packed = b""  # as they are sent
        self._segments: list[Segment] = []  # the one that was written last is the last
        self.is_kept = False  # whether changes are written down

    def __bool__(self) -> bool:
        return bool(self._now)

    @property
    def now(self) -> LooseStates:
        """All of them."""
        return self._now

    @property
    def segments(self) -> list[Segment]:
        """The segments that the next hub reads."""
        return self._segments

    def as_tensor(self) -> torch.Tensor | None:
        """Encode all states that have changed since the run began as one tensor; None: nothing has."""
        return torch.frombuffer(bytearray(self.packed), dtype=torch.uint8) if self.packed else None

    def is_loose(self, name: str) -> bool:
        """Return whether a buffer is among them, so that its place in the layout does not count."""
        return name in self._now.buffers

    def check(self, found: LooseStates) -> None:
        """Refuse states of modules that are not there.

        Raises:
            ValueError: with the name of one.
        """
        strangers = [name for name in found.extra if name not in self._owners]
        modules = dict(self._model.named_modules()) if found.buffers else {}
        for name in found.buffers:
            path, _, key = name.rpartition(".")
            module = modules.get(path)
            if module is None or not key or (key not in module._buffers and hasattr(module, key)):
                strangers.append(name)
        if strangers:
            raise ValueError(f"the model has no state {strangers[0][:100]!r}")

    def update(self, found: LooseStates, *, step: int) -> None:
        """Make these the states after a step that is about to be committed.

        Raises:
            UserCodeError: `set_extra_state` raised.
            SpaceError: they cannot be written down.
        """
        self._now.update(found)
        self._apply(found)
        if self.is_kept:
            self._write(step)

    def keep(self, *, step: int) -> None:
        """Write changes down from here on, and what there is now.

        Raises:
            SpaceError: no room.
        """
        self.is_kept = True
        if self.version:
            self._write(step)

    def recover(self, *, step: int) -> None:
        """Take over what the hub before has written, as it was after a step."""
        found: list[tuple[int, bytes, Segment]] = []
        for folder in self._folders:
            for path in folder.glob(f"{glob.escape(self._prefix)}-{KIND}-*"):
                segment = open_segment(SegmentRef(path=str(path), num_bytes=path.stat().st_size))
                written, size = _HEADER.unpack_from(segment.memory)
                found.append((written, bytes(segment.memory[_HEADER.size : _HEADER.size + size]), segment))
        found.sort(key=lambda each: each[0])
        past = [each for each in found if 0 <= each[0] <= step]
        others = [each for each in found if not 0 <= each[0] <= step]
        self.is_kept = True
        self._segments = [segment for *_, segment in [*others, *past]]
        if past:
            states = LooseStates.unpack(past[-1][1])
            self._now.update(states)
            self._apply(states)

    def restore(self, states: LooseStates) -> None:
        """Begin with those of a checkpoint."""
        self._now.update(states)
        self._apply(states)

    def unlink(self) -> None:
        """Remove the segments, as no hub will go on from here."""
        for segment in self._segments:
            segment.unlink()

    def _apply(self, found: LooseStates) -> None:
        for name, value in found.buffers.items():
            put_buffer(self._model, name, value, is_transient=name in self._now.transient)
        with user_code("in set_extra_state"):
            for name, value in found.extra.items():
                self._owners[name].set_extra_state(value)
        self.version += 1
        self.packed = self._now.pack()

    def _write(self, step: int) -> None:
        needed = _HEADER.size + len(self.packed)
        segment = self._segments.pop(0) if len(self._segments) > 1 else None
        if segment is not None and len(segment.memory) < needed:
            segment.unlink()
            segment = None
        if segment is None:
            try:
                room = 2 * needed + _SPARE_BYTES
                segment = create_segment(f"{self._prefix}-{KIND}", room, folders=self._folders)
            except SpaceError:
                self.is_kept = False
                raise
        memory = segment.memory
        _HEADER.pack_into(memory, 0, -1, 0)
        memory[_HEADER.size : needed] = self.packed
        _HEADER.pack_into(memory, 0, -1, len(self.packed))
        _HEADER.pack_into(memory, 0, step, len(self.packed))
        self._segments.append(segment)
