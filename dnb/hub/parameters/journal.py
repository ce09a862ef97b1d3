"""The commit journal: what a hub that is killed leaves to the next one, in one small shared segment.

Everything is found from this segment: the parameters' segment, the optimizer's, how far the run is. It survives the
process, not the machine.

A commit counts from one store of 8 bytes on: the word SEQUENCE, whose parity says which of two commit records is
valid. A commit record names one of two state records (options of the groups, scheduler, which tensors the optimizer
has); the one that is not named is free to be written. So nothing that is read can be torn.

    SEQUENCE   number of commits, evaluations and changes of options; the last of the two commit records holds
    INTENT     step whose update may be finished by the next process, as the intent record says (rolled forward)
    DIRTY      step whose update cannot be finished: undone by the shadow copy, if there is one (rolled back)
    SHADOW     step that the shadow copy was taken for
    STEPS      step, and whether its step counts were saved (1) and raised (2)
    PARTS      for each part of the update: step, chunks saved and done

INTENT and DIRTY count only while they are one ahead of the last commit.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from dnb.protocol.base import Record
from dnb.protocol.measurements import WorkKind
from dnb.protocol.memory import SegmentRef
from dnb.transport.segments import Segment, create_segment

MAGIC = 0x1A4E52554F4A424E  # "NBJOURN", then a version
SEQUENCE, INTENT, DIRTY, SHADOW, STEPS, PARTS = range(1, 7)
MOST_PARTS = 1024

# A word that counts within a step holds the step above these bits, so that it needs no clearing.
COUNT_BITS = 24
_COUNT = (1 << COUNT_BITS) - 1

_HEADER_BYTES = 16 << 10
_COMMIT_BYTES = 16 << 10
_INTENT_BYTES = 64 << 10
_LENGTH = struct.Struct("<Q")

T = TypeVar("T", bound=Record)


class Unrecoverable(Exception):  # noqa: N818 - a verdict, not a fault
    """The state after the last committed step cannot be had any more; the last checkpoint is."""


class JournalFull(Exception):  # noqa: N818 - a verdict, not a fault
    """A record is larger than its place: the run goes on without a journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastCommit:
    """The last thing that was committed.

    Args:
        step: that was committed, or was evaluated.
        evaluated: last step after which an evaluation was committed.
        kind: what was committed.
        values: as they go into the history; its row may be missing on disk.
        samples: that each engine brought to the step, likewise.
        time: seconds since the epoch.
        note: for people, how it was brought about.
    """

    step: int
    evaluated: int
    kind: WorkKind
    values: dict[str, float]
    samples: dict[int, int]
    time: float
    note: str = ""


class _JournalCommit(Record, frozen=True):
    step: int
    evaluated: int
    kind: WorkKind
    values: dict[str, float]
    samples: dict[int, int]
    time: float
    place: int  # of the state record
    owes_scheduler: bool  # the state record is of before the scheduler was stepped


class Intent(Record, frozen=True):
    """An update that another process can finish."""

    step: int
    slab: SegmentRef  # holds the gradient, summed and clipped
    unused: tuple[int, ...]  # trainable parameters without one
    staged: tuple[str, ...]  # buffers whose new values lie beside the undo areas
    values: dict[str, float]
    samples: dict[int, int]
    time: float


class State(Record, frozen=True):
    """The state that is not in tensors, and the places of those."""

    parameters: SegmentRef
    optimizer: SegmentRef | None
    undo: SegmentRef | None
    shadow: SegmentRef | None
    num_threads: int  # for which updates are cut into parts
    clip_norm: float | None
    groups: bytes  # of the optimizer: options of each
    scheduler: bytes
    optimizer_state: bytes  # the optimizer's state; its tensors are named as in their segment
    kept: SegmentRef | None = None  # what functions of the user's keep, in one of two places
    kept_place: int = 0
    toggled: tuple[str, ...] = ()  # parameters that user code has thawed or frozen, see `dnb.hub.parameters.freezing`
    frozen_on_engines: tuple[str, ...] = ()


class Journal:
    """One run's journal.

    Args:
        segment: as `create_journal` made it.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._memory = memoryview(segment.memory)
        self._words = self._memory[:_HEADER_BYTES].cast("Q")
        self._state_bytes = (len(self._memory) - _HEADER_BYTES - 2 * _COMMIT_BYTES - _INTENT_BYTES) // 2
        self.last = _JournalCommit(
            step=0, evaluated=0, kind="step", values={}, samples={}, time=0.0, place=1, owes_scheduler=False
        )
        self._next_place: int | None = None
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def ref(self) -> SegmentRef:
        """From which another process finds everything."""
        return self.segment.ref

    @property
    def step(self) -> int:
        """The step that was committed last."""
        return self.last.step

    @property
    def has_begun(self) -> bool:
        """True once it holds anything."""
        return bool(self._words[SEQUENCE])

    # words

    def mark(self, place: int, value: int) -> None:
        """Store 8 bytes at once: a killed process has done it or not."""
        self._words[place] = value

    def mark_count(self, place: int, step: int, count: int) -> None:
        """Record the progress of something within a step."""
        self.mark(place, step << COUNT_BITS | count)

    def count(self, place: int, step: int) -> int:
        """Return the progress recorded in this step; 0 if there is none."""
        word = self._words[place]
        return word & _COUNT if word >> COUNT_BITS == step else 0

    def is_marked(self, place: int, step: int) -> bool:
        """Return whether a word is of this step."""
        return self._words[place] == step

    # records

    def write_state(self, state: State) -> None:
        """Put down a state for the next commit to name."""
        place = 1 - self.last.place
        self._write(self._state_offset(place), self._state_bytes, state)
        self._next_place = place

    def write_intent(self, intent: Intent) -> None:
        """Record that the next process finishes this step, should this one die."""
        self._write(_HEADER_BYTES + 2 * _COMMIT_BYTES, _INTENT_BYTES, intent)
        self.mark(INTENT, intent.step)

    def publish(
        self,
        *,
        step: int,
        kind: WorkKind = "step",
        values: dict[str, float] | None = None,
        samples: dict[int, int] | None = None,
        evaluated: int | None = None,
        owes_scheduler: bool = False,
        when: float | None = None,
    ) -> None:
        """Commit; what is not given stays as it was."""
        last = self.last
        commit = _JournalCommit(
            step=step,
            evaluated=last.evaluated if evaluated is None else evaluated,
            kind=kind,
            values=last.values if values is None else values,
            samples=last.samples if samples is None else samples,
            time=time.time() if when is None else when,
            place=last.place if self._next_place is None else self._next_place,
            owes_scheduler=owes_scheduler,
        )
        sequence = self._words[SEQUENCE] + 1
        self._write(_HEADER_BYTES + (sequence & 1) * _COMMIT_BYTES, _COMMIT_BYTES, commit)
        self.mark(SEQUENCE, sequence)
        self.last, self._next_place = commit, None

    def republish(self) -> None:
        """Commit a state record that alone has changed."""
        last = self.last
        self.publish(step=last.step, kind=last.kind, when=last.time)

    def give_up(self) -> None:
        """Invalidate the journal: later steps are not written down, so its content may not be believed."""
        self.mark(0, 0)

    # reading

    def read(self) -> State:
        """Find the last commit, and its state.

        Raises:
            Torn: nothing was ever committed, or the journal was given up.
        """
        sequence = self._words[SEQUENCE]
        if self._words[0] != MAGIC or sequence == 0:
            raise Unrecoverable("there is no journal of this run")
        self.last = self._read(_HEADER_BYTES + (sequence & 1) * _COMMIT_BYTES, _JournalCommit)
        return self._read(self._state_offset(self.last.place), State)

    def read_intent(self) -> Intent | None:
        """Return the update that was under way, if it is to be finished."""
        if not self.is_marked(INTENT, self.last.step + 1):
            return None
        return self._read(_HEADER_BYTES + 2 * _COMMIT_BYTES, Intent)

    def _state_offset(self, place: int) -> int:
        return _HEADER_BYTES + 2 * _COMMIT_BYTES + _INTENT_BYTES + place * self._state_bytes

    def _write(self, offset: int, room: int, record: Record) -> None:
        packed = self._encode(record)
        end = offset + _LENGTH.size + len(packed)
        if end > offset + room:
            raise JournalFull(f"{type(record).__name__} has {len(packed)} bytes, and room for {room}")
        _LENGTH.pack_into(self._memory, offset, len(packed))
        self._memory[offset + _LENGTH.size : end] = packed

    def _read(self, offset: int, kind: type[T]) -> T:
        (length,) = _LENGTH.unpack_from(self._memory, offset)
        begin = offset + _LENGTH.size
        return msgspec.msgpack.decode(self._memory[begin : begin + length], type=kind)


def create_journal(name: str, *, state_bytes: int, folders: Sequence[Path]) -> Journal:
    """Create an empty journal; it holds nothing before the first `publish`.

    Args:
        name: begins the file's name.
        state_bytes: largest state record.
        folders: where it may lie.

    Raises:
        SpaceError: no room.
    """
    num_bytes = _HEADER_BYTES + 2 * _COMMIT_BYTES + _INTENT_BYTES + 2 * state_bytes
    journal = Journal(create_segment(name, num_bytes, folders=folders))
    journal.mark(0, MAGIC)
    return journal
