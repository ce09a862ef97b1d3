"""The progress of long work, in the cell that waits for it: from two seconds on, and never for quick work."""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from itertools import chain, repeat
from typing import Any

from IPython import get_ipython
from IPython.display import display

from dnb.notebook.live.frontend import Display, choose_display
from dnb.notebook.text.summary import one_line
from dnb.progress import Report

log = logging.getLogger(__name__)

LIMIT_SECONDS = 2.0
INTERVAL_SECONDS = 0.5
# Begins a line of text, by which tests of notebooks leave it out: how many there are depends on the machine.
LINE_MARK = "... "

Show = Callable[[str], None]


@contextmanager
def watch(what: str, *, kind: Display | None = None) -> Iterator[Report]:
    """Show long work in the cell that runs; nothing if none does, or in another thread than the cell's."""
    shell = get_ipython()
    if kind is None:
        kind = choose_display(shell=shell) if _is_in_cell(shell) else "none"
    if kind == "none":
        yield _say_nothing
        return
    show, pauses = (_print_line, ever_longer()) if kind == "text" else (_ProgressLine(), steady())
    with Waiting(what, show=show, pauses=pauses) as waiting:
        yield waiting.report


def steady() -> Iterator[float]:
    """Yield the pauses before a line that is replaced."""
    return chain([LIMIT_SECONDS], repeat(INTERVAL_SECONDS))


def ever_longer() -> Iterator[float]:
    """Yield the pauses before lines that cannot be taken back."""
    pause = LIMIT_SECONDS
    while True:
        yield pause
        pause *= 2


class Waiting:
    """Shows what is waited for once that takes longer than a limit, and at the end how long it took.

    The cell's own thread is busy with the work: a thread of ours shows, in the context of the cell.

    Args:
        what: is done, as "starting 4 engines".
        show: puts one line of text in the place of the one before it.
        pauses: in seconds, before each line.
        clock: in seconds.
        wait: blocks for so many seconds, or until the work is over, which it returns.
    """

    def __init__(
        self,
        what: str,
        *,
        show: Show,
        pauses: Iterable[float],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._what = one_line(what)
        self._show = show
        self._pauses = pauses
        self._clock = clock
        self._over = threading.Event()
        self._wait = wait or self._over.wait
        self._figure: Callable[[], str] = str
        self._is_shown = False

    def __enter__(self) -> Waiting:
        self._began = self._clock()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._keep_showing,), name="dnb-waiting", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._is_shown:
            self._try_to_show(self._last_line if kind is None else self._line_of_failure)

    def report(self, figure: str | Callable[[], str]) -> None:
        """Report the progress; a function is asked whenever that is shown."""
        self._figure = figure if callable(figure) else lambda: figure

    def _keep_showing(self) -> None:
        for pause in self._pauses:
            if self._wait(pause):
                return
            self._is_shown = True
            if not self._try_to_show(self._line):
                return

    def _line(self) -> str:
        figure = one_line(self._figure())
        return f"{self._what}{': ' * bool(figure)}{figure}, {self._clock() - self._began:.0f} s"

    def _last_line(self) -> str:
        return f"{self._what} took {self._clock() - self._began:.1f} s"

    def _line_of_failure(self) -> str:
        return f"{self._what} failed after {self._clock() - self._began:.1f} s"

    def _try_to_show(self, line: Callable[[], str]) -> bool:
        try:
            self._show(line())
        except Exception:  # what is only told about the work must not end it
            log.exception("how far %r is could not be shown", self._what)
            return False
        return True


class _ProgressLine:
    """One output of the cell, whose text is replaced."""

    def __init__(self) -> None:
        self._display_id = f"dnb-waiting-{uuid.uuid4().hex[:8]}"
        self._is_there = False

    def __call__(self, line: str) -> None:
        content = {"text/plain": line, "text/html": f'<div role="status" style="opacity:.75">{escape(line)}</div>'}
        display(content, raw=True, display_id=self._display_id, update=self._is_there)
        self._is_there = True


def _print_line(line: str) -> None:
    sys.stdout.write(f"{LINE_MARK}{line}\n")
    sys.stdout.flush()


def _is_in_cell(shell: Any) -> bool:
    """Return True if this thread runs a cell, not a callback, and not a call that a kernel sent to an engine."""
    if threading.current_thread() is not threading.main_thread() or getattr(shell, "kernel", None) is None:
        return False
    parent = getattr(shell.display_pub, "parent_header", {})
    return bool(parent.get("msg_type") == "execute_request")


def _say_nothing(_figure: str | Callable[[], str]) -> None:
    """Ignore the progress: nobody looks."""
