from __future__ import annotations

import types
import typing
from typing import Any, get_args

import msgspec
import pytest

from dnb.protocol.base import Message, Record
from dnb.protocol.client_messages import Reply, Request
from dnb.protocol.engine_messages import Challenge, EngineMessage, HubMessage, WireMessage
from dnb.protocol.run import ENDED, RunStatus

UNIONS = {
    "EngineMessage": EngineMessage,
    "HubMessage": HubMessage,
    "WireMessage": WireMessage,
    "Challenge": Challenge,  # alone: it is all that an engine takes from a hub that it does not know yet
    "Request": Request,
    "Reply": Reply,
}
MESSAGES = [(name, kind) for name, union in UNIONS.items() for kind in get_args(union) or (union,)]


def kinds_of(base: type[Record]) -> set[type[Record]]:
    """All records below a base."""
    return {kind for each in base.__subclasses__() for kind in {each, *kinds_of(each)}}


KINDS = {
    kind.__name__: kind
    for kind in kinds_of(Record) - {Message}
    if kind.__module__.startswith(Record.__module__.rpartition(".")[0])
}
FACTS = sorted(KINDS.values(), key=lambda kind: kind.__name__)


def example(kind: Any) -> Any:
    """A value of a type: records are filled field by field."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field.name: example(field.type) for field in msgspec.structs.fields(kind)})
    if isinstance(kind, type) and issubclass(kind, tuple):  # a NamedTuple
        return kind(*map(example, typing.get_type_hints(kind).values()))
    origin, arguments = typing.get_origin(kind), get_args(kind)
    if origin is typing.Literal:
        return arguments[0]
    if origin in (types.UnionType, typing.Union):
        return example(arguments[0])
    if origin is tuple and arguments[-1] is Ellipsis:
        return (example(arguments[0]), example(arguments[0]))
    if origin is dict:
        return {example(arguments[0]): example(arguments[1])}
    return {int: 7, float: 0.5, str: "text", bool: True, bytes: b"raw"}[kind]


def wrong_for(value: Any) -> Any:
    """A value of a type that never fits a field of the example's type."""
    return 3 if isinstance(value, str | bytes | list | dict) else "wrong"


@pytest.mark.parametrize(("name", "kind"), MESSAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_message_is_the_same_after_the_journey(name: str, kind: type[Message]):
    message = example(kind)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=UNIONS[name]) == message


@pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.__name__)
def test_a_record_is_the_same_after_a_journey_as_json(kind: type[Record]):
    record = example(kind)
    if "bytes" in {getattr(field.type, "__name__", "") for field in msgspec.structs.fields(kind)}:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=kind) == record
    else:
        assert msgspec.json.decode(msgspec.json.encode(record), type=kind) == record


@pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.__name__)
def test_a_record_with_an_unknown_field_is_refused(kind: type[Record]):
    fields = {**msgspec.to_builtins(example(kind), builtin_types=(bytes,)), "surprise": 1}
    with pytest.raises(msgspec.ValidationError, match="unknown field `surprise`"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=kind)


FIELDS = [(kind, field.encode_name) for kind in FACTS for field in msgspec.structs.fields(kind)]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_field_of_the_wrong_type_is_refused(kind: type[Record], name: str):
    fields = msgspec.to_builtins(example(kind), builtin_types=(bytes,))
    fields[name] = wrong_for(fields[name])
    with pytest.raises(msgspec.ValidationError, match=rf"at `\$\.{name}`"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=kind)


@pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.__name__)
def test_a_record_cannot_be_changed(kind: type[Record]):
    record = example(kind)
    for field in msgspec.structs.fields(kind):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(record, field.name, None)


def test_a_missing_field_is_refused():
    with pytest.raises(msgspec.ValidationError, match="missing required field `run`"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"type": "Loaded"}), type=EngineMessage)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("EngineMessage", "Shutdown"),
        ("Request", "Work"),
        ("HubMessage", "Join"),
        ("HubMessage", "Work"),
        ("WireMessage", "Load"),
        ("Challenge", "Attach"),
    ],
)
def test_a_message_of_another_channel_is_refused(name: str, foreign: str):
    message = example(KINDS[foreign])
    with pytest.raises(msgspec.ValidationError, match=f"Invalid value '{foreign}'"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=UNIONS[name])


def test_no_message_belongs_to_two_channels():
    kinds = [kind for _, kind in MESSAGES]
    assert len(kinds) == len(set(kinds))


def test_every_message_belongs_to_a_channel():
    assert {kind for kind in FACTS if issubclass(kind, Message)} == {kind for _, kind in MESSAGES}


def test_the_states_that_end_a_run_are_states_of_a_run():
    assert set(get_args(RunStatus)) >= ENDED == {"failed", "stopped", "finished"}
