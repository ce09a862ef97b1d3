from __future__ import annotations

import pytest

from dnb.hub.scheduling.failures import describe_deaths, describe_exit, is_crash, ranges_text
from dnb.hub.scheduling.task import Death


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "died"),
        (-11, "died by SIGSEGV"),
        (-6, "died by SIGABRT"),
        (-9, "died by SIGKILL, as by the system when memory runs out"),
        (-40, "died by signal 40"),
        (3, "died (exit code 3)"),
        (0, "died (exit code 0)"),
    ],
)
def test_an_end_is_told_by_its_signal_or_code(code: int | None, text: str):
    assert describe_exit(code) == text


def test_who_was_killed_on_purpose_had_memory_enough():
    assert describe_exit(-9, is_wanted=True) == "died by SIGKILL"


@pytest.mark.parametrize(
    ("code", "crashed"), [(None, False), (-9, False), (-15, False), (-2, False), (-11, True), (-7, True), (0, True)]
)
def test_a_crash_is_what_nobody_else_can_have_done(code: int | None, crashed: bool):
    assert is_crash(code) is crashed


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([7], "7"),
        ([3, 4, 5, 9], "3 to 5, 9"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 and 8 more"),
    ],
)
def test_neighbours_are_told_as_a_range_and_many_numbers_not_all(numbers: list[int], text: str):
    assert ranges_text(numbers) == text


def test_only_shards_that_all_had_are_told():
    deaths = [Death(2, "died by SIGSEGV", frozenset({4, 5, 6})), Death(0, "died (exit code 1)", frozenset({3, 4, 6}))]
    assert describe_deaths(deaths, "samples 8 to 11") == (
        "engine 2 died by SIGSEGV and engine 0 died (exit code 1) while both had shards 4, 6: samples 8 to 11"
    )
