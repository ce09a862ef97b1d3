from __future__ import annotations

from dataclasses import dataclass

import pytest

from dnb.errors import ArgumentError
from dnb.hub.server.members.roster import becomes_spare, check_retirement, choose_successor, lacks_workers


@dataclass
class Engine:
    is_spare: bool = False
    is_retiring: bool = False


WORKER, SPARE, LEAVING = Engine(), Engine(is_spare=True), Engine(is_retiring=True)


@pytest.mark.parametrize(
    ("others", "wanted", "rests"),
    [
        ([], 1, False),  # somebody has to work
        ([WORKER], 0, False),
        ([WORKER], 1, True),
        ([WORKER, SPARE], 1, False),
        ([WORKER, SPARE], 2, True),
        ([SPARE], 2, False),
        ([LEAVING], 1, False),
        ([WORKER, Engine(is_spare=True, is_retiring=True)], 1, True),
    ],
)
def test_a_newcomer_rests_if_spares_are_missing_and_somebody_works(others, wanted, rests):
    assert becomes_spare(others, wanted=wanted) is rests


def test_the_oldest_spare_takes_over():
    assert choose_successor({0: WORKER, 4: SPARE, 2: SPARE}) == 2


def test_without_a_spare_nobody_takes_over():
    assert choose_successor({0: WORKER, 1: LEAVING}) is None


def test_a_spare_that_leaves_takes_nothing_over():
    assert choose_successor({0: WORKER, 1: Engine(is_spare=True, is_retiring=True)}) is None


@pytest.mark.parametrize(("engines", "lacks"), [([WORKER, SPARE], False), ([SPARE], True), ([LEAVING, SPARE], True)])
def test_workers_are_those_that_neither_rest_nor_leave(engines, lacks):
    assert lacks_workers(dict(enumerate(engines))) is lacks


def test_an_unknown_engine_cannot_leave_and_the_known_ones_are_named():
    with pytest.raises(ArgumentError, match="no engine 7: there are 0, 3"):
        check_retirement([3, 7], {0: WORKER, 3: WORKER}, active_run=None, force=False)


def test_the_last_engine_of_an_active_run_is_kept_and_the_refusal_says_how_to_insist():
    with pytest.raises(ArgumentError, match=r"run 'digits' is active, .*pause the run.*%dtrain remove 0,1 --force"):
        check_retirement([0, 1], {0: WORKER, 1: WORKER, 2: LEAVING}, active_run="digits", force=False)


@pytest.mark.parametrize(("active_run", "force"), [("digits", True), (None, False)])
def test_the_last_engine_may_leave_by_force_or_without_a_run(active_run, force):
    assert check_retirement([0], {0: WORKER}, active_run=active_run, force=force) == (0,)


def test_all_that_work_may_leave_if_a_spare_goes_on():
    assert check_retirement([0], {0: WORKER, 1: SPARE}, active_run="digits", force=False) == (0,)


def test_an_engine_that_is_named_twice_leaves_once():
    assert check_retirement([1, 1], {0: WORKER, 1: WORKER}, active_run="digits", force=False) == (1,)
