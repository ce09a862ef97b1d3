"""Records as msgpack, whatever text is in them."""

from __future__ import annotations

from typing import Any

import msgspec

from dnb.errors import clean_text
from dnb.protocol.base import Record

_encoder = msgspec.msgpack.Encoder()
# No text is cut here: what may be long was cut where it was made.
_ANY_LENGTH = 1 << 62


def encode_record(record: Record) -> bytes:
    """Encode a record; lone surrogates in its texts, which are no characters, become escapes.

    Names of files may hold them, and so errors, notes and warnings that were made of such names.
    """
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        return _encoder.encode(_cleaned(msgspec.to_builtins(record, builtin_types=(bytes, bytearray, memoryview))))


def encode_exactly(record: Record) -> bytes:
    """Encode a record whose texts must arrive as they are, such as names of files.

    Raises:
        UnicodeEncodeError: there is a lone surrogate in one.
    """
    return _encoder.encode(record)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value, length=_ANY_LENGTH)
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each) for each in value]
    return value
