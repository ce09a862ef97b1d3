"""Teams of engines, by events and actions."""

from __future__ import annotations

from functools import partial

import pytest

from dnb.hub.scheduling import events as e
from dnb.hub.scheduling.coordinator import Coordinator
from dnb.hub.scheduling.member_watch import ASLEEP_SECONDS, SILENT_SECONDS
from dnb.hub.scheduling.note_words import text_of
from dnb.hub.scheduling.team_formation import GRACE_SECONDS
from dnb.hub.scheduling.teams import Teams
from dnb.protocol.run import Failure, Partition


def pipeline(num_engines):
    cuts = tuple(str(index) for index in range(1, num_engines))
    return Partition(kind="pipeline", num_engines=num_engines, num_stages=num_engines, cuts=cuts)


def tensors(num_engines):
    styles = {"up": "colwise", "down": "rowwise"} if num_engines > 1 else {}
    return Partition(kind="tensor", num_engines=num_engines, styles=styles)


class World:
    """A run of teams whose hub does at once what it is told; engines answer when the test says so."""

    def __init__(self, num_engines, *, largest=4, size=None, num_steps=3, num_shards=1, returning=(), divide=pipeline):
        make = partial(Coordinator, num_steps=num_steps, num_shards=num_shards, evaluate_every=None)
        self.teams = Teams(
            lambda teams: make(engines=teams),
            partitions={number: divide(number) for number in range(1, largest + 1)},
            size=size,
            engines=range(num_engines),
            returning=returning,
        )
        self.now = 0.0
        self.loads: list[int] = []
        self.work: dict[int, e.Assign] = {}
        self.notes: list[e.Note] = []
        self.released: list[int] = []
        self.condemned: list[int] = []
        self.commits: list[e.Commit] = []
        self.num_replaced = 0
        self._perform(self.teams.start())

    def tell(self, event):
        self._perform(self.teams.handle(event, self.now))
        return self

    def load(self):
        """Whoever was told to load has loaded."""
        while self.loads:
            self.tell(e.EngineLoaded(self.loads.pop(0)))
        return self

    def report(self, *engines):
        """These engines, or all who have work, bring it."""
        for engine in engines or sorted(self.work):
            work = self.work.pop(engine)
            samples = 8 if engine == self.teams.owner_of(engine) else 0
            self.tell(e.WorkDone(engine, work.lease, work.kind, work.step, work.shards, samples))
        return self

    def lose(self, engine):
        self.work.pop(engine, None)
        self.loads = [each for each in self.loads if each != engine]
        return self.tell(e.EngineLost(engine, "died"))

    def told(self, kind):
        return [text_of(note) for note in self.notes if note.kind == kind]

    def _perform(self, actions):
        for action in actions:
            match action:
                case e.LoadEngine(engine):
                    self.work.pop(engine, None)
                    self.loads.append(engine)
                case e.Assign(engine):
                    self.work[engine] = action
                case e.Commit(kind, step):
                    self.commits.append(action)
                    self.tell(e.Committed(kind, step))
                case e.Note():
                    self.notes.append(action)
                case e.Release(engine):
                    self.released.append(engine)
                case e.EvictEngine(engine):
                    self.condemned.append(engine)
                case e.Replace(number):
                    self.num_replaced += number


def test_a_step_counts_when_every_member_has_brought_its_part():
    world = World(3).load().report(0, 1)
    assert world.commits == []
    world.report(2)
    assert world.commits[0].reports == ((0, (0,)), (1, (0,)), (2, (0,)))
    assert world.teams.step == 1


def test_members_know_their_ranks_and_write_into_one_slab():
    world = World(3)
    seats = [world.teams.assignment_of(engine) for engine in range(3)]
    assert [rank for _, rank, _ in seats] == [0, 1, 2]
    assert len({team for team, _, _ in seats}) == 1
    assert {world.teams.owner_of(engine) for engine in range(3)} == {2}


def test_a_run_of_one_team_goes_to_its_end():
    world = World(2).load()
    for _ in range(3):
        world.report()
    assert world.teams.status == "finished"


def test_the_others_form_a_smaller_team_when_one_dies_and_do_the_same_step_again():
    world = World(3).load().report()
    world.report(0).lose(1)
    assert world.loads == [0, 2]
    assert world.teams.assignment_of(2)[2].num_engines == 2
    world.load()
    assert {work.step for work in world.work.values()} == {2}
    world.report().report()
    assert world.teams.status == "finished"
    assert [commit.step for commit in world.commits] == [1, 2, 3]
    assert world.told("died") == ["engine 1 died"]


def test_what_a_member_of_a_former_team_brings_does_not_count():
    world = World(3).load()
    old = world.work[0]
    world.lose(1)
    late = e.WorkDone(0, old.lease, old.kind, old.step, old.shards, 8)
    assert not world.teams.expects(late)
    world.tell(late).load()
    assert not world.teams.expects(late)
    assert world.commits == []


def test_an_engine_that_joins_is_taken_in_before_the_next_step():
    world = World(2).load()
    world.tell(e.EngineJoined(7))
    assert world.loads == []
    world.report()
    assert world.loads == [0, 1, 7]
    world.load().report().report()
    assert world.teams.status == "finished"


def test_a_failure_of_one_pauses_the_run_and_the_same_step_is_done_again():
    world = World(2).load().report()
    failure = Failure(kind="ValueError", message="no", traceback="T", place="stage 1")
    lease = world.work[1].lease
    world.tell(e.UserCodeFailed(1, 2, failure, lease))
    world.tell(e.PeerWasLost(0, lease))
    assert world.teams.status == "paused"
    assert "ValueError: no (the pipeline of engines 0, 1: stage 1)" in world.teams.error
    world.load().tell(e.Asked("resume"))
    assert {work.step for work in world.work.values()} == {2}
    world.report().report()
    assert world.teams.status == "finished"


def test_what_all_members_raise_makes_one_new_team():
    world = World(2, divide=tensors).load().report()
    lease = world.work[0].lease
    failure = Failure(kind="ValueError", message="no", traceback="")
    world.tell(e.UserCodeFailed(1, 2, failure, lease)).tell(e.UserCodeFailed(0, 2, failure, lease))
    assert world.teams.status == "paused"
    assert len(world.told("planned")) == 2


def test_a_plan_for_layers_says_what_each_engine_has():
    world = World(2, divide=tensors).load().lose(0)
    assert world.told("planned") == [
        "the tensor team of engines 0, 1: each has 1/2 of 2 layers",
        "engine 1: it has the whole model",
    ]


def test_a_member_that_stands_still_is_ended():
    world = World(3).load().tell(e.EngineSilent(1, "is silent"))
    world.now += SILENT_SECONDS + 0.1
    world.tell(e.Tick())
    assert world.condemned == [1]
    world.lose(1).load().report().report().report()
    assert world.teams.status == "finished"


def test_a_member_that_is_heard_again_goes_on():
    world = World(3).load().tell(e.EngineSilent(1, "is silent")).tell(e.EngineHeard(1))
    world.now += SILENT_SECONDS + 0.1
    world.tell(e.Tick()).report()
    assert world.condemned == []
    assert world.teams.step == 1


def test_a_member_that_loads_may_be_silent_for_longer():
    world = World(3).tell(e.EngineSilent(1, "is silent"))
    world.now += SILENT_SECONDS + 0.1
    assert world.tell(e.Tick()).condemned == []
    world.now += ASLEEP_SECONDS
    assert world.tell(e.Tick()).condemned == [1]


def test_a_team_that_lost_a_connection_but_nobody_is_formed_anew():
    world = World(2).load()
    world.tell(e.PeerWasLost(0, world.work[0].lease)).tell(e.Tick())
    assert world.loads == []
    world.now += GRACE_SECONDS + 0.1
    world.tell(e.Tick())
    assert world.loads == [0, 1]
    world.load().report().report().report()
    assert world.teams.status == "finished"


def test_teams_of_a_given_size_are_data_parallel_and_a_free_engine_takes_a_lost_ones_place():
    world = World(5, size=2, num_shards=2).load()
    assert {world.teams.assignment_of(engine)[0] for engine in range(4)} == {
        world.teams.assignment_of(0)[0],
        world.teams.assignment_of(2)[0],
    }
    assert world.teams.assignment_of(4) is None
    world.report(0, 1).lose(2)
    assert world.loads == [3, 4]
    world.load()
    while world.work:
        world.report()
    assert world.teams.status == "finished"


def test_an_engine_that_leaves_is_released_and_the_others_go_on():
    world = World(3).load().tell(e.RetireEngine(0))
    assert world.released == [0]
    world.load().report().report().report()
    assert world.teams.status == "finished"
    assert world.told("left") == ["engine 0 left, as asked"]


def test_a_run_without_engines_has_failed():
    world = World(1).load().lose(0)
    assert world.teams.status == "failed"
    assert "engine 0 died" in world.teams.error


def test_a_spare_takes_part_when_it_is_woken():
    world = World(2).load().tell(e.MakeSpare(5)).tell(e.EngineJoined(5)).report()
    assert world.teams.assignment_of(5) is None
    world.tell(e.ActivateSpare(5)).lose(0)
    assert world.loads == [1, 5]


@pytest.mark.parametrize("back", [1, 2])
def test_a_run_that_is_taken_over_waits_for_its_engines_but_not_for_ever(back):
    world = World(0, returning=(0, 1))
    for engine in range(back):
        world.tell(e.EngineJoined(engine))
    if back == 1:
        assert world.loads == []
        world.now += 3.0
        world.tell(e.Tick())
    assert world.loads == list(range(back))
    world.load().report().report().report()
    assert world.teams.status == "finished"


def test_engines_that_still_wait_for_each_other_are_freed_when_the_run_ends():
    world = World(3)
    actions = world.teams.handle(e.Asked("stop"), world.now)
    (team,) = {world.teams.assignment_of(engine)[0] for engine in range(3)}
    assert [type(action) for action in actions[-2:]] == [e.Disband, e.End]
    assert actions[-2].team == team


def crash(world, engine):
    world.work.pop(engine, None)
    world.loads = [each for each in world.loads if each != engine]
    world.tell(e.EngineLost(engine, "died by SIGSEGV", is_suspect=True, is_crash=True))


def test_a_second_team_that_loses_a_member_at_the_same_step_pauses_the_run():
    world = World(3).load().report()
    crash(world, 1)
    world.load()
    assert world.teams.status == "running"
    crash(world, 2)
    assert world.teams.status == "paused"
    assert "paused at step 2: engines 1, 2 died by SIGSEGV while both had shard 0;" in world.teams.error
    assert world.num_replaced == 2
    for engine in (3, 4):
        world.tell(e.EngineJoined(engine))
    world.load().tell(e.Asked("resume")).load()
    world.report().load().report()
    assert world.teams.status == "finished"


def test_members_that_crash_at_different_steps_pause_nothing():
    world = World(3).load().report()
    crash(world, 1)
    world.load().report()
    crash(world, 2)
    assert world.load().teams.status == "running"


# members that work but cannot beat


def test_a_busy_member_is_waited_for_and_told_once():
    world = World(3).load()
    for _ in range(2):
        world.tell(e.EngineBusy(1))
        world.now += 20.0
        world.tell(e.Tick()).tell(e.EngineHeard(1))
    assert world.condemned == []
    assert world.told("busy") == ["engine 1 is at work in a call that lets no other thread run, not even its heartbeat"]


def test_a_member_that_sleeps_is_waited_for_longer_than_one_that_was_stopped():
    world = World(3).load().tell(e.EngineSilent(1, "was not heard", is_asleep=True))
    world.now += SILENT_SECONDS + 0.1
    assert world.tell(e.Tick()).condemned == []
    world.now += ASLEEP_SECONDS
    assert world.tell(e.Tick()).condemned == [1]


def test_a_stop_does_not_wait_for_ever_for_a_team_with_a_busy_member():
    world = World(3).load().tell(e.EngineBusy(1)).tell(e.Asked("stop"))
    assert world.teams.status == "running"
    world.now += 6.0
    assert world.tell(e.Tick()).teams.status == "stopped"


def test_a_stop_waits_for_a_team_whose_busy_member_was_heard_again():
    world = World(3).load().tell(e.EngineBusy(1)).tell(e.EngineHeard(1)).tell(e.Asked("stop"))
    world.now += 6.0
    assert world.tell(e.Tick()).teams.status == "running"
