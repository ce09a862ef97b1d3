"""Exceptions of user code as text that can be sent and shown, whatever the exception is."""

from __future__ import annotations

import traceback

from dnb.records import Failure

# Of a message and of a traceback, in characters: what people read. More is cut out of the middle.
MESSAGE_LENGTH = 4_000
TRACEBACK_LENGTH = 32_000


def describe_error(error: BaseException, *, place: str = "") -> Failure:
    """Say in words what was raised; never raises, as the exception is the user's and may do anything when it is asked.

    Args:
        error: of any class, also one whose `__str__` raises.
        place: where it was raised, such as "shard 3, sample 812".
    """
    return Failure(
        kind=clean_text(type(error).__name__, length=MESSAGE_LENGTH),
        message=clean_text(_message_of(error), length=MESSAGE_LENGTH),
        traceback=clean_text(_traceback_of(error), length=TRACEBACK_LENGTH),
        place=clean_text(place, length=MESSAGE_LENGTH),
    )


def clean_text(text: str, *, length: int) -> str:
    """Make text fit to be encoded as UTF-8 and to be shown: no lone surrogates, no NUL, and not too long."""
    text = text.replace("\0", "\\x00")
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _message_of(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"(its text cannot be had: __str__ raised {type(second).__name__})"
    return text if type(text) is str else str.__str__(text)


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as second:  # noqa: BLE001 - it asks the exception, its notes and its causes for their texts
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"{frames}{type(error).__name__}: (its text cannot be had: {type(second).__name__})\n"
