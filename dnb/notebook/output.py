"""The destination of a verb's words and views: the cell that runs it, or a caller from somewhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from dnb.notebook.magic_words import as_magic
from dnb.notebook.views import RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlet:
    """The receiver of a verb's words, and of the run that it would show."""

    say: Callable[[str], None]
    show: Callable[[RunView], None]


# Not redirect_stdout, which would take the prints of a cell that runs meanwhile in the main thread.
_outlet: ContextVar[Outlet | None] = ContextVar("dnb_outlet", default=None)


def say(text: str) -> None:
    """Write something for the verb under way."""
    outlet, words = _outlet.get(), as_magic(text.rstrip())
    if outlet is None:
        sys.stdout.write(words + "\n")
    else:
        outlet.say(words)


def current() -> Outlet | None:
    """Return the outlet of the verb under way; None for the cell."""
    return _outlet.get()


@contextmanager
def speaking_into(outlet: Outlet) -> Iterator[None]:
    """Send to `outlet` everything that this thread says meanwhile."""
    token = _outlet.set(outlet)
    try:
        yield
    finally:
        _outlet.reset(token)
