"""Engines that leave on request, and spares, as the coordinator sees them."""

from __future__ import annotations

from dnb.hub.scheduling.events import (
    ActivateSpare,
    Asked,
    Assign,
    Commit,
    Committed,
    EngineJoined,
    EngineLoaded,
    EngineLost,
    MakeSpare,
    Note,
    Release,
    RetireEngine,
    WorkDone,
)
from tests.unit.worded import WordedCoordinator as Coordinator

LEFT_1 = [Note("left", "engine 1 left, as asked", 1), Release(1)]


def loaded(*engines, spares=(), num_shards=4):
    """A coordinator whose engines have all loaded, and what it said to the last of them."""
    coordinator = Coordinator(num_steps=9, num_shards=num_shards, evaluate_every=None, engines=[*engines, *spares])
    for spare in spares:
        coordinator.handle(MakeSpare(spare))
    coordinator.start()
    actions = []
    for engine in (*spares, *engines):
        actions = coordinator.handle(EngineLoaded(engine))
    return coordinator, actions


def assigned(actions):
    return {action.engine: action.shards for action in actions if isinstance(action, Assign)}


def report(coordinator, actions):
    """Let all report what they were given; what was said to the last one."""
    said = []
    for each in [action for action in actions if isinstance(action, Assign)]:
        said = coordinator.handle(WorkDone(each.engine, each.lease, each.kind, each.step, each.shards))
    return said


def kinds(actions):
    return [type(action).__name__ for action in actions]


def test_an_engine_that_is_to_leave_brings_what_it_computes_first():
    coordinator, actions = loaded(0, 1)
    assert coordinator.handle(RetireEngine(1)) == []
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == LEFT_1
    commit = coordinator.handle(WorkDone(0, 1, "step", 1, assigned(actions)[0]))
    assert commit == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_an_engine_that_has_brought_what_it_had_leaves_at_once():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    assert coordinator.handle(RetireEngine(1)) == LEFT_1


def test_an_engine_that_brings_the_last_shards_leaves_with_the_commit():
    coordinator, actions = loaded(0, 1)
    coordinator.handle(RetireEngine(1))
    assert kinds(report(coordinator, actions)) == ["Commit", "Note", "Release"]


def test_an_engine_that_has_left_gets_no_further_step():
    coordinator, actions = loaded(0, 1)
    coordinator.handle(RetireEngine(1))
    report(coordinator, actions)
    assert assigned(coordinator.handle(Committed("step", 1))) == {0: (0, 1, 2, 3)}


def test_an_engine_that_is_to_leave_takes_over_nothing_of_a_lost_one():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(RetireEngine(1))
    assert assigned(coordinator.handle(EngineLost(2, "died"))) == {}
    assert assigned(coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))) == {}
    assert assigned(coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))) == {0: (4, 5)}


def test_an_engine_that_is_loading_leaves_at_once():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    assert coordinator.handle(RetireEngine(1)) == LEFT_1


def test_the_loss_of_an_engine_that_is_to_leave_is_a_loss():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(RetireEngine(1))
    lost = coordinator.handle(EngineLost(1, "died"))
    assert [action.kind for action in lost if isinstance(action, Note)] == ["died", "reassigned"]


def test_the_last_engine_leaves_a_paused_run_that_says_what_to_type():
    coordinator, actions = loaded(1)
    coordinator.handle(RetireEngine(1))
    report(coordinator, actions)
    paused = coordinator.handle(Committed("step", 1))
    assert paused == [Note("paused", "paused after step 1: the last engine left. %dtrain add, then %dtrain resume")]
    assert coordinator.status == "paused"


def test_a_run_that_the_last_engine_left_goes_on_with_the_next_one():
    coordinator, actions = loaded(1)
    coordinator.handle(RetireEngine(1))
    report(coordinator, actions)
    coordinator.handle(Committed("step", 1))
    coordinator.handle(EngineJoined(2))
    coordinator.handle(EngineLoaded(2))
    assert assigned(coordinator.handle(Asked("resume"))) == {2: (0, 1, 2, 3)}


def test_a_run_without_engines_that_is_resumed_pauses_again():
    coordinator, actions = loaded(1)
    coordinator.handle(RetireEngine(1))
    report(coordinator, actions)
    coordinator.handle(Committed("step", 1))
    coordinator.handle(Asked("resume"))
    assert coordinator.status == "paused"


def test_a_spare_loads_the_run_and_gets_no_shards():
    coordinator, actions = loaded(0, spares=[1])
    assert assigned(actions) == {0: (0, 1, 2, 3)}
    assert coordinator.spares == {1}


def test_a_spare_that_is_woken_takes_the_shards_of_a_lost_engine():
    coordinator, _ = loaded(0, spares=[1])
    assert coordinator.handle(ActivateSpare(1)) == [Note("joined", "engine 1, a spare until now, takes part", 1)]
    assert assigned(coordinator.handle(EngineLost(0, "died"))) == {1: (0, 1, 2, 3)}


def test_shards_that_only_spares_could_take_wait_until_one_is_woken():
    coordinator, _ = loaded(0, spares=[1])
    assert assigned(coordinator.handle(EngineLost(0, "died"))) == {}
    assert assigned(coordinator.handle(ActivateSpare(1))) == {1: (0, 1, 2, 3)}


def test_a_spare_that_is_woken_while_it_loads_works_when_it_has_loaded():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(MakeSpare(1))
    assert coordinator.handle(ActivateSpare(1)) == []
    coordinator.handle(EngineLost(0, "died"))
    assert assigned(coordinator.handle(EngineLoaded(1))) == {1: (0, 1, 2, 3)}


def test_a_spare_that_is_woken_while_a_step_is_committed_works_from_the_next():
    coordinator, actions = loaded(0, spares=[1])
    report(coordinator, actions)
    assert assigned(coordinator.handle(ActivateSpare(1))) == {}
    assert assigned(coordinator.handle(Committed("step", 1))) == {0: (0, 1), 1: (2, 3)}


def test_a_run_that_starts_when_only_spares_are_left_waits_for_one_that_is_woken():
    coordinator = Coordinator(num_steps=9, num_shards=4, evaluate_every=None, engines=[0, 1])
    coordinator.handle(MakeSpare(1))
    coordinator.start()
    coordinator.handle(EngineLoaded(1))
    coordinator.handle(EngineLost(0, "died"))
    assert coordinator.status == "starting"
    assert assigned(coordinator.handle(ActivateSpare(1))) == {1: (0, 1, 2, 3)}


def test_a_spare_leaves_at_once():
    coordinator, _ = loaded(0, spares=[1])
    assert coordinator.handle(RetireEngine(1)) == LEFT_1
