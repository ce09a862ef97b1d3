"""A log that nobody can fill: of lines that come again and again, some are written and the rest are counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dnb.transport.system.failures import clean_text

# Of each kind so many lines are written in this time; then a line says how many more there were.
PERIOD_SECONDS = 60.0
MOST_LINES = 20
# A line is cut after so many letters: what strangers send may be quoted in it.
MOST_LETTERS = 2000

_Kind = tuple[str, int, int]  # file and line of the code that writes it, and the level


@dataclass(slots=True)
class _Count:
    began: float
    num_lines: int
    last: logging.LogRecord


class LogLimit(logging.Filter):
    """Lets few lines of one kind through; a kind is what one place in the code says.

    Args:
        handler: to which it is added, and to which the counts are reported.
        clock: in seconds.
    """

    def __init__(self, handler: logging.Handler, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._handler = handler
        self._clock = clock
        self._lock = threading.RLock()
        self._counts: dict[_Kind, _Count] = {}
        self._next_report = clock() + PERIOD_SECONDS
        handler.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Count a line, and return whether it is written."""
        if getattr(record, "is_count", False):
            return True
        with self._lock:
            self.report_counts()
            kind = (record.pathname, record.lineno, record.levelno)
            count = self._counts.get(kind)
            if count is None:
                count = self._counts[kind] = _Count(self._clock(), 0, record)
            count.num_lines += 1
            count.last = record
            if count.num_lines > MOST_LINES:
                return False
        record.msg, record.args = _message_of(record), ()
        return True

    def report_counts(self) -> None:
        """Report the counts of the kinds whose time is over; also to be called when nothing is written."""
        now = self._clock()
        if now < self._next_report:
            return
        with self._lock:
            for kind, count in list(self._counts.items()):
                if now >= count.began + PERIOD_SECONDS:
                    del self._counts[kind]
                    self._report(count)
            self._next_report = min([count.began for count in self._counts.values()], default=now) + PERIOD_SECONDS

    def close(self) -> None:
        """Report all counts: the log ends."""
        counts, self._counts = self._counts, {}
        for count in counts.values():
            self._report(count)

    def _report(self, count: _Count) -> None:
        num_more = count.num_lines - MOST_LINES
        if num_more <= 0:
            return
        last = count.last
        text = f"... and {num_more:,} more of this kind, the last one: {_message_of(last)}"
        count_record = logging.LogRecord(last.name, last.levelno, last.pathname, last.lineno, text, (), None)
        count_record.is_count = True
        self._handler.handle(count_record)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return clean_text(record.getMessage(), length=MOST_LETTERS)
    except Exception as error:  # noqa: BLE001 - its arguments may raise anything, and the log must not fail
        return f"(its text cannot be had: {type(error).__name__})"


_limits: list[LogLimit] = []


def limit_logs(*loggers: logging.Logger) -> None:
    """Let nobody fill the logs of this process: those of the root, and of loggers that write by themselves."""
    known = {id(limit._handler) for limit in _limits}
    for logger in (logging.getLogger(), *loggers):
        for handler in logger.handlers:
            if id(handler) not in known:
                _limits.append(LogLimit(handler))


def report_log_counts() -> None:
    """Report what was counted, once a minute; for loops."""
    for limit in _limits:
        limit.report_counts()


def close_logs() -> None:
    """Report what was counted, at the end of this process."""
    for limit in _limits:
        limit.close()
