"""What engines and clients say and cannot mean is refused before anything has changed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from dnb.errors import ArgumentError
from dnb.hub.message_checks import (
    PeerError,
    Rules,
    check_engine,
    check_message,
    check_parts,
    check_request,
    decode_peer,
)
from dnb.protocol.client_messages import GetRun, Hello, InjectFault, KeepSpares, Request, SetOptions, TakeCheckpoint
from dnb.protocol.engine_messages import (
    Diagnosis,
    EngineMessage,
    Heartbeat,
    LoadFailed,
    NoSharedMemory,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.measurements import Action, StageTrace, StageTraffic, Sums, Telemetry
from dnb.protocol.pool import EngineFacts, Process
from dnb.protocol.run import Failure

RULES = Rules(num_gradients=4, num_parameters=5, num_shards=8, num_stages=2)
decode_engine = msgspec.msgpack.Decoder(EngineMessage).decode
decode_request = msgspec.msgpack.Decoder(Request).decode


def sums(**options: Any) -> Sums:
    whole = {"loss_total": 1.0, "loss_weight": 8.0, "metric_totals": {}, "metric_weights": {}, "num_samples": 8}
    return Sums(**{**whole, **options})


def trace(**options: Any) -> StageTrace:
    whole = {
        "begin": 0.0,
        "end": 1.0,
        "cpu_seconds": 0.5,
        "num_micro_batches": 2,
        "actions": (Action("wait", -1, -1, 0.0, 0.0), Action("forward", 0, 0, 0.0, 0.5)),
        "traffic": (StageTraffic(stage=1, forward_bytes=3, backward_bytes=3),),
    }
    return StageTrace(**{**whole, **options})


def report(**options: Any) -> WorkReport:
    whole = {
        "run": "r",
        "lease": 1,
        "kind": "step",
        "step": 1,
        "shards": (0, 1),
        "parts": (sums(),),
        "is_sum": False,
        "unused": (),
        "telemetry": None,
    }
    return WorkReport(**{**whole, **options})


# decoding


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xff\xfe",
        b"\x83\xa4type\xa6Attach\xa6engine\x00\xa5proof\xa3\xff\xfe\xfd",
        b"\x81\xa4type\xa2\xff\xfe",
        b"\x91" * 100_000,
        b"\x82\xa4type\xa6Attach\xa1x" + b"\x91" * 3000,
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa4Beat\xa6engine\xcf" + b"\xff" * 8,
        msgspec.msgpack.encode({"type": "Nobody"}),
        msgspec.msgpack.encode(None),
    ],
    ids=lambda packed: repr(packed[:12]),
)
@pytest.mark.parametrize("decode", [decode_engine, decode_request])
def test_whatever_cannot_be_decoded_is_one_kind_of_error(decode: Any, packed: bytes):
    with pytest.raises(PeerError, match="a record cannot be decoded: "):
        decode_peer(decode, packed)


def test_what_can_be_decoded_is():
    beat = Heartbeat(engine=1, process=Process(host="h", pid=3, create_time=1.0))
    assert decode_peer(decode_engine, msgspec.msgpack.encode(beat)) == beat


# engines


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": -1}, "the number -1"),
        ({"engine": 1 << 20}, "the number 1048576"),
        ({"process": Process(host="h", pid=0, create_time=1.0)}, "pid 0"),
        ({"process": Process(host="h", pid=-4, create_time=1.0)}, "pid -4"),
        ({"process": Process(host="h", pid=1 << 40, create_time=1.0)}, "pid 1099511627776"),
        ({"process": Process(host="h", pid=1, create_time=math.nan)}, "starts at nan"),
        ({"process": Process(host="h" * 5000, pid=1, create_time=1.0)}, "name of a host"),
        ({"cores": 0}, "0 threads"),
        ({"memory_bytes": -1}, "-1 bytes"),
        ({"device": "x" * 5000}, "a name"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_is_not_taken_in(changes: dict[str, Any], told: str):
    facts = EngineFacts(
        engine=0,
        process=Process(host="h", pid=1, create_time=1.0),
        cores=1,
        memory_bytes=1,
        device="cpu",
        torch_version="2",
    )
    check_engine(facts)
    with pytest.raises(PeerError, match=told):
        check_engine(msgspec.structs.replace(facts, **changes))


def test_a_report_that_makes_sense_is_taken_as_it_is():
    telemetry = Telemetry(compute_seconds=0.0, data_seconds=1.0, rss_bytes=None, cpu_percent=150.0)
    whole = report(digests=bytes(20), unused=(0, 3), trace=trace(), telemetry=telemetry)
    assert check_message(whole, RULES) is whole


@pytest.mark.parametrize("total", [math.nan, math.inf, -3.0])
def test_a_loss_may_be_whatever_the_model_makes_it(total: float):
    check_message(report(parts=(sums(loss_total=total),)), RULES)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"unused": (99999,)}, r"\(99999,\) are said to be unused"),
        ({"unused": (-1,)}, r"\(-1,\) are said to be unused"),
        ({"digests": b"7 bytes"}, "digests have 7 bytes"),
        ({"digests": bytes(16)}, "digests have 16 bytes"),
        ({"parts": (sums(loss_weight=math.nan),)}, "a weight"),
        ({"parts": (sums(loss_weight=-1.0),)}, "a weight"),
        ({"parts": (sums(metric_totals={"a": 1.0}),)}, "a metric"),
        ({"parts": (sums(metric_totals={"a": 1.0}, metric_weights={"a": math.inf}),)}, "a weight"),
        ({"parts": (sums(num_samples=-8),)}, "-8 samples"),
        (
            {"telemetry": Telemetry(compute_seconds=math.nan, data_seconds=0.0, rss_bytes=0, cpu_percent=0.0)},
            "says nan",
        ),
        ({"telemetry": Telemetry(compute_seconds=0.0, data_seconds=-1.0, rss_bytes=0, cpu_percent=0.0)}, "says -1"),
        (
            {"telemetry": Telemetry(compute_seconds=0.0, data_seconds=0.0, rss_bytes=1 << 63, cpu_percent=0.0)},
            "says 9223372036854775808",
        ),
        ({"trace": trace(end=-1.0)}, "ends before"),
        ({"trace": trace(end=math.inf)}, "a time"),
        ({"trace": trace(actions=())}, "no action"),
        ({"trace": trace(actions=(Action("send", 2, 0, 0.0, 0.1),))}, "a stage"),
        ({"trace": trace(actions=(Action("send", 0, 2, 0.0, 0.1),))}, "micro-batch"),
        ({"trace": trace(actions=(Action("send", 0, 0, 0.2, 0.1),))}, "ends before"),
        ({"trace": trace(num_micro_batches=0)}, "0 micro-batches"),
        ({"trace": trace(traffic=(StageTraffic(stage=0, forward_bytes=-1, backward_bytes=0),))}, "less than nothing"),
    ],
    ids=str,
)
def test_a_report_that_makes_no_sense_is_refused(changes: dict[str, Any], told: str):
    with pytest.raises(PeerError, match=told):
        check_message(report(**changes), RULES)


@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_a_report_has_as_many_parts_as_slabs_were_leased(num_parts: int):
    with pytest.raises(PeerError, match=f"{num_parts} parts for 2 slabs"):
        check_parts(report(parts=(sums(),) * num_parts), num_slabs=2, num_samples=8, is_divided=False)
    check_parts(report(parts=(sums(),) * 2), num_slabs=2, num_samples=8, is_divided=False)


def test_a_report_of_a_team_has_a_part_at_least():
    check_parts(report(), num_slabs=2, num_samples=8, is_divided=True)
    with pytest.raises(PeerError, match="0 parts"):
        check_parts(report(parts=()), num_slabs=2, num_samples=8, is_divided=True)


def test_nobody_has_more_samples_than_the_batch():
    with pytest.raises(PeerError, match="8 samples of 7"):
        check_parts(report(), num_slabs=1, num_samples=7, is_divided=False)


def test_texts_become_short_enough_to_be_shown():
    failure = Failure(kind="k" * 10**6, message="m" * 10**6, traceback="t" * 10**6, place="p" * 10**6)
    messages: list[EngineMessage] = [
        LoadFailed(run="r", failure=failure),
        WorkFailed(run="r", lease=1, kind="step", step=1, shards=(0,), failure=failure),
        NoSharedMemory(run="r", reason="x" * 10**6),
        Diagnosis(run="r", step=1, shard=None, parameter="x" * 10**6, kind="NaN"),
        report(note="x" * 10**6),
    ]
    for message in messages:
        assert len(msgspec.msgpack.encode(check_message(message, RULES))) < 60_000


def test_a_shard_that_is_not_there_has_no_gradient():
    with pytest.raises(PeerError, match="no shard 8"):
        check_message(Diagnosis(run="r", step=1, shard=8, parameter="w", kind="NaN"), RULES)


# clients


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (KeepSpares(number=-5), "from 0 to 4096, not -5"),
        (KeepSpares(number=10**9), "from 0 to 4096"),
        (InjectFault(verb="stop", engine=0, amount=math.nan), "not nan"),
        (InjectFault(verb="stop", engine=0, amount=math.inf), "not inf"),
        (InjectFault(verb="stop", engine=0, amount=-1.0), "more than 0"),
        (InjectFault(verb="slow", engine=0, amount=0.5), "factor from 1"),
        (InjectFault(verb="slow", engine=0, amount=math.nan), "factor from 1"),
        (SetOptions(run="r", options={}), "set what"),
        (TakeCheckpoint(run="r", path=""), "whole path"),
        (TakeCheckpoint(run="r", path="here"), "whole path"),
        (TakeCheckpoint(run="r", path="/tmp/a\0b"), "whole path"),
        (GetRun(run="r", seen={"loss": -1}, seen_events=0), "at least 0 rows"),
        (GetRun(run="r", seen={}, seen_events=-1), "at least 0 rows"),
        (GetRun(run="r", seen={}, seen_events=0, seen_usage=1 << 63), "at least 0 rows"),
        (Hello(owner=Process(host="h", pid=1 << 40, create_time=0.0)), "pid 1099511627776"),
        (Hello(owner=Process(host="h", pid=-1, create_time=0.0)), "pid -1"),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_refused(request_: Any, told: str):
    with pytest.raises(ArgumentError, match=told):
        check_request(request_)


@pytest.mark.parametrize(
    "request_",
    [
        KeepSpares(number=0),
        InjectFault(verb="kill", engine=0),
        InjectFault(verb="slow", engine=0, amount=1.0),
        SetOptions(run="r", options={"clip_norm": None}),
        TakeCheckpoint(run="r", path=None),
        TakeCheckpoint(run="r", path="/tmp/a"),
        GetRun(run="r", seen={"loss": 3}, seen_events=0),
    ],
    ids=str,
)
def test_a_request_that_makes_sense_is_let_through(request_: Any):
    check_request(request_)


def test_the_whole_of_an_error_that_was_cut_is_let_through():
    failure = Failure(kind="E", message="m", traceback="t", whole="w" * 10**6)
    message = WorkFailed(run="r", lease=1, kind="step", step=1, shards=(0,), failure=failure)
    checked = check_message(message, RULES)
    assert isinstance(checked, WorkFailed)
    assert checked.failure == failure
