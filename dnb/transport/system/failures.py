"""Exceptions of user code as text that can be sent and shown, whatever the exception is."""

from __future__ import annotations

import traceback

from dnb.errors import clean_text, kind_of, text_of
from dnb.protocol.run import Failure

__all__ = ["MESSAGE_LENGTH", "TRACEBACK_LENGTH", "WHOLE_LENGTH", "clean_text", "describe_error"]

# Of a message and of a traceback, in characters: what people read. More is cut out of the middle.
MESSAGE_LENGTH = 4_000
TRACEBACK_LENGTH = 32_000
# Of the whole text, which is sent besides if something was cut, and ends in a file. As UTF-8 it fits into a record.
WHOLE_LENGTH = 6_000_000
# Members of a group, and groups in groups, that the whole text shows; `traceback` shows 15, and 10.
MOST_MEMBERS = 10_000
MOST_GROUPS = 100


def describe_error(error: BaseException, *, place: str = "") -> Failure:
    """Say in words what was raised; never raises, as the exception is the user's and may do anything when it is asked.

    Args:
        error: of any class, also one whose `__str__` raises.
        place: where it was raised, such as "shard 3, sample 812".
    """
    message, trace, whole = text_of(error), _traceback_of(error), ""
    if "more exception" in trace or "max_group_depth" in trace:
        whole = _traceback_of(error, most_members=MOST_MEMBERS, most_groups=MOST_GROUPS)
        whole = "" if whole == trace else whole
    if not whole and (len(message) > MESSAGE_LENGTH or len(trace) > TRACEBACK_LENGTH):
        whole = trace if message in trace else f"{trace}\n{message}"
    return Failure(
        kind=clean_text(kind_of(error), length=MESSAGE_LENGTH),
        message=clean_text(message, length=MESSAGE_LENGTH),
        traceback=clean_text(trace, length=TRACEBACK_LENGTH),
        place=clean_text(place, length=MESSAGE_LENGTH),
        whole=clean_text(whole, length=WHOLE_LENGTH),
    )


def _traceback_of(error: BaseException, *, most_members: int = 15, most_groups: int = 10) -> str:
    try:
        found = traceback.TracebackException.from_exception(
            error, max_group_width=most_members, max_group_depth=most_groups
        )
        return "".join(found.format())
    except BaseException as second:  # noqa: BLE001 - it asks the exception, its notes and its causes for their texts
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"{frames}{kind_of(error)}: {text_of(error)}\n(more of it cannot be had: {kind_of(second)})\n"
