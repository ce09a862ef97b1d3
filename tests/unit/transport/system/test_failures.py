import asyncio
import os

import msgspec
import pytest

from dnb.errors import summary_of
from dnb.hub.history.run_folder import RunFolder
from dnb.hub.message_checks import shortened
from dnb.protocol.run import Failure
from dnb.transport.system.failures import MESSAGE_LENGTH, TRACEBACK_LENGTH, WHOLE_LENGTH, clean_text, describe_error


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no")


class PanickingError(Exception):
    def __str__(self):
        raise type("PanicException", (BaseException,), {})("no")


class NumberError(Exception):
    def __str__(self):
        return 3


class Text(str):
    def replace(self, *_):
        raise RuntimeError("no")

    encode = __len__ = __str__ = replace


class TextError(Exception):
    def __str__(self):
        return Text("a text of its own")


class Shy(type):
    @property
    def __name__(cls):
        raise RuntimeError("no")


class ShyError(Exception, metaclass=Shy):
    pass


class LyingError(Exception):
    @property
    def __class__(self):
        raise RuntimeError("no")

    __name__ = 3

    def __repr__(self):
        raise RuntimeError("no")

    __eq__ = __hash__ = __bool__ = __len__ = __repr__


class Name:
    def __repr__(self):
        raise KeyboardInterrupt


def noted(*notes):
    error = ValueError("with notes")
    error.__notes__ = [*notes]
    return error


def circular():
    error, cause = ValueError("one"), KeyError("two")
    error.__cause__, cause.__context__ = cause, error
    return error


def chained(length):
    error = ValueError("the last")
    for number in range(length):
        outer = ValueError(number)
        outer.__cause__ = error
        error = outer
    return error


def nested(depth):
    error = ValueError("inside")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def deep(levels):
    return deep(levels + 1) + 1


def recursive():
    try:
        deep(0)
    except RecursionError as error:
        return error


def caught(error):
    try:
        raise error
    except BaseException as raised:  # noqa: BLE001 - a panic is no Exception
        return raised


ODD = {
    "surrogate": lambda: ValueError("cannot read " + os.fsdecode(b"scan\xff.png")),
    "nul": lambda: ValueError("a\0b"),
    "huge": lambda: ValueError("x" * 5_000_000),
    "mute": lambda: MuteError(),
    "group": lambda: ExceptionGroup("two", [ValueError("one"), MuteError()]),
    "base_group": lambda: BaseExceptionGroup("three", [KeyboardInterrupt(), ValueError("\ud800")]),
    "cancelled": lambda: asyncio.CancelledError(),
    "panic": lambda: type("PanicException", (BaseException,), {})("a library panicked"),
    "panicking": lambda: PanickingError(),
    "number": lambda: NumberError(),
    "text": lambda: TextError(),
    "shy": lambda: ShyError("shy"),
    "lying": lambda: LyingError("lying"),
    "long_class": lambda: type("X" * 10_000, (Exception,), {})("a long class"),
    "key": lambda: KeyError(Name()),
    "attribute": lambda: AttributeError(name="x", obj=MuteError()),
    "notes": lambda: noted("plain", 3, Name(), "\udcff", "n" * 5_000_000),
    "circular": lambda: circular(),
    "chain": lambda: chained(2_000),
    "nested": lambda: nested(2_000),
    "many": lambda: ExceptionGroup("many", [ValueError(number) for number in range(1_000)]),
    "recursive": lambda: recursive(),
    "syntax": lambda: SyntaxError("odd", ("\udcff", 3, 5, "\udcff", 3, 7)),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_whatever_was_raised_can_be_sent_and_is_short(make):
    error = make()
    failure = describe_error(caught(error), place="sample \udcff")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure) == failure
    assert "\0" not in failure.message
    assert len(failure.message) < MESSAGE_LENGTH + 100
    assert len(failure.traceback) < TRACEBACK_LENGTH + 100
    assert len(failure.kind) < MESSAGE_LENGTH + 100
    assert 0 < len(summary_of(error)) < 1_100


def test_a_plain_error_is_told_as_it_is():
    failure = describe_error(caught(ValueError("no such class")), place="shard 3")
    assert (failure.kind, failure.message, failure.place) == ("ValueError", "no such class", "shard 3")
    assert "raise error\nValueError: no such class" in failure.traceback


def test_of_a_long_text_the_beginning_and_the_end_stay():
    failure = describe_error(ValueError("begin" + "x" * 5_000_000 + "end"))
    assert failure.message.startswith("beginxxx")
    assert failure.message.endswith("xxxend")
    assert "4,996,058 characters left out" in failure.message


def test_an_error_whose_text_cannot_be_had_is_told_by_its_class():
    failure = describe_error(caught(MuteError()))
    assert failure.kind == "MuteError"
    assert failure.message == "(its text cannot be had: __str__ raised RuntimeError)"


def test_what_is_short_is_sent_once():
    assert describe_error(caught(ValueError("short"))).whole == ""


def test_of_a_text_that_was_cut_the_whole_is_sent_besides():
    text = "begin" + "x" * 5_000_000 + "\udcff" + "end"
    failure = describe_error(caught(ValueError(text)))
    assert text.replace("\udcff", "\\udcff") in failure.whole
    assert "raise error" in failure.whole


def test_the_whole_text_of_a_group_has_all_its_members():
    group = ExceptionGroup("many", [ValueError(f"member {number}.") for number in range(1_000)])
    failure = describe_error(caught(group))
    assert "and 985 more exceptions" in failure.traceback
    assert all(f"member {number}." in failure.whole for number in range(1_000))


def test_the_whole_text_ends_somewhere():
    failure = describe_error(caught(ValueError("x" * 20_000_000)))
    assert len(failure.whole) < WHOLE_LENGTH + 100
    assert "characters left out" in failure.whole


def test_a_whole_text_is_kept_in_the_folder_of_the_run_for_its_owner_alone(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        path = folder.write_error("step-000012-engine-1", "a\ud800b")
        assert folder.write_error("step-000012-engine-1", "again") == path
    assert path == tmp_path / "run" / "errors" / "step-000012-engine-1.txt"
    assert path.read_text() == "again"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_whole_text_follows_no_link_and_a_folder_that_cannot_be_had_ends_nothing(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        (tmp_path / "run" / "errors").mkdir()
        (tmp_path / "run" / "errors" / "step.txt").symlink_to(tmp_path / "elsewhere")
        assert folder.write_error("step", "text") is None
    assert not (tmp_path / "elsewhere").exists()
    with RunFolder(tmp_path / "other") as folder:
        (tmp_path / "other" / "errors").write_text("in the way")
        assert folder.write_error("step", "text") is None


def test_what_was_cut_once_is_not_cut_again():
    for length in (1_000, MESSAGE_LENGTH, TRACEBACK_LENGTH):
        once = clean_text("x" * 5_000_000, length=length)
        assert len(once) <= length
        assert clean_text(once, length=length) == once
    failure = describe_error(caught(ValueError("x" * 5_000_000)))
    assert shortened(failure) == failure
