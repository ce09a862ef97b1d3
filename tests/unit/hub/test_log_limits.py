from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from dnb.hub import log_limits
from dnb.hub.log_limits import MOST_LINES, LogLimit, close_logs, limit_logs


class Log:
    """A log in memory that is limited, and a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.stream = io.StringIO()
        handler = logging.StreamHandler(self.stream)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.limit = LogLimit(handler, clock=lambda: self.now)
        self.logger = logging.Logger("test")  # none that others know
        self.logger.addHandler(handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def knock(self, number: int, *, begin: int = 0) -> None:
        for caller in range(begin, begin + number):
            self.logger.warning("a stranger called: %d", caller)


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_few_lines_of_a_kind_are_written_as_they_are(log: Log):
    log.knock(3)
    assert log.lines == [f"WARNING a stranger called: {caller}" for caller in range(3)]


def test_what_comes_again_and_again_is_not_written(log: Log):
    log.knock(10_000)
    assert len(log.lines) == MOST_LINES


def test_what_was_not_written_is_counted_and_told_after_a_minute(log: Log):
    log.knock(3_432)
    log.now += 60
    log.limit.report_counts()
    assert log.lines[MOST_LINES:] == [
        "WARNING ... and 3,412 more of this kind, the last one: a stranger called: 3431",
    ]


def test_it_is_told_once(log: Log):
    log.knock(MOST_LINES + 1)
    for _ in range(5):
        log.now += 60
        log.limit.report_counts()
    assert len(log.lines) == MOST_LINES + 1


def test_it_is_told_by_the_next_line_where_nobody_looks(log: Log):
    log.knock(MOST_LINES + 5)
    log.now += 61
    log.logger.error("something else")
    assert log.lines[-2:] == [
        f"WARNING ... and 5 more of this kind, the last one: a stranger called: {MOST_LINES + 4}",
        "ERROR something else",
    ]


def test_nothing_is_told_of_a_kind_that_was_written_whole(log: Log):
    log.knock(MOST_LINES)
    log.now += 60
    log.limit.report_counts()
    assert len(log.lines) == MOST_LINES


def test_a_new_minute_has_new_lines(log: Log):
    log.knock(MOST_LINES + 5)
    log.now += 60
    log.knock(2, begin=777)
    assert log.lines[-2:] == ["WARNING a stranger called: 777", "WARNING a stranger called: 778"]


def test_a_flood_of_one_kind_hides_no_line_of_another(log: Log):
    log.knock(10_000)
    log.logger.warning("the disk is full")
    assert log.lines[-1] == "WARNING the disk is full"


def test_a_kind_is_the_place_in_the_code_whatever_the_words_are(log: Log):
    for number in range(1000):
        log.logger.warning(f"an f-string with {number}")
    assert len(log.lines) == MOST_LINES


def test_a_day_of_knocking_makes_no_more_than_some_lines_a_minute(log: Log):
    for minute in range(24 * 60):
        log.now = 100.0 + 60 * minute
        log.knock(50)
        log.limit.report_counts()
    assert len(log.lines) <= 24 * 60 * (MOST_LINES + 1)


def test_a_line_is_cut_however_much_it_quotes(log: Log):
    log.logger.warning("a stranger said %s", "x" * 1_000_000)
    assert len(log.stream.getvalue()) < 3000


def test_a_line_that_cannot_be_put_into_words_is_told_as_such(log: Log):
    log.logger.warning("%d strangers", "many")
    assert log.lines == ["WARNING (its text cannot be had: TypeError)"]


def test_at_the_end_all_is_told(log: Log):
    log.knock(MOST_LINES + 1)
    log.limit.close()
    assert log.lines[-1].startswith("WARNING ... and 1 more of this kind")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.setattr(log_limits, "_limits", [])
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    yield stream
    for limit in log_limits._limits:
        limit._handler.removeFilter(limit)
    logging.getLogger().removeHandler(handler)


def test_loggers_that_hand_their_lines_up_are_limited_by_the_root_and_no_handler_twice(root: io.StringIO):
    limit_logs()
    limit_logs(logging.getLogger())
    for number in range(100):
        logging.getLogger("dnb.test").warning("again %d", number)
    close_logs()
    assert len(root.getvalue().splitlines()) == MOST_LINES + 1
