"""Long work says how far it is; who listens, if anybody does, is set from above.

Nobody listens in hub, engines and plain scripts: there it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

# Takes a figure in words, such as "2 of 4 engines are there", or what gives it: that is called in another thread, and
# only while somebody looks.
Report = Callable[[str | Callable[[], str]], None]
# Takes what is done, such as "starting 4 engines".
Watch = Callable[[str], AbstractContextManager[Report]]

_default: list[Watch] = []
_own: ContextVar[Watch | None] = ContextVar("dnb-watch", default=None)


def watch_all(watch: Watch) -> None:
    """Let everything that takes long in this process be told to `watch`, unless `watching` names another."""
    _default[:] = [watch]


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Have told to `watch` what takes long in this block and thread."""
    token = _own.set(watch)
    try:
        yield
    finally:
        _own.reset(token)


@contextmanager
def long_work(what: str) -> Iterator[Report]:
    """Announce a block that may take seconds; it reports figures that are really known, and no guesses.

    Args:
        what: is done, as "starting 4 engines".
    """
    own = _own.get()
    watch = own if own is not None else next(iter(_default), None)
    if watch is None:
        yield _say_nothing
    else:
        with watch(what) as report:
            yield report


def _say_nothing(_figure: str | Callable[[], str]) -> None:
    """Do nothing, as nobody listens."""
