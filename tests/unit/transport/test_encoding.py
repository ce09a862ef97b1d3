from __future__ import annotations

import os

import msgspec
import pytest

from dnb.protocol.client_messages import Refused
from dnb.protocol.engine_messages import WorkFailed, WorkReport
from dnb.protocol.measurements import Action, RunEvent, StageTrace, Sums
from dnb.protocol.run import Failure
from dnb.transport.encoding import encode_exactly, encode_record
from dnb.transport.sockets.wires import Flat, Outbox, frame_of

ODD = os.fsdecode(b"scan\xff.png")  # a lone surrogate
ODD_ESCAPED = "scan\\udcff.png"


def test_a_lone_surrogate_arrives_as_an_escape():
    assert msgspec.msgpack.decode(encode_record(Refused(error="HubError", message=ODD)), type=Refused) == Refused(
        error="HubError", message="scan\\udcff.png"
    )


def test_texts_are_found_wherever_they_are_in_a_record():
    failure = Failure(kind=ODD, message=ODD, traceback=ODD, place=ODD, whole=ODD)
    record = WorkFailed(run=ODD, lease=1, kind="step", step=1, shards=(1, 2), failure=failure)
    found = msgspec.msgpack.decode(encode_record(record), type=WorkFailed)
    assert found.failure == Failure(**dict.fromkeys(("kind", "message", "traceback", "place", "whole"), ODD_ESCAPED))
    assert (found.run, found.shards) == (ODD_ESCAPED, (1, 2))


def test_bytes_numbers_and_bars_of_a_record_with_such_a_text_stay_as_they_are():
    report = WorkReport(
        run="run",
        lease=1,
        kind="step",
        step=1,
        shards=(0, 1),
        parts=(Sums(loss_total=1.5, loss_weight=2.0, metric_totals={ODD: 1.0}, metric_weights={}, num_samples=2),),
        is_sum=False,
        unused=(),
        telemetry=None,
        note=ODD,
        digests=b"\xff\0",
        trace=StageTrace(
            begin=1.0,
            end=2.0,
            cpu_seconds=0.5,
            num_micro_batches=1,
            actions=(Action("forward", 0, 0, 1.0, 2.0),),
            traffic=(),
        ),
    )
    found = msgspec.msgpack.decode(encode_record(report), type=WorkReport)
    assert found.digests == b"\xff\0"
    assert found.trace == report.trace
    assert found.parts[0].metric_totals == {ODD_ESCAPED: 1.0}


def test_a_record_without_such_a_text_is_encoded_as_ever():
    event = RunEvent(kind="paused", text="ß 精度", step=1, time=1.0)
    assert encode_record(event) == encode_exactly(event) == msgspec.msgpack.encode(event)


def test_what_must_arrive_as_it_is_is_refused():
    with pytest.raises(UnicodeEncodeError):
        encode_exactly(Refused(error="HubError", message=ODD))


class Fake:
    """In place of a wire."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def queue_frame(self, frame: bytes) -> None:
        self.frames.append(frame)

    def flush_all(self, *, timeout_seconds: float) -> None:
        pass


def test_a_record_that_cannot_be_encoded_raises_at_its_sender_and_the_outbox_goes_on():
    wire = Fake()
    outbox = Outbox(wire, timeout_seconds=1.0)
    outbox.start()
    sums = Sums(loss_total=1.0, loss_weight=2**70, metric_totals={}, metric_weights={}, num_samples=2)
    report = WorkReport(
        run="", lease=1, kind="step", step=1, shards=(), parts=(sums,), is_sum=False, unused=(), telemetry=None
    )
    with pytest.raises(OverflowError):
        outbox.send(report)
    refused = Refused(error="HubError", message="no")
    outbox.send(refused)
    outbox.stop()
    outbox.join(10)
    assert wire.frames == [frame_of(refused)]
    assert not outbox.is_alive()


def test_pieces_and_records_keep_their_order_in_an_outbox():
    seen: list[object] = []

    class Listing(Fake):
        def queue_frame(self, frame: bytes) -> None:
            seen.append(frame)

        def queue_pieces(self, slot: int, source: Flat, ranges: object) -> None:
            seen.append(slot)

    outbox = Outbox(Listing(), timeout_seconds=1.0)
    outbox.send_pieces(3, Flat(memoryview(b"")), ())
    outbox.send(Refused(error="", message=""), b"raw")
    outbox.stop()
    outbox.run()
    assert seen == [3, frame_of(Refused(error="", message=""), b"raw")]
