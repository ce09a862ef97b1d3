"""An engine's memory of a run: the hub's own, or a copy that travels over its wire."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from dnb.protocol.engine_messages import Load
from dnb.protocol.memory import Layout, SegmentRef
from dnb.protocol.run import TransportKind
from dnb.transport.segments import open_segment
from dnb.transport.sockets.wires import PIECE_BYTES, Flat, Outbox


class EngineMemory:
    """Parameters and slabs of one run, as one engine sees them.

    Args:
        load: where they are.

    Raises:
        OSError: the hub's memory cannot be mapped here.
    """

    def __init__(self, load: Load) -> None:
        self.kind: TransportKind = load.transport
        self.layout = load.parameter_layout
        self._slab_bytes = load.buffer_layout.num_bytes
        self.slabs: list[Flat] = []
        self.parameters: mmap.mmap
        self._ref = load.parameters
        self._hub_parameters: mmap.mmap | None = None
        if self.kind == "memory":
            # Copy on write: what user code writes into a parameter stays here, and is noticed.
            self.parameters = open_segment(load.parameters, private=True).memory
        else:
            self.parameters = mmap.mmap(-1, max(load.parameters.num_bytes, 1))

    def hub_parameters(self) -> mmap.mmap:
        """Map the hub's own memory, to be compared with; only where it is shared."""
        if self._hub_parameters is None:
            self._hub_parameters = open_segment(self._ref).memory
        return self._hub_parameters

    def forget_writes(self) -> None:
        """Let parameters be as the hub has them, where its memory is shared."""
        if self.kind == "memory":
            self.parameters.madvise(mmap.MADV_DONTNEED)

    def lay_out_anew(self, slab_bytes: int) -> None:
        """Let go of all slabs, as those that follow are of another size."""
        self.slabs.clear()
        self._slab_bytes = slab_bytes

    def add_slabs(self, refs: Sequence[SegmentRef]) -> None:
        """Map slabs, or make this engine's own."""
        for ref in refs:
            if self.kind == "memory":
                self.slabs.append(Flat(memoryview(open_segment(ref).memory)))
            else:
                self.slabs.append(Flat(memoryview(mmap.mmap(-1, max(self._slab_bytes, 1)))))


class Publisher:
    """Sends a slab in pieces, each as soon as backward has written the last gradient in it.

    Args:
        gradients: layout of the slab's first part; what is behind it goes at the end.
        num_bytes: of the whole slab.
        outbox: of the wire to the hub.
    """

    def __init__(self, gradients: Layout, num_bytes: int, outbox: Outbox) -> None:
        self._outbox = outbox
        self._num_bytes = num_bytes
        self._pieces_of = [
            range(slot.offset_bytes // PIECE_BYTES, _last_piece(slot.offset_bytes, end) + 1)
            for slot, end in zip(gradients.slots, _ends(gradients), strict=True)
        ]
        num_pieces = max(num_bytes, 1) // PIECE_BYTES + 1  # the last may be empty
        self._awaited = [0] * num_pieces
        for pieces in self._pieces_of:
            for piece in pieces:
                self._awaited[piece] += 1
        behind = gradients.num_bytes // PIECE_BYTES  # buffers begin here: they are whole only at the end
        self._early = range(behind if num_bytes > gradients.num_bytes else num_pieces)
        self._slab = 0
        self._flat = Flat(memoryview(b""))
        self._left: list[int] = []
        self._seen: set[int] = set()
        self._sent: set[int] = set()
        self.is_last_backward = False

    def begin(self, slab: int, flat: Flat) -> None:
        """Prepare for a slab that is about to be written."""
        self._slab, self._flat = slab, flat
        self._left = list(self._awaited)
        self._seen.clear()
        self._sent.clear()
        self.is_last_backward = False

    def gradient_is_written(self, index: int) -> None:
        """Note that a slot's gradient has its value, unless backward comes to it again."""
        if not self.is_last_backward:
            return
        if index in self._seen:
            self._sent.difference_update(self._pieces_of[index])  # it has changed: `finish` sends it again
            return
        self._seen.add(index)
        for piece in self._pieces_of[index]:
            self._left[piece] -= 1
            if self._left[piece] == 0 and piece in self._early:
                self._sent.add(piece)
                self._outbox.send_pieces(self._slab, self._flat, [self._range(piece)])

    def finish(self) -> None:
        """Send what has not gone yet."""
        missing = [self._range(piece) for piece in range(len(self._awaited)) if piece not in self._sent]
        missing = [(first, last) for first, last in missing if first < last]
        self._outbox.send_pieces(self._slab, self._flat, missing)

    def _range(self, piece: int) -> tuple[int, int]:
        return piece * PIECE_BYTES, min((piece + 1) * PIECE_BYTES, self._num_bytes)


def _ends(layout: Layout) -> list[int]:
    """Return the end of each slot's bytes: the next slot's begin, padding included."""
    begins = [slot.offset_bytes for slot in layout.slots]
    return [*begins[1:], layout.num_bytes]


def _last_piece(begin: int, end: int) -> int:
    return max(begin, end - 1) // PIECE_BYTES
