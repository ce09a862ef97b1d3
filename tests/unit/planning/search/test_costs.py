import pytest

from dnb.planning.search.costs import StageCost, Workload, hub_seconds, num_in_flight, pipeline_seconds
from dnb.planning.search.profiles import Exchange, value_at
from dnb.planning.search.schedule_simulation import actions, simulate
from tests.unit.planned import FREE, layer, profile


def stage(forward=1.0, backward=2.0, *, link=0.0):
    return StageCost(forward, backward, link, link, 0.0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 4), (3, 1), (4, 8)])
def test_equal_stages_have_the_bubble_of_the_formula(schedule, num_stages, num_micro_batches):
    costs = [stage()] * num_stages
    simulated = simulate(
        costs, schedule=schedule, num_micro_batches=num_micro_batches, hosts=[["h"] * num_stages], slots={}
    )
    assert simulated.seconds == pytest.approx(3.0 * (num_micro_batches + num_stages - 1))
    expected = (num_stages - 1) / (num_micro_batches + num_stages - 1)
    assert simulated.bubble(num_stages) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_formula_is_what_playing_a_schedule_gives_on_equal_stages(schedule):
    costs = [stage()] * 3
    simulated = simulate(costs, schedule=schedule, num_micro_batches=6, hosts=[["h"] * 3], slots={})
    assert pipeline_seconds(costs, schedule=schedule, num_micro_batches=6) == pytest.approx(simulated.seconds)


def test_stages_that_share_one_core_take_the_time_of_all_their_work():
    simulated = simulate([stage()] * 3, schedule="1f1b", num_micro_batches=4, hosts=[["h"] * 3], slots={"h": 1})
    assert simulated.seconds == pytest.approx(3 * 4 * 3.0)


def test_two_cores_for_three_stages_lie_between_one_and_three():
    seconds = [
        simulate([stage()] * 3, schedule="1f1b", num_micro_batches=6, hosts=[["h"] * 3], slots={"h": cores}).seconds
        for cores in (1, 2, 3)
    ]
    assert seconds[0] > seconds[1] > seconds[2]
    assert seconds[1] >= seconds[0] / 2


def test_teams_that_share_a_host_slow_each_other():
    alone = simulate([stage()] * 2, schedule="1f1b", num_micro_batches=4, hosts=[["h"] * 2], slots={"h": 2})
    both = simulate([stage()] * 2, schedule="1f1b", num_micro_batches=4, hosts=[["h"] * 2] * 2, slots={"h": 2})
    assert both.seconds > alone.seconds


def test_a_link_is_paid_there_and_back():
    costs = [stage(), stage(link=5.0)]
    simulated = simulate(costs, schedule="gpipe", num_micro_batches=1, hosts=[["h", "h"]], slots={})
    assert simulated.seconds == pytest.approx(2 * 3.0 + 2 * 5.0)


def test_1f1b_alternates_after_filling_the_stages_behind():
    assert actions("1f1b", stage=1, num_stages=3, num_micro_batches=3) == [
        ("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2), ("backward", 1), ("backward", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_stage_holds_more_micro_batches_than_the_memory_model_says(schedule, stage):
    held = most = 0
    for what, _ in actions(schedule, stage=stage, num_stages=3, num_micro_batches=5):
        held += 1 if what == "forward" else -1
        most = max(most, held)
    assert most == num_in_flight(schedule, num_behind=2 - stage, num_micro_batches=5)


def test_memory_is_state_and_what_micro_batches_in_flight_keep():
    load = Workload(profile(layer(0), layer(1, kept=20, cut=5), layer(2, cut=3)), 1)
    assert load.memory_bytes(1, 2, num_in_flight=3) == 200 + 3 * (20 + 5) + 3


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(4, 2.0), (8, 3.0), (6, 2.5), (16, 5.0), (32, 9.0), (2, 1.5), (0, 1.0)],
)
def test_a_quantity_at_another_size_lies_on_the_line_through_those_measured(samples, expected):
    assert value_at((2.0, 3.0, 5.0), (4, 8, 16), samples) == pytest.approx(expected)


def test_noise_makes_no_quantity_fall_as_samples_are_added():
    assert value_at((2.0, 1.5), (4, 8), 16) == 2.0


def test_one_size_alone_means_proportion():
    assert value_at((2.0,), (4,), 8) == 4.0


def test_the_hub_adds_every_slab_and_updates_once():
    exchange = Exchange(
        latency_seconds=0, bytes_per_second=1, action_seconds=0, hub_seconds=1.0, message_seconds=0.5,
        sum_seconds_per_byte=0.01, update_seconds_per_byte=0.1, is_measured=True,
    )  # fmt: skip
    seconds = hub_seconds(profile(layer()), exchange, num_slabs=3, num_engines=6, optimizer="adamw")
    assert seconds == pytest.approx(1.0 + 6 * 0.5 + 3 * 100 * 0.01 + 100 * 0.1)


def test_work_without_an_exchange_is_that_of_the_layers():
    load = Workload(profile(layer(0, forward=1.0), layer(1, forward=2.5)), 1)
    assert (load.forward_seconds(0, 2), load.forward_seconds(1, 2)) == (3.5, 2.5)
    assert FREE.action_seconds == 0
