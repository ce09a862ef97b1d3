from __future__ import annotations

from typing import Any

import pytest

from dnb.errors import ArgumentError
from dnb.planning.capacity import check_num_added, check_num_engines, choose_num_threads


@pytest.mark.parametrize(
    ("num_cores", "num_engines", "num_threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 2, 1), (2, 4, 1)]
)
def test_engines_share_the_cores_of_their_host(num_cores: int, num_engines: int, num_threads: int):
    assert choose_num_threads(num_cores, num_engines=num_engines) == num_threads


@pytest.mark.parametrize("num_engines", [0, -1, 2.0, True, "2", None])
def test_a_number_of_engines_that_is_not_a_positive_integer_is_refused(num_engines: Any):
    with pytest.raises(ArgumentError, match=f"n must be an integer of at least 1, not {num_engines!r}"):
        check_num_engines(num_engines, free_bytes=10**12)


def test_more_engines_than_memory_allows_are_refused_with_the_estimate():
    with pytest.raises(ArgumentError, match=r"10 engines need about 3\.3 GB \(0\.3 GB each.*, 2\.0 GB is free"):
        check_num_engines(10, free_bytes=2_000_000_000)


def test_the_refusal_says_how_many_engines_fit():
    with pytest.raises(ArgumentError, match=r"%dtrain start -n 5 fits"):
        check_num_engines(10, free_bytes=2_000_000_000)


def test_as_many_engines_as_are_said_to_fit_do_fit():
    assert check_num_engines(5, free_bytes=2_000_000_000) == 5


def test_without_room_for_one_engine_no_number_is_offered():
    with pytest.raises(ArgumentError, match="free some memory first"):
        check_num_engines(1, free_bytes=100_000_000)


def test_engines_that_just_fit_are_taken():
    assert check_num_engines(2, free_bytes=900_000_000) == 2


@pytest.mark.parametrize("num_engines", [0, -1, 2.0, True, "2", None])
def test_a_number_of_further_engines_that_is_none_is_refused(num_engines: Any):
    with pytest.raises(ArgumentError, match=f"n must be an integer of at least 1, not {num_engines!r}: %dtrain add 1"):
        check_num_added(num_engines, free_bytes=10**12)


def test_further_engines_that_do_not_fit_are_refused_with_the_estimate_and_those_that_fit():
    with pytest.raises(
        ArgumentError, match=r"9 more engines need about 2\.7 GB \(0\.3 GB each\), 2\.0 GB is free: %dtrain add 6 fits"
    ):
        check_num_added(9, free_bytes=2_000_000_000)


def test_as_many_further_engines_as_are_said_to_fit_do_fit():
    assert check_num_added(6, free_bytes=2_000_000_000) == 6


def test_without_room_for_a_further_engine_no_number_is_offered():
    with pytest.raises(ArgumentError, match="free some memory first"):
        check_num_added(1, free_bytes=100_000_000)
