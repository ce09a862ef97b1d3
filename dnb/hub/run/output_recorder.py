"""The record of what user code prints: all of it in the run's log, the first line of each kind as an event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from dnb.hub.history.output_log import OutputLog
from dnb.hub.scheduling.events import Note
from dnb.protocol.measurements import RunEvent
from dnb.user_code.captured_output import CapturedOutput
from dnb.user_code.output_kinds import COUNTED, FIRST, OTHER_KINDS, REPEATED, kind_of_line, write_count

# Of the whole run: kinds whose first line is an event, and lines beyond these that are in events.
MOST_KINDS = 200
MOST_REPEATED = 2000
# Lines that all engines together tell of their files and metrics.
MOST_NEWS = 2000


class OutputRecorder:
    """Writer of events and log lines of what user code prints on engines and in the hub.

    Args:
        log: takes every line.
        add_event: writes an event.
        step: returns the step that was committed last.
        events: of a run that was taken over, from which known kinds are read.
        own: takes what user code prints in the hub.
    """

    def __init__(
        self,
        log: OutputLog,
        *,
        add_event: Callable[[Note], None],
        step: Callable[[], int],
        events: Iterable[RunEvent] = (),
        own: CapturedOutput | None = None,
    ) -> None:
        self._log = log
        self._add_event = add_event
        self._step = step
        self._own = own
        first_lines = [event.text for event in events if event.kind == FIRST]
        self._firsts = {kind_of_line(text): text for text in first_lines}
        self._num_repeated = 0
        self._num_news = 0
        self._more: dict[str, int] = {}  # lines that are in no event, by kind
        self._unwritten: dict[tuple[int | None, str], int] = {}  # those of them that are not in the log either

    def add(self, engine: int | None, texts: Sequence[str]) -> None:
        """Add lines that were printed; None stands for the hub."""
        if not texts:
            return
        self._log.append(texts, engine=engine, step=self._step(), when=time.time())
        repeated: list[str] = []
        for text in texts:
            kind = kind_of_line(text)
            if kind in self._firsts:
                repeated.append(text)
            elif len(self._firsts) < MOST_KINDS:
                self._add_repeated(engine, repeated)
                repeated = []
                self._firsts[kind] = text
                self._add_event(Note(FIRST, text, engine))
            else:
                self._more[OTHER_KINDS] = self._more.get(OTHER_KINDS, 0) + 1
        self._add_repeated(engine, repeated)

    def add_own(self) -> None:
        """Add what was printed in the hub since the last call; called in every step."""
        if self._own is not None and (texts := self._own.collect()):
            self.add(None, texts)

    def add_news(self, engine: int, lines: Sequence[str], *, kind: str) -> None:
        """Write an event of what an engine tells of its files or metrics."""
        if lines and self._num_news < MOST_NEWS:
            self._num_news += len(lines)
            self._add_event(Note(kind, "\n".join(lines), engine))

    def count(self, engine: int | None, more: Mapping[str, int]) -> None:
        """Count lines that were not sent, by kind."""
        for kind, number in more.items():
            known = kind if kind in self._firsts else OTHER_KINDS
            self._more[known] = self._more.get(known, 0) + number
            self._unwritten[engine, known] = self._unwritten.get((engine, known), 0) + number

    def tell_counts(self) -> None:
        """Write how many lines there were beyond those that were shown, in one event, and in the log by engine."""
        self.add_own()
        if self._own is not None:
            self.count(None, self._own.take_counts())
        for (engine, kind), number in self._unwritten.items():
            line = f"({write_count(number, self._first_line(kind))})"
            self._log.append([line], engine=engine, step=self._step(), when=time.time())
        self._unwritten = {}
        if self._more:
            more, self._more = self._more, {}
            lines = [write_count(number, self._first_line(kind)) for kind, number in more.items()]
            self._add_event(Note(COUNTED, "\n".join(lines)))

    def close(self) -> None:
        """Let the hub print as before."""
        if self._own is not None:
            self._own.close()

    def _add_repeated(self, engine: int | None, texts: Sequence[str]) -> None:
        shown = texts[: max(MOST_REPEATED - self._num_repeated, 0)]
        self._num_repeated += len(shown)
        for text in texts[len(shown) :]:
            kind = kind_of_line(text)
            self._more[kind] = self._more.get(kind, 0) + 1
        if shown:
            self._add_event(Note(REPEATED, "\n".join(shown), engine))

    def _first_line(self, kind: str) -> str:
        return self._firsts.get(kind, "").partition("\n")[0] if kind else OTHER_KINDS
