import msgspec
import pytest

from dnb.planning.step_timeline import Timeline, ideal_bubble, measured_bubble
from dnb.protocol.measurements import Action, StageTraffic
from tests.timelines import engine_timeline, gpipe_of_two, step_timeline


@pytest.mark.parametrize(
    ("num_engines", "num_micro_batches", "stages_per_engine", "bubble"),
    [(1, 4, 1, 0.0), (2, 4, 1, 0.2), (4, 1, 1, 0.75), (4, 8, 1, 3 / 11), (4, 8, 2, 3 / 19)],
)
def test_the_formula_is_that_of_the_papers(num_engines, num_micro_batches, stages_per_engine, bubble):
    assert ideal_bubble(num_engines, num_micro_batches, stages_per_engine=stages_per_engine) == pytest.approx(bubble)


def test_equal_stages_without_cost_have_the_bubble_of_the_formula():
    timeline = Timeline(gpipe_of_two(num_micro_batches=4))
    assert timeline.bubble == pytest.approx(timeline.ideal_bubble) == pytest.approx(0.2)


def test_sending_and_waiting_are_no_computing():
    actions = [Action("forward", 0, 0, 0.0, 1.0), Action("send", 0, 0, 1.0, 2.0), Action("wait", 0, 0, 2.0, 4.0)]
    assert measured_bubble([engine_timeline(0, actions)]) == pytest.approx(0.75)


def test_an_engine_that_begins_late_was_idle_until_then():
    early = engine_timeline(0, [Action("forward", 0, 0, 0.0, 4.0)])
    late = engine_timeline(1, [Action("forward", 1, 0, 3.0, 4.0)], rank=1)
    assert measured_bubble([early, late]) == pytest.approx(1 - 5 / 8)


def test_pipelines_beside_each_other_do_not_wait_for_each_other():
    first = engine_timeline(0, [Action("forward", 0, 0, 0.0, 2.0)])
    second = engine_timeline(1, [Action("forward", 0, 0, 5.0, 6.0)], team=1)
    assert measured_bubble([first, second]) == 0.0


def test_a_run_that_is_not_divided_has_an_empty_timeline():
    timeline = Timeline(None)
    assert (len(timeline), timeline.bubble, timeline.ideal_bubble, timeline.seconds) == (0, 0.0, 0.0, 0.0)
    assert not timeline


def test_engines_that_share_cores_had_one_for_a_part_of_their_bars():
    engine = engine_timeline(0, [Action("forward", 0, 0, 0.0, 1.0)])
    shared = msgspec.structs.replace(engine, cpu_seconds=0.6)
    assert Timeline(step_timeline([shared])).core_share == pytest.approx(0.6)


def test_traffic_is_told_by_stage_and_of_one_pipeline():
    passed = StageTraffic(stage=0, forward_bytes=80, backward_bytes=0)
    back = StageTraffic(stage=1, forward_bytes=0, backward_bytes=80)
    actions = [Action("forward", 0, 0, 0.0, 1.0)]
    engines = [
        engine_timeline(3, actions, rank=1, traffic=(back,)),
        engine_timeline(2, actions, traffic=(passed,)),
        engine_timeline(4, actions, team=1, traffic=(passed,)),
    ]
    assert Timeline(step_timeline(engines)).traffic == (passed, back)
