import msgspec
import pytest

from dnb.hub.history.run_files import read_timeline
from dnb.hub.history.run_folder import RunFolder
from dnb.hub.history.step_timelines import EngineTrace, Timelines
from dnb.protocol.measurements import Action, StageTrace
from dnb.protocol.run import Partition

PIPELINE = Partition(kind="pipeline", num_engines=2, num_stages=2, cuts=("1",), num_micro_batches=1)


def trace(begin: float, *, computed: float = 1.0, end: float | None = None) -> StageTrace:
    end = begin + 2.0 if end is None else end
    actions = (
        Action("forward", 0, 0, begin, begin + computed),
        Action("wait", 0, 0, begin + computed, end),
    )
    return StageTrace(begin=begin, end=end, cpu_seconds=1.0, num_micro_batches=1, actions=actions, traffic=())


def parts(first: StageTrace, last: StageTrace) -> dict[int, EngineTrace]:
    return {5: EngineTrace(last, 1 << 20, 1, PIPELINE, None), 3: EngineTrace(first, 1 << 20, 0, PIPELINE, 1000)}


def test_all_engines_are_asked_for_the_same_step():
    timelines = Timelines()
    assert [timelines.wants(step, now) for step, now in [(1, 0.0), (1, 9.0), (1, 9.1)]] == [True, True, True]


def test_the_first_steps_are_looked_at_and_then_two_a_second():
    timelines = Timelines()
    asked = [step for step in range(1, 2001) if timelines.wants(step, now=step * 0.0015)]
    assert asked[:3] == [1, 2, 3]
    assert len(asked) == 3 + 5  # 2,000 steps are 3 seconds


def test_times_count_from_whoever_began_first():
    timelines = Timelines()
    timelines.wants(1, 0.0)
    newest = timelines.build(1, parts(trace(100.5), trace(100.0)))
    begins = [(engine.engine, engine.rank, engine.actions[0].begin) for engine in newest.engines]
    assert begins == [(3, 0, 0.5), (5, 1, 0.0)]


def test_the_median_leaves_out_the_very_first_step():
    timelines = Timelines()
    for step, computed in enumerate([0.2, 1.0, 1.5, 2.0], 1):
        timelines.wants(step, step * 10.0)
        timelines.build(step, parts(trace(0.0, computed=computed), trace(0.0, computed=computed)))
    assert timelines.newest is not None
    assert (timelines.newest.num_sampled, timelines.newest.median_bubble) == (3, pytest.approx(0.25))


def test_a_viewer_is_sent_a_timeline_once():
    timelines = Timelines()
    assert timelines.newer_than(0) is None
    timelines.wants(1, 0.0)
    newest = timelines.build(1, parts(trace(0.0), trace(0.0)))
    assert timelines.newer_than(0) == newest
    assert timelines.newer_than(1) is None


def test_a_timeline_is_read_again_from_the_folder_of_its_run(tmp_path):
    timelines = Timelines()
    timelines.wants(1, 0.0)
    newest = timelines.build(1, parts(trace(0.0), trace(0.0)))
    with RunFolder(tmp_path) as folder:
        folder.write_timeline(newest)
    assert read_timeline(tmp_path) == newest


def test_a_folder_without_a_timeline_has_none(tmp_path):
    assert read_timeline(tmp_path) is None


def test_a_timeline_travels_as_a_record():
    timelines = Timelines()
    timelines.wants(1, 0.0)
    newest = timelines.build(1, parts(trace(0.0), trace(0.0)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(newest), type=type(newest)) == newest
