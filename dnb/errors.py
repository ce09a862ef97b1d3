"""The error tree: everything that dnb raises for a user to read.

DnbError
├── ArgumentError     a wrong argument: refused before any process starts (also a ValueError)
│   └── ShippingError an object that cannot be sent to the engines
├── PlanError         work that cannot be divided as asked
├── PoolError         a pool that cannot start, answer or be found
├── HubError          the hub does not answer, or refuses
├── SpaceError        no room for shared memory, or on disk
└── RunError          a run that failed; carries the engine's traceback
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DnbError(Exception):
    """Base of all errors raised by dnb for a user to read."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message, as frames of dnb itself help nobody there."""
        return [f"{type(self).__name__}: {self}"]


class ArgumentError(DnbError, ValueError):
    """An argument is wrong; nothing was started."""


class ShippingError(ArgumentError):
    """An object cannot be pickled, so the engines cannot have it."""


class PlanError(DnbError):
    """The work cannot be divided over the engines as asked."""


class PoolError(DnbError):
    """A pool cannot start, does not answer, or is not there."""


class HubError(DnbError):
    """The hub does not answer in time, or refuses a request."""


class SpaceError(DnbError):
    """No folder has room for a shared-memory segment, or a disk none for a checkpoint."""


class RunError(DnbError):
    """A run failed.

    Args:
        message: what failed, with engine and step.
        remote_traceback: the engine's own traceback, as text; empty if the hub failed the run itself.
    """

    def __init__(self, message: str, *, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n\n{self.remote_traceback}" if self.remote_traceback else message


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: the closest of `choices`, and all of them."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


# What a user's function may raise: one that calls `sys.exit` must not end an engine, and then the next one.
USER_ERRORS = (Exception, SystemExit)
