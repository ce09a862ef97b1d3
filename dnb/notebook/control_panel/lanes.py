"""Lines of `%dtrain` that run beside the kernel's main thread, one at a time in each lane."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dnb.errors import USER_ERRORS, summary_of
from dnb.notebook.live.progress import Waiting, steady
from dnb.notebook.output import Outlet, speaking_into
from dnb.notebook.views import RunView
from dnb.progress import Report, watching

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LineResult:
    """The result of a line: its words and value, or its error."""

    line: str
    words: str = ""  # that the verb said
    value: Any = None
    error: BaseException | None = None


class Lane:
    """Runs one line after the other; the line under way is `line`, and `progress` how far it is, if it takes long.

    Args:
        name: of the threads.
        dtrain: the magic itself, so that a line does what it does in a cell, and fails in the same words.
        show: takes the run that a verb would show in its cell.
        ended: called from the lane's thread; it must call `clear`.
        progressed: called from any thread when `progress` has changed.
    """

    def __init__(
        self,
        name: str,
        *,
        dtrain: Callable[[str], Any],
        show: Callable[[RunView], None],
        ended: Callable[[Lane, LineResult], None],
        progressed: Callable[[], None],
    ) -> None:
        self.line = ""
        self.progress = ""
        self._progressed = progressed
        self._name = name
        self._dtrain = dtrain
        self._show = show
        self._ended = ended
        self._thread: threading.Thread | None = None

    def run(self, line: str) -> bool:
        """Begin with a line; return True if the lane was free."""
        if self.line:
            return False
        self.line = line
        # in the context of the press: what user code prints there belongs to no cell
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, line), name=self._name, daemon=True)
        self._thread.start()
        return True

    def clear(self) -> None:
        """Take the next line from now on."""
        self.line = self.progress = ""

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the line under way; return True if it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, line: str) -> None:
        said: list[str] = []
        try:
            with speaking_into(Outlet(say=said.append, show=self._show)), watching(self._watch):
                value = self._dtrain(line)
        except USER_ERRORS as error:  # a thread has nobody to raise to: shown in the panel
            log.info("%%dtrain %s failed: %s", line, summary_of(error))
            outcome = LineResult(line=line, words="\n".join(said), error=error)
        else:
            outcome = LineResult(line=line, words="\n".join(said), value=value)
        self._ended(self, outcome)

    @contextmanager
    def _watch(self, what: str) -> Iterator[Report]:
        with Waiting(what, show=self._tell, pauses=steady()) as waiting:
            yield waiting.report

    def _tell(self, progress: str) -> None:
        self.progress = progress
        self._progressed()
