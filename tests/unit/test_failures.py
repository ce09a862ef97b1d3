import asyncio
import os

import msgspec
import pytest

from dnb.records import Failure
from dnb.transport.failures import MESSAGE_LENGTH, TRACEBACK_LENGTH, describe_error


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no")


def caught(error):
    try:
        raise error
    except BaseException as raised:  # noqa: BLE001 - a panic is no Exception
        return raised


@pytest.mark.parametrize(
    "error",
    [
        ValueError("cannot read " + os.fsdecode(b"scan\xff.png")),
        ValueError("a\0b"),
        ValueError("x" * 5_000_000),
        MuteError(),
        ExceptionGroup("two", [ValueError("one"), MuteError()]),
        BaseExceptionGroup("three", [KeyboardInterrupt(), ValueError("\ud800")]),
        asyncio.CancelledError(),
        type("PanicException", (BaseException,), {})("a library panicked"),
    ],
    ids=["surrogate", "nul", "huge", "mute", "group", "base_group", "cancelled", "panic"],
)
def test_whatever_was_raised_can_be_sent_and_is_short(error):
    failure = describe_error(caught(error), place="sample \udcff")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure) == failure
    assert "\0" not in failure.message
    assert len(failure.message) < MESSAGE_LENGTH + 100
    assert len(failure.traceback) < TRACEBACK_LENGTH + 100


def test_a_plain_error_is_told_as_it_is():
    failure = describe_error(caught(ValueError("no such class")), place="shard 3")
    assert (failure.kind, failure.message, failure.place) == ("ValueError", "no such class", "shard 3")
    assert "raise error\nValueError: no such class" in failure.traceback


def test_of_a_long_text_the_beginning_and_the_end_stay():
    failure = describe_error(ValueError("begin" + "x" * 5_000_000 + "end"))
    assert failure.message.startswith("beginxxx")
    assert failure.message.endswith("xxxend")
    assert "4,996,008 characters left out" in failure.message


def test_an_error_whose_text_cannot_be_had_is_told_by_its_class():
    failure = describe_error(caught(MuteError()))
    assert failure.kind == "MuteError"
    assert failure.message == "(its text cannot be had: __str__ raised RuntimeError)"
