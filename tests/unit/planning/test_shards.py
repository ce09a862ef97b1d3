from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnb.planning.shards import (
    choose_exact_shards,
    choose_num_shards,
    deal_by_speed,
    deal_shards,
    shard_bounds,
    split_evenly,
)

NUM_SAMPLES = st.integers(0, 10_000)
NUM_SHARDS = st.integers(1, 200)


@pytest.mark.parametrize(
    ("num_engines", "num_shards"), [(1, 48), (2, 48), (3, 48), (4, 48), (5, 50), (7, 49), (12, 48), (64, 64)]
)
def test_the_default_is_the_first_multiple_of_the_engines_from_48_on(num_engines: int, num_shards: int):
    assert choose_num_shards(num_engines, batch_size=256) == num_shards


def test_the_default_is_never_more_than_the_samples_of_a_batch():
    assert choose_num_shards(2, batch_size=5) == 5


@pytest.mark.parametrize(
    ("num_engines", "num_shards"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 32)]
)
def test_an_exact_run_has_4_shards_or_the_next_power_of_two(num_engines: int, num_shards: int):
    assert choose_exact_shards(num_engines, batch_size=64) == num_shards


def test_the_default_of_an_exact_run_is_never_more_than_the_samples_of_a_batch():
    assert choose_exact_shards(8, batch_size=3) == 3


@given(st.integers(1, 100), NUM_SHARDS)
def test_an_exact_run_has_a_shard_for_every_engine_or_for_every_sample(num_engines: int, batch_size: int):
    assert min(num_engines, batch_size) <= choose_exact_shards(num_engines, batch_size=batch_size) <= batch_size


def test_shards_are_cut_where_integer_division_says():
    assert shard_bounds(10, num_shards=4) == [(0, 2), (2, 5), (5, 7), (7, 10)]


def test_too_few_samples_for_all_shards_leave_some_of_them_empty():
    assert shard_bounds(5, num_shards=4) == [(0, 0), (0, 2), (2, 2), (2, 5)]


def test_a_batch_of_two_samples_is_not_cut():
    assert [bound for bound in shard_bounds(2, num_shards=48) if bound[0] < bound[1]] == [(0, 2)]


def test_a_batch_of_one_sample_has_one_shard():
    assert [bound for bound in shard_bounds(1, num_shards=48) if bound[0] < bound[1]] == [(0, 1)]


@given(st.integers(2, 10_000), NUM_SHARDS)
def test_no_shard_has_one_sample_where_the_batch_has_more(num_samples: int, num_shards: int):
    assert 1 not in {last - first for first, last in shard_bounds(num_samples, num_shards=num_shards)}


@given(st.integers(2, 10_000), st.integers(2, 16))
def test_a_short_batch_is_shared_by_as_many_engines_as_can_have_two_samples(num_samples: int, num_engines: int):
    bounds = shard_bounds(num_samples, num_shards=48)
    parts = deal_shards(range(48), range(num_engines)).values()
    sizes = [bounds[part[-1]][1] - bounds[part[0]][0] for part in parts]
    assert sum(size > 0 for size in sizes) >= min(num_engines, num_samples // 2, len(parts))


def test_things_are_split_evenly_and_some_parts_may_be_empty():
    assert split_evenly(2, num_parts=4) == [(0, 0), (0, 1), (1, 1), (1, 2)]


@given(NUM_SAMPLES, NUM_SHARDS)
def test_there_are_as_many_shards_as_asked_for(num_samples: int, num_shards: int):
    assert len(shard_bounds(num_samples, num_shards=num_shards)) == num_shards


@given(NUM_SAMPLES, NUM_SHARDS)
def test_shards_cover_every_sample_once_and_in_order(num_samples: int, num_shards: int):
    bounds = shard_bounds(num_samples, num_shards=num_shards)
    assert [sample for first, last in bounds for sample in range(first, last)] == list(range(num_samples))


@given(NUM_SAMPLES, NUM_SHARDS)
def test_sizes_of_shards_that_are_not_empty_differ_by_at_most_one(num_samples: int, num_shards: int):
    sizes = [last - first for first, last in shard_bounds(num_samples, num_shards=num_shards) if last > first]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_every_engine_is_dealt_neighbours():
    assert deal_shards(range(6), [0, 2, 5]) == {0: (0, 1), 2: (2, 3), 5: (4, 5)}


def test_an_engine_that_gets_no_shard_is_left_out():
    assert deal_shards([7], [0, 1]) == {1: (7,)}


def test_no_shards_are_dealt_to_nobody():
    assert deal_shards([], [0, 1]) == {}


SHARDS = st.lists(st.integers(0, 100), unique=True).map(sorted)
ENGINES = st.lists(st.integers(0, 50), min_size=1, max_size=20, unique=True).map(sorted)


@given(SHARDS, ENGINES)
def test_every_shard_is_dealt_exactly_once(shards: list[int], engines: list[int]):
    assert [shard for part in deal_shards(shards, engines).values() for shard in part] == shards


@given(SHARDS, ENGINES)
def test_shares_of_engines_differ_by_at_most_one(shards: list[int], engines: list[int]):
    parts = deal_shards(shards, engines)
    sizes = [len(parts.get(engine, ())) for engine in engines]
    assert max(sizes) - min(sizes) <= 1


@given(SHARDS, ENGINES)
def test_shards_are_dealt_to_known_engines_only(shards: list[int], engines: list[int]):
    assert set(deal_shards(shards, engines)) <= set(engines)


def test_shares_follow_the_speeds():
    assert deal_by_speed(range(9), {0: 1.0, 1: 2.0, 2: 1.0}) == {0: (0, 1, 2, 3), 1: (4,), 2: (5, 6, 7, 8)}


def test_a_slow_engine_that_can_take_one_shard_in_time_gets_one():
    assert deal_by_speed(range(4), {0: 1.0, 1: 3.0}) == {0: (0, 1, 2), 1: (3,)}


def test_an_engine_that_would_make_the_step_longer_gets_none():
    assert deal_by_speed(range(4), {0: 1.0, 1: 4.1}) == {0: (0, 1, 2, 3)}


def test_an_engine_that_is_still_at_work_gets_what_it_can_do_in_the_time_that_is_left():
    assert deal_by_speed(range(6), {0: 1.0, 1: 1.0}, delays={1: 2.0}) == {0: (0, 1, 2, 3), 1: (4, 5)}


SPEEDS = st.dictionaries(st.integers(0, 9), st.floats(0.01, 10.0), min_size=1)


@given(SHARDS, SPEEDS)
def test_every_shard_is_dealt_exactly_once_whatever_the_speeds(shards: list[int], seconds: dict[int, float]):
    assert [shard for part in deal_by_speed(shards, seconds).values() for shard in part] == shards


@given(st.integers(1, 60), SPEEDS)
def test_no_shard_could_be_moved_to_an_engine_that_would_be_done_earlier(num_shards: int, seconds: dict[int, float]):
    parts = deal_by_speed(range(num_shards), seconds)
    longest = max(len(part) * seconds[engine] for engine, part in parts.items())
    assert all((len(parts.get(engine, ())) + 1) * cost >= longest * (1 - 1e-9) for engine, cost in seconds.items())


@pytest.mark.parametrize("num_engines", [2, 3, 4, 5, 6, 8])
def test_the_default_is_fine_enough_for_an_engine_slowed_4_times(num_engines: int):
    seconds = {0: 4.0, **dict.fromkeys(range(1, num_engines), 1.0)}
    num_shards = choose_num_shards(num_engines, batch_size=256)
    parts = deal_by_speed(range(num_shards), seconds)
    longest = max(len(part) * seconds[engine] for engine, part in parts.items())
    assert num_shards / longest >= 0.9 * sum(1 / cost for cost in seconds.values())
