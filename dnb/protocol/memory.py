"""Places in shared memory: tensors in flat buffers, segments, payloads."""

from __future__ import annotations

from dnb.protocol.base import Record


class TensorSlot(Record, frozen=True):
    """The place of one tensor in a flat buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32"
    offset_bytes: int


class Region(Record, frozen=True):
    """All slots of one dtype, as one flat tensor."""

    dtype: str
    offset_bytes: int
    num_elements: int


class Layout(Record, frozen=True):
    """A flat buffer cut into tensors, grouped by dtype."""

    slots: tuple[TensorSlot, ...]
    regions: tuple[Region, ...]
    num_bytes: int


class SegmentRef(Record, frozen=True):
    """A piece of shared memory, by the file that backs it."""

    path: str
    num_bytes: int


class BufferRef(Record, frozen=True):
    """The place of one out-of-band buffer of a payload in its segment."""

    offset_bytes: int
    num_bytes: int


class PayloadRef(Record, frozen=True):
    """A pickle without its tensors, and where those lie."""

    buffers: tuple[BufferRef, ...]
    arrays: tuple[int, ...]  # those of `buffers` that are pickle's own out-of-band buffers, in order
    segment: SegmentRef | None


# So that a tensor can be made of the bytes where they lie.
LEAF_ALIGNMENT = 64
