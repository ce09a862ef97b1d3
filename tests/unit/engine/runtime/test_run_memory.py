from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dnb.engine.runtime.run_memory import EngineMemory, Publisher
from dnb.protocol.engine_messages import Load, WireOffer
from dnb.protocol.memory import Layout, Region, SegmentRef, TensorSlot
from dnb.protocol.run import TransportKind
from dnb.transport.segments import create_segment
from dnb.transport.sockets.wires import PIECE_BYTES, Flat

MB4 = 4_194_304
NOWHERE = SegmentRef(path="", num_bytes=0)


def layout_of(*sizes: int, num_bytes: int | None = None) -> Layout:
    """Slots of bytes, each at the next multiple of 64."""
    begins = list(itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
    return Layout(
        slots=tuple(
            TensorSlot(name=str(index), shape=(size,), dtype="uint8", offset_bytes=begin)
            for index, (begin, size) in enumerate(zip(begins, sizes, strict=False))
        ),
        regions=(Region(dtype="uint8", offset_bytes=0, num_elements=begins[-1]),),
        num_bytes=begins[-1] if num_bytes is None else num_bytes,
    )


class Sent:
    """In place of an outbox: what was sent, in order, and how often each gradient had been written by then."""

    def __init__(self, num_slots: int) -> None:
        self.calls: list[tuple[int, Flat, tuple[tuple[int, int], ...]]] = []
        self.num_writes = [0] * num_slots
        self._seen: dict[tuple[int, int], list[int]] = {}

    def send_pieces(self, slot: int, source: Flat, ranges: Sequence[tuple[int, int]]) -> None:
        self.calls.append((slot, source, tuple(ranges)))
        for span in ranges:
            self._seen[span] = list(self.num_writes)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [span for _, _, spans in self.calls for span in spans]

    def stale(self, layout: Layout) -> list[tuple[int, int]]:
        """Spans that were sent last before a gradient in them was written last, with the gradient."""
        found = []
        for span, num_writes in self._seen.items():
            for index, slot in enumerate(layout.slots):
                first, last = slot.offset_bytes, slot.offset_bytes + slot.shape[0]
                if first < span[1] and span[0] < last and num_writes[index] != self.num_writes[index]:
                    found.append((span[0], index))
        return found


class Sender:
    """A publisher, and a backward pass by hand."""

    def __init__(self, layout: Layout, *, num_bytes: int | None = None) -> None:
        self.sent = Sent(len(layout.slots))
        self.flat = Flat(memoryview(b""))
        total = layout.num_bytes if num_bytes is None else num_bytes
        self.publisher = Publisher(layout, total, self.sent)  # type: ignore[arg-type]
        self.publisher.begin(0, self.flat)

    def backward(self, *indices: int, is_last: bool = True) -> list[tuple[int, int]]:
        """Write gradients; all that has been sent by then."""
        self.publisher.is_last_backward = is_last
        for index in indices:
            self.sent.num_writes[index] += 1
            self.publisher.gradient_is_written(index)
        return self.sent.spans

    def finish(self) -> list[tuple[int, int]]:
        self.publisher.finish()
        return self.sent.spans


# one piece after the other ----------------------------------------------------------------------------


def test_a_piece_goes_when_the_last_gradient_in_it_is_written():
    sender = Sender(layout_of(64, 64))
    assert sender.backward(1) == []
    assert sender.backward(0) == [(0, 128)]


def test_a_piece_that_is_whole_does_not_wait_for_the_next():
    sender = Sender(layout_of(MB4, MB4))
    assert sender.backward(1) == [(4_194_304, 8_388_608)]
    assert sender.backward(0) == [(4_194_304, 8_388_608), (0, 4_194_304)]


def test_a_gradient_over_several_pieces_completes_them_all():
    sender = Sender(layout_of(2 * MB4 + 64))
    assert sender.backward(0) == [(0, 4_194_304), (4_194_304, 8_388_608), (8_388_608, 8_388_672)]


def test_a_piece_that_two_gradients_share_waits_for_both():
    sender = Sender(layout_of(MB4 + 64, MB4))
    assert sender.backward(0) == [(0, 4_194_304)]
    assert sender.backward(1) == [(0, 4_194_304), (4_194_304, 8_388_608), (8_388_608, 8_388_672)]


def test_nothing_goes_before_the_last_backward():
    assert Sender(layout_of(64, 64)).backward(0, 1, is_last=False) == []


def test_a_gradient_of_an_earlier_backward_does_not_complete_a_piece():
    sender = Sender(layout_of(64, 64))
    sender.backward(0, is_last=False)
    assert sender.backward(1) == []


def test_what_was_sent_is_not_sent_again():
    sender = Sender(layout_of(64, MB4))
    sender.backward(0, 1)
    assert sorted(sender.finish()) == [(0, 4_194_304), (4_194_304, 4_194_368)]


def test_what_backward_left_out_goes_at_the_end():
    sender = Sender(layout_of(MB4, MB4))
    sender.backward(1)
    assert sender.finish() == [(4_194_304, 8_388_608), (0, 4_194_304)]


def test_everything_goes_at_the_end_when_backward_wrote_nothing():
    assert Sender(layout_of(MB4, MB4)).finish() == [(0, 4_194_304), (4_194_304, 8_388_608)]


def test_a_gradient_that_changes_after_its_piece_was_sent_is_sent_again():
    sender = Sender(layout_of(MB4, MB4))
    sender.backward(1, 0, 1)
    assert sender.finish() == [(4_194_304, 8_388_608), (0, 4_194_304), (4_194_304, 8_388_608)]


def test_a_gradient_that_changes_before_its_piece_is_complete_is_sent_once():
    sender = Sender(layout_of(64, 64))
    sender.backward(0, 0, 1)
    assert sender.finish() == [(0, 128)]


def test_a_piece_goes_with_the_slab_that_is_written():
    sender = Sender(layout_of(64))
    flat = Flat(memoryview(b"other"))
    sender.publisher.begin(3, flat)
    sender.backward(0)
    assert sender.sent.calls == [(3, flat, ((0, 64),))]


def test_a_slab_that_is_begun_again_is_sent_again():
    sender = Sender(layout_of(64))
    sender.backward(0)
    sender.publisher.begin(0, sender.flat)
    sender.backward(0)
    assert sender.finish() == [(0, 64), (0, 64)]


def test_a_new_slab_is_not_in_its_last_backward_yet():
    sender = Sender(layout_of(64))
    sender.publisher.is_last_backward = True
    sender.publisher.begin(1, sender.flat)
    sender.publisher.gradient_is_written(0)
    assert sender.sent.spans == []


# buffers ----------------------------------------------------------------------------------------------


def test_buffers_go_at_the_end():
    sender = Sender(layout_of(MB4), num_bytes=MB4 + 128)
    assert sender.backward(0) == [(0, 4_194_304)]
    assert sender.finish() == [(0, 4_194_304), (4_194_304, 4_194_432)]


def test_a_piece_that_gradients_share_with_buffers_goes_at_the_end():
    sender = Sender(layout_of(64), num_bytes=128)
    assert sender.backward(0) == []
    assert sender.finish() == [(0, 128)]


# corners ----------------------------------------------------------------------------------------------


def test_a_gradient_without_elements_at_the_end_of_a_full_piece_is_taken():
    """Such as float32 of 1024 x 1024, and an empty float64 behind it."""
    sender = Sender(layout_of(MB4, 0))
    sender.backward(0)
    assert sender.finish() == [(0, 4_194_304)]


def test_a_gradient_without_elements_keeps_nothing_from_being_sent():
    sender = Sender(layout_of(64, 0, 64))
    sender.backward(0, 2)
    assert sender.finish() == [(0, 128)]


SIZES = st.lists(
    st.one_of(st.integers(0, 200), st.sampled_from([MB4 - 64, MB4, MB4 + 1, 2 * MB4, 3 * MB4 - 128])),
    min_size=1,
    max_size=8,
)


@given(SIZES, st.sampled_from([0, 64, MB4, MB4 + 192]), st.data())
@example([64, 64], 0, None)
def test_every_byte_is_sent_after_it_was_written_last(sizes: list[int], buffers: int, data: st.DataObject | None):
    layout = layout_of(*sizes)
    sender = Sender(layout, num_bytes=layout.num_bytes + buffers)
    if data is not None:
        writes = st.lists(st.sampled_from(range(len(sizes))), max_size=12)
        for _ in range(data.draw(st.integers(0, 2), label="earlier backwards")):
            assert sender.backward(*data.draw(writes), is_last=False) == []
        sender.backward(*data.draw(writes, label="last backward"))
    spans = sender.finish()
    covered = [(first, last) for first, last in sorted(set(spans)) if first < last]
    assert covered == pieces_of(layout.num_bytes + buffers)
    assert sender.sent.stale(layout) == []


@given(SIZES, st.sampled_from([0, 64, MB4]), st.data())
def test_every_piece_is_sent_once_when_every_gradient_comes_once(sizes: list[int], buffers: int, data: st.DataObject):
    layout = layout_of(*sizes)
    sender = Sender(layout, num_bytes=layout.num_bytes + buffers)
    sender.backward(*data.draw(st.permutations(range(len(sizes)))))
    spans = sorted(span for span in sender.finish() if span[0] < span[1])
    assert spans == pieces_of(layout.num_bytes + buffers)


def pieces_of(num_bytes: int) -> list[tuple[int, int]]:
    return [(first, min(first + PIECE_BYTES, num_bytes)) for first in range(0, num_bytes, PIECE_BYTES)]


# an engine's memory -----------------------------------------------------------------------------------


def load_of(parameters: SegmentRef, *, transport: TransportKind, slab_bytes: int = 128) -> Load:
    return Load(
        run="run",
        transport=transport,
        wire=WireOffer(url="", token=""),
        parameters=parameters,
        parameter_layout=layout_of(64),
        gradient_layout=layout_of(64),
        buffer_layout=layout_of(num_bytes=slab_bytes),
    )


def test_shared_parameters_are_the_hubs_own(tmp_path: Path):
    segment = create_segment("parameters", 5, folders=[tmp_path])
    memory = EngineMemory(load_of(segment.ref, transport="memory"))
    segment.memory[:] = b"hello"
    assert memory.parameters[:] == b"hello"


def test_shared_slabs_are_the_hubs_own(tmp_path: Path):
    first, second = (create_segment("slab", 5, folders=[tmp_path]) for _ in range(2))
    memory = EngineMemory(load_of(first.ref, transport="memory"))
    memory.add_slabs([first.ref, second.ref])
    memory.slabs[1].memory[:] = b"hello"
    assert (first.memory[:], second.memory[:]) == (bytes(5), b"hello")


def test_memory_that_cannot_be_mapped_is_told(tmp_path: Path):
    with pytest.raises(OSError, match="No such file"):
        EngineMemory(load_of(SegmentRef(path=str(tmp_path / "gone"), num_bytes=5), transport="memory"))


def test_parameters_that_are_not_shared_are_as_large_as_the_hubs():
    memory = EngineMemory(load_of(SegmentRef(path="/of/another/host", num_bytes=77), transport="socket"))
    assert memory.parameters[:] == bytes(77)


def test_slabs_that_are_not_shared_hold_gradients_and_buffers():
    memory = EngineMemory(load_of(NOWHERE, transport="socket", slab_bytes=192))
    memory.add_slabs([NOWHERE, NOWHERE])
    assert [bytes(slab.memory) for slab in memory.slabs] == [bytes(192), bytes(192)]


def test_slabs_that_are_added_later_follow_the_others():
    memory = EngineMemory(load_of(NOWHERE, transport="socket"))
    memory.add_slabs([NOWHERE])
    memory.slabs[0].memory[0] = 7
    memory.add_slabs([NOWHERE])
    assert [slab.memory[0] for slab in memory.slabs] == [7, 0]


def test_memory_that_is_let_go_leaves_no_file_open():
    gc.collect()
    before = psutil.Process().num_fds()
    memory = EngineMemory(load_of(NOWHERE, transport="socket"))
    memory.add_slabs([NOWHERE, NOWHERE])
    if hasattr(memory, "close"):
        memory.close()
    del memory
    gc.collect()
    assert psutil.Process().num_fds() == before
