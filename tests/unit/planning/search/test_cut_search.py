"""The dynamic programme over cuts, against every division there is."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.exhaustive import divisions
from dnb.planning.search.costs import Workload
from dnb.planning.search.cut_search import CutSearch, EnginePlace, edges_of
from tests.unit.planned import FREE, exchanges, layer, profile, profiles

places_drawn = st.lists(
    st.builds(EnginePlace, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([None, None, 60, 150, 400])),
    min_size=1,
    max_size=4,
)


@given(
    drawn=profiles(),
    places=places_drawn,
    num_stages=st.integers(1, 4),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
    num_micro_batches=st.integers(1, 6),
    exchange=exchanges(),
)
def test_no_division_is_faster_than_the_one_that_is_found(
    drawn, places, num_stages, schedule, num_micro_batches, exchange
):
    num_stages = min(num_stages, len(places), len(drawn.layers))
    load = Workload(drawn, 1)
    common = {
        "places": places,
        "schedule": schedule,
        "num_micro_batches": num_micro_batches,
        "exchange": exchange,
    }
    found = CutSearch(load, **common).divide(num_stages)
    every = {(cuts, tuple(places[place] for place in chosen)): seconds
             for seconds, cuts, chosen in divisions(load, num_stages=num_stages, **common)}  # fmt: skip
    assert (found is None) == (not every)
    if found is not None:
        own = every[found.cuts, tuple(places[place] for place in found.places)]
        assert own == pytest.approx(min(every.values()), rel=1e-9, abs=1e-9)
        assert found.seconds == pytest.approx(own, rel=1e-9, abs=1e-9)


@given(
    drawn=profiles(),
    places=places_drawn,
    schedule=st.sampled_from(["1f1b", "gpipe"]),
    num_micro_batches=st.integers(1, 6),
    exchange=exchanges(),
)
def test_no_division_beats_its_bound(drawn, places, schedule, num_micro_batches, exchange):
    most = min(len(places), len(drawn.layers))
    divider = CutSearch(
        Workload(drawn, 1), places=places, schedule=schedule, num_micro_batches=num_micro_batches, exchange=exchange
    )
    for num_stages, bound in enumerate(divider.bounds(most), 1):
        found = divider.divide(num_stages)
        assert bound <= (inf if found is None else found.seconds * (1 + 1e-9) + 1e-9)
        assert found is not None or bound == inf


def divide(layers, places, *, num_stages, num_micro_batches=8, schedule="1f1b"):
    return CutSearch(
        Workload(profile(*layers), 1),
        places=places,
        schedule=schedule,
        num_micro_batches=num_micro_batches,
        exchange=FREE,
    ).divide(num_stages)


def test_equal_engines_get_equal_work():
    layers = [layer(number, forward=seconds) for number, seconds in enumerate([1, 1, 4, 1, 1])]
    assert divide(layers, [EnginePlace(1.0, None)] * 3, num_stages=3).cuts == (2, 3)


def test_a_fast_engine_gets_more_layers():
    layers = [layer(number) for number in range(6)]
    found = divide(layers, [EnginePlace(1.0, None), EnginePlace(2.0, None)], num_stages=2)
    of_fast = edges_of(found.cuts, 6)[found.places.index(1)]
    assert of_fast[1] - of_fast[0] == 4


def test_a_small_engine_gets_what_fits():
    layers = [layer(number, parameters=100, kept=0, cut=0) for number in range(4)]  # 200 bytes each with gradients
    found = divide(layers, [EnginePlace(1.0, 200), EnginePlace(1.0, None)], num_stages=2)
    of_small = edges_of(found.cuts, 4)[found.places.index(0)]
    assert of_small[1] - of_small[0] == 1


def test_where_nothing_fits_there_is_no_division():
    assert divide([layer(0), layer(1)], [EnginePlace(1.0, 10)] * 2, num_stages=2) is None


def test_a_tied_parameter_counts_in_every_stage_that_uses_it():
    from dnb.planning.search.profiles import SharedParameter

    tied = SharedParameter(name="tied", parameter_bytes=50, gradient_bytes=50, layers=(0, 2))
    load = Workload(profile(*(layer(number) for number in range(3)), shared=[tied]), 1)
    assert load.state_bytes(0, 3) == 600
    assert [load.state_bytes(0, 1), load.state_bytes(1, 2), load.state_bytes(1, 3)] == [200, 200, 500]


def test_many_different_engines_are_still_divided_over():
    places = [EnginePlace(1.0 + number / 10, None) for number in range(12)]
    found = divide([layer(number) for number in range(12)], places, num_stages=12)
    assert sorted(found.places) == list(range(12))
