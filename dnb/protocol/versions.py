"""The version of dnb that wrote a record or speaks over a socket, and what is said when it is another one."""

from __future__ import annotations

import re
from importlib.metadata import version

import msgspec

VERSION = version("dnb")
# Of what kernel, hub and engines say to each other, and of a pool's record. Raised whenever an earlier dnb could not
# read it any more; other formats are those of a run's folder and of a checkpoint.
POOL_FORMAT = 1

_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,40}")
_UNKNOWN_FIELD = re.compile(r"unknown field `(.+?)`")
_MISSING_FIELD = re.compile(r"missing required field `(.+?)`")
_UNKNOWN_KIND = re.compile(r"Invalid value '(.+?)' - at `\$\.type`")
REASON_LENGTH = 200


class RecordHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a record that all versions can read: other fields do not matter, and none has to be there."""

    format: int = 1
    version: str = ""


def name_dnb(version: str, format: int) -> str:
    """Name a version for a sentence; an early one, which did not say which it was, has none."""
    is_one = _VERSION.fullmatch(version) is not None  # it may come from anybody
    return f"dnb {version if is_one else 'of an unknown version'} (format {format})"


def name_this_dnb(format: int = POOL_FORMAT) -> str:
    """Name this version for a sentence, with its format of what the sentence is about."""
    return name_dnb(VERSION, format)


def explain_unreadable(error: BaseException) -> str:
    """Say in words why a record of another version cannot be read.

    Args:
        error: of the decoder.
    """
    text = str(error)
    if found := _UNKNOWN_FIELD.search(text):
        return f"the field {found[1]!r} is not known"
    if found := _MISSING_FIELD.search(text):
        return f"the field {found[1]!r} is missing"
    if found := _UNKNOWN_KIND.search(text):
        return f"{found[1]!r} is not known"
    return " ".join(text.split())[:REASON_LENGTH]
