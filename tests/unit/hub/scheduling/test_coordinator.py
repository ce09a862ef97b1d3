from __future__ import annotations

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from dnb.hub.scheduling.events import (
    Action,
    Asked,
    Assign,
    Commit,
    CommitDeferred,
    CommitFailed,
    CommitRefused,
    Committed,
    End,
    EngineBusy,
    EngineEnding,
    EngineHeard,
    EngineJoined,
    EngineLoaded,
    EngineLost,
    EngineSilent,
    Event,
    LeaseDeclined,
    LoadEngine,
    Note,
    Release,
    Replace,
    RetireEngine,
    Tick,
    UserCodeFailed,
    WorkDone,
)
from dnb.hub.scheduling.failures import describe_causes
from dnb.hub.scheduling.note_words import text_of
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import Failure
from tests.unit.worded import WordedCoordinator as Coordinator

INDEX_ERROR = Failure(kind="IndexError", message="Target 12 is out of bounds.", traceback="Traceback: line 7")


def of_kind(actions: Iterable[Action], *kinds: type) -> list[Action]:
    return [action for action in actions if isinstance(action, kinds)]


def work(actions: Iterable[Action]) -> list[Action]:
    """What the engines and the master copy are told; notes left out."""
    return [action for action in actions if not isinstance(action, Note)]


def notes(actions: Iterable[Action]) -> list[str]:
    return [text_of(action) for action in actions if isinstance(action, Note)]


def loaded(
    *engines: int, num_steps: int = 3, num_shards: int = 4, evaluate_every: int | None = None
) -> tuple[Coordinator, list[Action]]:
    """A coordinator whose engines have all loaded, and what it said to the last of them."""
    coordinator = Coordinator(
        num_steps=num_steps, num_shards=num_shards, evaluate_every=evaluate_every, engines=engines
    )
    coordinator.start()
    actions: list[Action] = []
    for engine in engines:
        actions = coordinator.handle(EngineLoaded(engine))
    return coordinator, actions


def report(coordinator: Coordinator, *assigned: Assign) -> list[Action]:
    """Let engines report exactly what they were given; what was said to the last one."""
    actions: list[Action] = []
    for each in assigned:
        actions = coordinator.handle(WorkDone(each.engine, each.lease, each.kind, each.step, each.shards))
    return actions


def one_step(coordinator: Coordinator, actions: list[Action]) -> list[Action]:
    """Report all that was assigned and commit it."""
    commit = of_kind(report(coordinator, *of_kind(actions, Assign)), Commit)[0]
    return coordinator.handle(Committed(commit.kind, commit.step))


# starting ------------------------------------------------------------------------------------


def test_start_sends_the_run_to_every_engine():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[3, 1])
    assert coordinator.start() == [LoadEngine(1), LoadEngine(3)]


def test_no_shard_is_assigned_before_all_engines_have_loaded():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    assert coordinator.handle(EngineLoaded(1)) == [Note("joined", "engine 1 joined", 1)]


def test_the_status_is_starting_until_all_engines_have_loaded():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(1))
    assert coordinator.status == "starting"


def test_the_last_engine_to_load_opens_the_first_step():
    _, actions = loaded(0, 1)
    assert actions == [
        Note("joined", "engine 1 joined", 1),
        Note("running", "2 engines, 4 shards"),
        Assign(0, "step", 1, (0, 1), fresh=True, lease=1),
        Assign(1, "step", 1, (2, 3), fresh=True, lease=2),
    ]


def test_an_engine_lost_while_loading_does_not_hold_up_the_start():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(0))
    assert work(coordinator.handle(EngineLost(1, "died"))) == [Assign(0, "step", 1, (0, 1), fresh=True, lease=1)]


def test_an_engine_that_loads_twice_is_counted_once():
    coordinator, _ = loaded(0)
    assert coordinator.handle(EngineLoaded(0)) == []


def test_more_engines_than_shards_leaves_some_without_work():
    _, actions = loaded(0, 1, 2, num_shards=2)
    assert [action.shards for action in of_kind(actions, Assign)] == [(0,), (1,)]


# steps ---------------------------------------------------------------------------------------


def test_a_step_is_not_committed_while_a_shard_is_open():
    coordinator, _ = loaded(0, 1)
    assert coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))) == []


def test_a_step_is_committed_when_every_shard_is_reported():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    assert coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_a_committed_step_opens_the_next():
    coordinator, actions = loaded(0, 1)
    assert one_step(coordinator, actions) == [
        Assign(0, "step", 2, (0, 1), fresh=True, lease=3),
        Assign(1, "step", 2, (2, 3), fresh=True, lease=4),
    ]


def test_no_lease_bears_a_number_twice():
    coordinator, actions = loaded(0, 1)
    numbers = []
    while coordinator.status == "running":
        numbers += [action.lease for action in of_kind(actions, Assign)]
        actions = one_step(coordinator, actions)
    assert numbers == [1, 2, 3, 4, 5, 6]


def test_the_step_counts_only_what_is_committed():
    coordinator, actions = loaded(0)
    report(coordinator, *of_kind(actions, Assign))
    assert coordinator.step == 0


def test_the_last_committed_step_finishes_the_run():
    coordinator, actions = loaded(0, num_steps=1)
    assert one_step(coordinator, actions) == [
        Note("finished", "finished after step 1 of 1"),
        End("finished"),
    ]


def test_engines_with_an_open_lease_are_working():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    assert coordinator.working == {1}


def test_nobody_is_working_when_the_run_has_ended():
    coordinator, actions = loaded(0, num_steps=1)
    one_step(coordinator, actions)
    assert coordinator.working == frozenset()


# reports that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "stray",
    [
        pytest.param(WorkDone(0, 1, "step", 1, (0, 1)), id="repeated"),
        pytest.param(WorkDone(1, 1, "step", 1, (2, 3)), id="of another lease"),
        pytest.param(WorkDone(1, 0, "step", 1, (2, 3)), id="of no lease"),
        pytest.param(WorkDone(1, 2, "step", 0, (2, 3)), id="of an earlier step"),
        pytest.param(WorkDone(1, 2, "step", 2, (2, 3)), id="of a later step"),
        pytest.param(WorkDone(1, 2, "evaluation", 1, (2, 3)), id="of another kind"),
        pytest.param(WorkDone(0, 1, "step", 1, (2, 3)), id="of shards of another engine"),
        pytest.param(WorkDone(7, 8, "step", 1, (2, 3)), id="of an unknown engine"),
        pytest.param(WorkDone(1, 2, "step", 1, ()), id="of nothing"),
        pytest.param(WorkDone(1, 2, "step", 1, (3, 4)), id="of a shard that there is not"),
        pytest.param(WorkDone(1, 2, "step", 1, (2, 2, 3)), id="of the same shard twice"),
    ],
)
def test_a_report_that_fits_no_open_lease_changes_nothing(stray: WorkDone):
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    coordinator.handle(stray)
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_a_report_repeated_while_the_step_is_committed_changes_nothing():
    coordinator, actions = loaded(0)
    report(coordinator, *of_kind(actions, Assign))
    assert report(coordinator, *of_kind(actions, Assign)) == []


def test_a_commit_that_was_not_asked_for_changes_nothing():
    coordinator, _ = loaded(0)
    assert coordinator.handle(Committed("step", 1)) == []
    assert coordinator.step == 0


def test_a_refusal_that_was_not_asked_for_changes_nothing():
    coordinator, _ = loaded(0)
    assert coordinator.handle(CommitRefused(1, "the loss is nan")) == []


# losses --------------------------------------------------------------------------------------


def test_shards_of_a_lost_engine_are_left_to_others_and_the_note_says_so():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    assert coordinator.handle(EngineLost(1, "died")) == [
        Note("died", "engine 1 died", 1),
        Note("reassigned", "2 shards of engine 1 go to others", 1),
    ]


def test_survivors_share_the_shards_of_a_lost_engine_each_when_it_has_answered():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))) == [Assign(0, "step", 1, (2,), fresh=False, lease=4)]
    assert coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5))) == [Assign(2, "step", 1, (3,), fresh=False, lease=5)]


def test_a_survivor_that_is_idle_gets_its_part_at_once():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    assert work(coordinator.handle(EngineLost(1, "died"))) == [Assign(0, "step", 1, (2,), fresh=False, lease=4)]


def test_an_engine_holds_one_lease_at_a_time():
    coordinator, _ = loaded(0, 1)
    assert work(coordinator.handle(EngineLost(1, "died"))) == []
    assert coordinator.working == {0}


def test_a_step_with_a_lost_engine_counts_each_shard_once():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(EngineLost(1, "died"))
    again = [
        *coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))),
        *coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5))),
    ]
    assert report(coordinator, *of_kind(again, Assign)) == [
        Commit("step", 1, ((0, (0, 1)), (0, (2,)), (2, (3,)), (2, (4, 5))))
    ]


def test_a_late_report_of_a_lost_engine_changes_nothing():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == []
    assert coordinator.working == {0}


def test_an_engine_that_dies_after_reporting_all_it_had_still_counts():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    assert coordinator.handle(EngineLost(1, "died")) == [Note("died", "engine 1 died", 1)]
    assert coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def lost_twice() -> tuple[Coordinator, list[Action]]:
    """Engine 1 dies, engine 0 dies while it redoes a part of that; what was said then."""
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    coordinator.handle(EngineLost(1, "died"))  # shard 2 to engine 0, shard 3 is left for engine 2
    return coordinator, coordinator.handle(EngineLost(0, "died"))


def test_what_a_lost_engine_had_reported_is_redone_if_it_was_at_work_again():
    coordinator, actions = lost_twice()
    assert actions == [
        Note("died", "engine 0 died", 0),
        Note("reassigned", "3 shards of engine 0 go to others", 0),
    ]
    assert coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5))) == [
        Assign(2, "step", 1, (0, 1, 2, 3), fresh=False, lease=5)
    ]


def test_a_redone_report_counts_once_in_the_commit():
    coordinator, _ = lost_twice()
    (again,) = coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5)))
    assert report(coordinator, again) == [Commit("step", 1, ((2, (0, 1, 2, 3)), (2, (4, 5))))]


def test_a_loss_while_the_step_is_committed_redoes_nothing():
    coordinator, actions = loaded(0, 1)
    report(coordinator, *of_kind(actions, Assign))
    assert work(coordinator.handle(EngineLost(1, "died"))) == []
    assert coordinator.handle(Committed("step", 1)) == [Assign(0, "step", 2, (0, 1, 2, 3), fresh=True, lease=3)]


def test_a_loss_while_paused_assigns_nothing():
    coordinator, actions = loaded(0, 1)
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    assert work(coordinator.handle(EngineLost(1, "died"))) == []


def test_the_loss_of_a_stranger_changes_nothing():
    coordinator, _ = loaded(0)
    assert coordinator.handle(EngineLost(9, "died")) == []


def test_the_loss_of_the_last_engine_fails_the_run():
    coordinator, _ = loaded(0)
    text = "no engine is left at step 0: engine 0 died"
    assert coordinator.handle(EngineLost(0, "died")) == [
        Note("died", "engine 0 died", 0),
        Note("failed", text),
        End("failed", text),
    ]


def test_shards_without_a_ready_engine_wait_for_the_one_that_is_loading():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    assert work(coordinator.handle(EngineLost(0, "died"))) == []
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 1, (0, 1, 2, 3), fresh=True, lease=2)]


def test_a_step_that_opens_while_no_engine_is_ready_waits_for_the_one_that_is_loading():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    report(coordinator, *of_kind(actions, Assign))
    coordinator.handle(EngineLost(0, "died"))
    coordinator.handle(Committed("step", 1))
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 2, (0, 1, 2, 3), fresh=True, lease=2)]


def test_a_resume_while_no_engine_is_ready_waits_for_the_one_that_is_loading():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    coordinator.handle(EngineLost(0, "died"))
    coordinator.handle(Asked("resume"))
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 2, (0, 1, 2, 3), fresh=True, lease=2)]


def test_a_step_with_shards_that_nobody_holds_is_not_committed():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineJoined(2))
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    coordinator.handle(EngineLost(1, "died"))
    coordinator.handle(EngineLost(0, "died"))
    assert work(coordinator.handle(EngineLoaded(2))) == [Assign(2, "step", 1, (0, 1), fresh=True, lease=3)]


def test_an_engine_that_comes_back_in_the_same_step_starts_from_a_zeroed_slab():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineLost(0, "died"))  # in the middle of shards 0 to 3: its slab is torn
    coordinator.handle(EngineJoined(0))
    coordinator.handle(EngineLost(1, "died"))
    assert work(coordinator.handle(EngineLoaded(0))) == [Assign(0, "step", 1, (0, 1, 2, 3), fresh=True, lease=2)]


# joining ---------------------------------------------------------------------------------------


def test_a_joiner_is_sent_the_run():
    coordinator, _ = loaded(0)
    assert coordinator.handle(EngineJoined(1)) == [LoadEngine(1)]


def test_a_joiner_that_is_known_is_not_sent_the_run_again():
    coordinator, _ = loaded(0)
    assert coordinator.handle(EngineJoined(0)) == []


def test_a_joiner_gets_nothing_of_the_step_under_way():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    assert coordinator.handle(EngineLoaded(1)) == [Note("joined", "engine 1 joined", 1)]


def test_a_joiner_works_from_the_next_step():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineLoaded(1))
    assert one_step(coordinator, actions) == [
        Assign(0, "step", 2, (0, 1), fresh=True, lease=2),
        Assign(1, "step", 2, (2, 3), fresh=True, lease=3),
    ]


# evaluation ------------------------------------------------------------------------------------


def kinds_of_a_whole_run(*, num_steps: int, evaluate_every: int | None) -> list[tuple[WorkKind, int]]:
    coordinator, actions = loaded(0, 1, num_steps=num_steps, evaluate_every=evaluate_every)
    seen = []
    while coordinator.status == "running":
        assigned = of_kind(actions, Assign)
        seen.append((assigned[0].kind, assigned[0].step))
        actions = one_step(coordinator, actions)
    return seen


def test_an_evaluation_follows_every_epoch_and_the_last_step():
    assert kinds_of_a_whole_run(num_steps=5, evaluate_every=2) == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
        ("step", 5),
        ("evaluation", 5),
    ]


def test_an_epoch_that_ends_with_the_run_is_evaluated_once():
    assert kinds_of_a_whole_run(num_steps=2, evaluate_every=2) == [("step", 1), ("step", 2), ("evaluation", 2)]


def test_without_validation_data_nothing_is_evaluated():
    assert kinds_of_a_whole_run(num_steps=2, evaluate_every=None) == [("step", 1), ("step", 2)]


def test_shards_of_an_evaluation_are_redone_like_those_of_a_step():
    coordinator, actions = loaded(0, 1, num_steps=1, evaluate_every=1)
    _, second = one_step(coordinator, actions)
    coordinator.handle(EngineLost(0, "died"))
    assert report(coordinator, second) == [Assign(1, "evaluation", 1, (0, 1), fresh=False, lease=5)]


def test_a_committed_evaluation_does_not_count_as_a_step():
    coordinator, actions = loaded(0, num_steps=2, evaluate_every=1)
    one_step(coordinator, one_step(coordinator, actions))
    assert coordinator.step == 1


# pause, resume, stop -----------------------------------------------------------------------------


def test_a_pause_lets_the_step_under_way_finish():
    coordinator, actions = loaded(0)
    assert coordinator.handle(Asked("pause")) == []
    assert one_step(coordinator, actions) == [Note("paused", "paused after step 1, as asked")]


def test_a_paused_run_has_no_error_if_the_user_asked_for_it():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    assert (coordinator.status, coordinator.error) == ("paused", "")


def test_a_pause_at_the_end_of_an_epoch_comes_after_the_evaluation():
    coordinator, actions = loaded(0, evaluate_every=1)
    coordinator.handle(Asked("pause"))
    assert one_step(coordinator, actions) == [Assign(0, "evaluation", 1, (0, 1, 2, 3), fresh=True, lease=2)]


def test_a_pause_in_the_last_step_does_not_keep_the_run_from_finishing():
    coordinator, actions = loaded(0, num_steps=1)
    coordinator.handle(Asked("pause"))
    assert of_kind(one_step(coordinator, actions), End) == [End("finished")]


def test_a_pause_while_starting_pauses_before_the_first_step():
    coordinator = Coordinator(num_steps=1, num_shards=1, evaluate_every=None, engines=[0])
    coordinator.start()
    coordinator.handle(Asked("pause"))
    assert work(coordinator.handle(EngineLoaded(0))) == []
    assert coordinator.status == "paused"


def test_resume_goes_on_with_the_next_step():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    assert coordinator.handle(Asked("resume")) == [
        Note("resumed", "resumed after step 1"),
        Assign(0, "step", 2, (0, 1, 2, 3), fresh=True, lease=2),
    ]


def test_resume_takes_back_a_pause_that_has_not_happened():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    coordinator.handle(Asked("resume"))
    assert work(one_step(coordinator, actions)) == [Assign(0, "step", 2, (0, 1, 2, 3), fresh=True, lease=2)]


def test_resume_of_a_running_run_assigns_nothing_twice():
    coordinator, _ = loaded(0)
    assert coordinator.handle(Asked("resume")) == []


def test_an_engine_that_joins_a_paused_run_works_when_it_is_resumed():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineLoaded(1))
    assert [action.engine for action in of_kind(coordinator.handle(Asked("resume")), Assign)] == [0, 1]


def test_a_stop_lets_the_step_under_way_finish():
    coordinator, actions = loaded(0)
    assert coordinator.handle(Asked("stop")) == []
    assert one_step(coordinator, actions) == [
        Note("stopped", "stopped after step 1 of 3"),
        End("stopped"),
    ]


def test_a_stop_skips_the_evaluation_that_is_due():
    coordinator, actions = loaded(0, evaluate_every=1)
    coordinator.handle(Asked("stop"))
    assert of_kind(one_step(coordinator, actions), Assign) == []


def test_a_stop_while_starting_ends_at_once():
    coordinator = Coordinator(num_steps=1, num_shards=1, evaluate_every=None, engines=[0])
    coordinator.start()
    assert work(coordinator.handle(Asked("stop"))) == [End("stopped")]


def test_a_stop_while_paused_ends_at_once():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    assert work(coordinator.handle(Asked("stop"))) == [End("stopped")]


def test_a_stop_while_no_engine_is_ready_ends_at_once():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineLost(0, "died"))
    assert work(coordinator.handle(Asked("stop"))) == [End("stopped")]


def test_a_stop_replaces_a_pause_that_has_not_happened():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    coordinator.handle(Asked("stop"))
    assert work(one_step(coordinator, actions)) == [End("stopped")]


def test_a_stop_is_not_undone_by_a_later_pause():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("stop"))
    coordinator.handle(Asked("pause"))
    assert work(one_step(coordinator, actions)) == [End("stopped")]


def test_a_stop_while_a_step_is_committed_still_counts_that_step():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    report(coordinator, *of_kind(actions, Assign))
    coordinator.handle(EngineLost(0, "died"))  # none is ready, one is loading
    coordinator.handle(Asked("stop"))
    coordinator.handle(Committed("step", 1))
    assert (coordinator.status, coordinator.step) == ("stopped", 1)


# refusals and failures -----------------------------------------------------------------------------


def refused() -> tuple[Coordinator, list[Action]]:
    coordinator, actions = loaded(0)
    actions = one_step(coordinator, actions)
    report(coordinator, *of_kind(actions, Assign))
    return coordinator, coordinator.handle(CommitRefused(2, "the loss is nan"))


def test_a_refused_step_pauses_the_run_at_that_step():
    coordinator, actions = refused()
    assert work(actions) == []
    assert (coordinator.status, coordinator.step) == ("paused", 1)


def test_a_refused_step_is_named_with_its_reason():
    _, actions = refused()
    assert notes(actions)[0].startswith("paused at step 2: the loss is nan; nothing of this step was applied")


def test_a_refused_step_is_the_error_of_the_run():
    coordinator, _ = refused()
    assert coordinator.error.startswith("paused at step 2: the loss is nan")


def test_resume_tries_the_refused_step_again_from_zeroed_slabs():
    coordinator, _ = refused()
    assert work(coordinator.handle(Asked("resume"))) == [Assign(0, "step", 2, (0, 1, 2, 3), fresh=True, lease=3)]


def test_resume_clears_the_error():
    coordinator, _ = refused()
    coordinator.handle(Asked("resume"))
    assert coordinator.error == ""


def test_a_refused_step_ends_the_run_if_a_stop_was_asked_for():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("stop"))
    report(coordinator, *of_kind(actions, Assign))
    assert work(coordinator.handle(CommitRefused(1, "the loss is nan"))) == [End("stopped")]


def test_a_step_whose_memory_has_changed_is_computed_again_from_zeroed_slabs():
    coordinator, actions = loaded(0)
    report(coordinator, *of_kind(actions, Assign))
    assert work(coordinator.handle(CommitDeferred(1))) == [Assign(0, "step", 1, (0, 1, 2, 3), fresh=True, lease=2)]
    assert (coordinator.status, coordinator.step) == ("running", 0)


def test_a_step_that_is_to_be_computed_again_is_not_if_a_stop_was_asked_for():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("stop"))
    report(coordinator, *of_kind(actions, Assign))
    assert work(coordinator.handle(CommitDeferred(1))) == [End("stopped")]


def test_user_code_that_fails_on_a_lost_engine_changes_nothing():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.handle(UserCodeFailed(1, 1, INDEX_ERROR, lease=2)) == []


def test_an_optimizer_that_raises_ends_the_run_with_its_traceback():
    coordinator, actions = loaded(0)
    report(coordinator, *of_kind(actions, Assign))
    text = "step 1: IndexError: Target 12 is out of bounds."
    assert work(coordinator.handle(CommitFailed(1, INDEX_ERROR))) == [End("failed", text, "Traceback: line 7")]


@pytest.mark.parametrize(
    "event",
    [
        EngineJoined(5),
        EngineLoaded(0),
        EngineLost(0, "died"),
        EngineSilent(0, "was stopped"),
        EngineBusy(0),
        EngineHeard(0),
        WorkDone(0, 1, "step", 1, (0, 1, 2, 3)),
        LeaseDeclined(0, 1),
        UserCodeFailed(0, 1, INDEX_ERROR, lease=1),
        Tick(),
        Committed("step", 1),
        CommitRefused(1, "the loss is nan"),
        CommitFailed(1, INDEX_ERROR),
        Asked("pause"),
        Asked("resume"),
        Asked("stop"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_after_the_end_do_nothing(event: Event):
    coordinator, actions = loaded(0, num_steps=1)
    one_step(coordinator, actions)
    assert coordinator.handle(event) == []
    assert (coordinator.status, coordinator.step) == ("finished", 1)


# user code that fails in a step -------------------------------------------------------------------

VALUE_ERROR = Failure(kind="ValueError", message="bad sample", traceback="Traceback: line 9")


def failed(*engines: int, failure: Failure = INDEX_ERROR) -> tuple[Coordinator, list[Action]]:
    """Three engines of which some fail and the others answer; what was said to the last of them."""
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    for each in of_kind(actions, Assign):
        if each.engine in engines:
            said = coordinator.handle(UserCodeFailed(each.engine, 1, failure, each.lease))
        else:
            said = report(coordinator, each)
    return coordinator, said


def test_a_step_that_failed_pauses_the_run_when_all_have_answered():
    coordinator, actions = failed(0)
    assert [action.kind for action in of_kind(actions, Note)] == ["paused"]
    assert work(actions) == []
    assert (coordinator.status, coordinator.step) == ("paused", 0)


def test_the_error_says_step_cause_engines_and_what_to_do():
    coordinator, _ = failed(0, 2, failure=VALUE_ERROR)
    assert coordinator.error == (
        "paused at step 1: ValueError: bad sample (engines 0, 2); nothing of this step was applied. "
        "Fix it, then run.resume(loss=fixed) or run.resume(step=fixed), or run.stop() keeps what was trained"
    )
    assert coordinator.traceback == "Traceback: line 9"


def test_every_cause_is_told_with_its_engines_and_its_traceback():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    for engine, failure in enumerate([VALUE_ERROR, INDEX_ERROR, VALUE_ERROR]):
        coordinator.handle(UserCodeFailed(engine, 1, failure, lease=engine + 1))
    causes = "ValueError: bad sample (engines 0, 2); IndexError: Target 12 is out of bounds. (engine 1);"
    assert causes in coordinator.error
    assert coordinator.traceback == "On engines 0, 2:\nTraceback: line 9\nOn engine 1:\nTraceback: line 7"


def test_each_engine_says_where_in_its_work_it_was():
    failures = [(0, replace(INDEX_ERROR, place="shard 3, sample 812")), (2, INDEX_ERROR)]
    text, _ = describe_causes(failures)
    assert text == "IndexError: Target 12 is out of bounds. (engine 0: shard 3, sample 812; engine 2)"


def test_of_many_engines_only_some_are_shown_with_their_places():
    failures = [(engine, replace(INDEX_ERROR, place=f"shard {engine}")) for engine in range(5)]
    text, _ = describe_causes(failures)
    assert text.endswith("(engine 0: shard 0; engine 1: shard 1; engine 2: shard 2; and 2 more engines)")


def test_a_step_that_failed_is_not_paused_while_another_may_fail_too():
    coordinator, _ = loaded(0, 1)
    assert coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=1)) == []
    assert coordinator.status == "running"


def test_a_silent_engine_is_not_waited_for_when_another_has_failed():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=1))
    coordinator.handle(EngineSilent(1, "was stopped"))
    assert coordinator.status == "paused"


def test_an_engine_whose_speed_nobody_knows_is_waited_for_no_longer_than_two_seconds():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=1), now=10.0)
    coordinator.handle(Tick(), now=11.9)
    assert coordinator.status == "running"
    coordinator.handle(Tick(), now=12.1)
    assert coordinator.status == "paused"


def test_the_loss_of_the_last_that_was_waited_for_pauses_a_step_that_failed():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=1))
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.status == "paused"


def test_resume_tries_the_step_that_failed_again_on_all_engines():
    coordinator, _ = failed(1)
    assert work(coordinator.handle(Asked("resume"))) == [
        Assign(0, "step", 1, (0, 1), fresh=True, lease=4),
        Assign(1, "step", 1, (2, 3), fresh=True, lease=5),
        Assign(2, "step", 1, (4, 5), fresh=True, lease=6),
    ]
    assert (coordinator.error, coordinator.traceback) == ("", "")


def test_an_answer_to_an_attempt_that_was_given_up_does_not_count_in_the_next():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineSilent(1, "was stopped"))
    coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=1))
    coordinator.handle(EngineHeard(1))
    again = coordinator.handle(Asked("resume"))
    assert work(again) == [Assign(0, "step", 1, (0, 1, 2, 3), fresh=True, lease=3)]
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == []
    assert report(coordinator, *of_kind(again, Assign)) == [Commit("step", 1, ((0, (0, 1, 2, 3)),))]


def test_a_stop_ends_a_run_whose_step_has_failed():
    coordinator, _ = failed(1)
    assert work(coordinator.handle(Asked("stop"))) == [End("stopped")]


def test_a_stop_that_was_asked_for_before_the_step_failed_ends_the_run():
    coordinator, _ = loaded(0)
    coordinator.handle(Asked("stop"))
    assert work(coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=1))) == [End("stopped")]


def test_an_evaluation_that_failed_is_tried_again():
    coordinator, actions = loaded(0, num_steps=1, evaluate_every=1)
    one_step(coordinator, actions)
    coordinator.handle(UserCodeFailed(0, 1, INDEX_ERROR, lease=2))
    assert coordinator.error.startswith("paused at the evaluation after step 1: IndexError")
    assert work(coordinator.handle(Asked("resume"))) == [Assign(0, "evaluation", 1, (0, 1, 2, 3), fresh=True, lease=3)]


def test_an_engine_that_cannot_load_is_left_out_if_another_could():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(0))
    assert coordinator.handle(UserCodeFailed(1, 0, INDEX_ERROR)) == [
        Note("left", "engine 1 could not load the run: IndexError: Target 12 is out of bounds.", 1),
        Note("running", "1 engines, 2 shards"),
        Assign(0, "step", 1, (0, 1), fresh=True, lease=1),
    ]


def test_a_run_that_no_engine_could_load_fails_with_the_traceback():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    assert work(coordinator.handle(UserCodeFailed(1, 0, INDEX_ERROR))) == []
    text = "loading on engines 0, 1: IndexError: Target 12 is out of bounds."
    assert work(coordinator.handle(UserCodeFailed(0, 0, INDEX_ERROR))) == [End("failed", text, "Traceback: line 7")]


def test_a_joiner_that_cannot_load_does_not_disturb_the_run():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    assert work(coordinator.handle(UserCodeFailed(1, 0, INDEX_ERROR))) == []
    assert coordinator.status == "running"


# engines that hang ----------------------------------------------------------------------------


def hung() -> Coordinator:
    """Three engines of which the last hangs, and the others have answered and computed what it held."""
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(EngineSilent(2, "was stopped"))
    report(coordinator, *of_kind(coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))), Assign))
    report(coordinator, *of_kind(coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))), Assign))
    return coordinator


def test_shards_of_a_silent_engine_are_computed_by_an_idle_one_too_and_notes_say_so():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    assert coordinator.handle(EngineSilent(2, "was stopped")) == [
        Note("hung", "engine 2 was stopped", 2),
        Assign(0, "step", 1, (4, 5), fresh=True, lease=4, in_extra_slab=True),
        Note("reassigned", "2 shards of engine 2 wait for it: engine 0 computes them too", 2),
    ]


def test_a_step_is_committed_without_the_engine_that_hangs():
    assert hung().handle(Committed("step", 1)) == [
        Assign(0, "step", 2, (0, 1, 2), fresh=True, lease=5),
        Assign(1, "step", 2, (3, 4, 5), fresh=True, lease=6),
    ]


def silent(*, answered: int) -> Coordinator:
    """Two engines of which one has answered and computes what the other held, which is not heard."""
    coordinator, actions = loaded(0, 1)
    coordinator.handle(EngineSilent(1 - answered, "was not heard", is_asleep=True))
    report(coordinator, of_kind(actions, Assign)[answered])
    return coordinator


def test_the_answer_of_a_silent_engine_counts_if_its_shards_are_still_open():
    coordinator = silent(answered=0)
    answer = WorkDone(1, 2, "step", 1, (2, 3))
    assert coordinator.expects(answer)
    assert coordinator.handle(answer) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]
    assert coordinator.handle(WorkDone(0, 3, "step", 1, (2, 3))) == []


def test_a_silent_engine_whose_shards_were_computed_by_another_comes_too_late():
    coordinator = silent(answered=0)
    assert coordinator.handle(WorkDone(0, 3, "step", 1, (2, 3))) == [Commit("step", 1, ((0, (0, 1)), (0, (2, 3))))]
    assert not coordinator.expects(WorkDone(1, 2, "step", 1, (2, 3)))


def test_of_engines_that_are_all_silent_the_first_answer_counts():
    coordinator = silent(answered=0)
    coordinator.handle(EngineSilent(0, "was not heard", is_asleep=True))
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_the_shards_of_a_silent_engine_are_given_to_one_other_at_a_time():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(EngineSilent(2, "was not heard", is_asleep=True))
    report(coordinator, of_kind(actions, Assign)[0])
    assert report(coordinator, of_kind(actions, Assign)[1]) == []


def test_if_the_second_is_silent_too_a_third_computes_the_same_shards():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(EngineSilent(2, "was not heard", is_asleep=True))
    report(coordinator, *of_kind(actions, Assign)[:2])
    assert work(coordinator.handle(EngineSilent(0, "was not heard", is_asleep=True))) == [
        Assign(1, "step", 1, (4, 5), fresh=True, lease=5, in_extra_slab=True)
    ]


def without_room() -> Coordinator:
    """One of two engines is silent, and the other, which has answered, has no memory for another slab."""
    coordinator = silent(answered=0)
    again = Assign(0, "step", 1, (2, 3), fresh=False, lease=4)
    assert work(coordinator.handle(LeaseDeclined(0, 3), now=0.0)) == [again]
    return coordinator


def test_without_room_for_another_slab_the_shards_of_a_silent_engine_are_taken_from_it():
    coordinator = without_room()
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == []
    assert coordinator.handle(WorkDone(0, 4, "step", 1, (2, 3))) == [Commit("step", 1, ((0, (0, 1)), (0, (2, 3))))]


def test_a_lease_that_is_taken_back_again_and_again_is_left_to_its_engine_for_longer_each_time():
    coordinator, actions = loaded(0, 1)
    task = coordinator._task
    assert task is not None
    task.without_extra_slab.add(0)
    task.num_taken[1] = 2
    coordinator.handle(EngineSilent(1, "was not heard", is_asleep=True), now=10.0)
    report(coordinator, of_kind(actions, Assign)[0])
    assert coordinator.handle(Tick(), now=12.9) == []
    assert work(coordinator.handle(Tick(), now=13.0)) == [Assign(0, "step", 1, (2, 3), fresh=False, lease=3)]


def test_one_engine_does_what_two_silent_ones_hold():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    for engine in (1, 2):
        coordinator.handle(EngineSilent(engine, "was stopped"))
    (first,) = of_kind(report(coordinator, of_kind(actions, Assign)[0]), Assign)
    (second,) = of_kind(report(coordinator, first), Assign)
    assert (first.shards, first.in_extra_slab) == ((2, 3), True)
    assert (second.shards, second.in_extra_slab) == ((4, 5), False)  # its other slab holds what counts
    assert report(coordinator, second) == [Commit("step", 1, ((0, (0, 1)), (0, (2, 3)), (0, (4, 5))))]


def test_silence_in_every_step_is_told_three_times():
    coordinator, actions = loaded(0, num_steps=9)
    told: list[str] = []
    for _ in range(5):
        told += notes(coordinator.handle(EngineSilent(0, "was not heard", is_asleep=True)))
        told += notes(coordinator.handle(EngineHeard(0)))
        actions = one_step(coordinator, actions)
    assert told == ["engine 0 was not heard", "engine 0 is heard again"] * 3


# engines that work but cannot beat -------------------------------------------------------------


def test_nothing_is_taken_from_a_busy_engine_and_that_is_told_once():
    coordinator, actions = loaded(0, 1)
    report(coordinator, of_kind(actions, Assign)[0])
    text = "engine 1 is at work in a call that lets no other thread run, not even its heartbeat"
    assert coordinator.handle(EngineBusy(1)) == [Note("busy", text, 1)]
    assert coordinator.handle(EngineHeard(1)) == []
    assert coordinator.handle(EngineBusy(1)) == []
    assert report(coordinator, of_kind(actions, Assign)[1]) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_a_busy_engine_that_does_nothing_any_more_is_silent():
    coordinator, actions = loaded(0, 1)
    report(coordinator, of_kind(actions, Assign)[0])
    coordinator.handle(EngineBusy(1))
    assert [each.engine for each in of_kind(coordinator.handle(EngineSilent(1, "was stopped")), Assign)] == [0]


def test_a_stop_waits_for_busy_engines_but_not_for_ever():
    coordinator, _ = loaded(0, 1)
    for engine in (0, 1):
        coordinator.handle(EngineBusy(engine), now=10.0)
    coordinator.handle(Asked("stop"), now=12.0)
    coordinator.handle(Tick(), now=14.9)
    assert coordinator.status == "running"
    assert work(coordinator.handle(Tick(), now=15.1)) == [End("stopped")]


def test_a_run_begins_without_an_engine_that_is_in_one_call_for_long_while_it_should_load():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(0), now=0.0)
    assert coordinator.handle(EngineBusy(1), now=0.5) == []
    assert coordinator.handle(Tick(), now=10.4) == []
    assert coordinator.handle(Tick(), now=10.6) == [
        Note("busy", "engine 1 still loads, or is in another call: the run begins without it", 1),
        Note("running", "1 engines, 2 shards"),
        Assign(0, "step", 1, (0, 1), fresh=True, lease=1),
    ]


def test_the_late_answer_of_an_engine_that_hung_is_refused():
    coordinator = hung()
    answer = WorkDone(2, 3, "step", 1, (4, 5))
    assert not coordinator.expects(answer)
    assert coordinator.handle(answer) == []


def test_an_engine_that_hung_works_again_when_it_is_heard_and_has_answered():
    coordinator = hung()
    assert coordinator.handle(EngineHeard(2)) == [Note("recovered", "engine 2 is heard again", 2)]
    coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5)))
    assert [action.engine for action in coordinator.handle(Committed("step", 1))] == [0, 1, 2]


def test_an_engine_that_hung_gets_nothing_before_it_has_answered():
    coordinator = hung()
    coordinator.handle(EngineHeard(2))
    assert [action.engine for action in coordinator.handle(Committed("step", 1))] == [0, 1]


def test_an_engine_that_has_answered_gets_nothing_before_it_is_heard():
    coordinator = hung()
    coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5)))
    assert [action.engine for action in coordinator.handle(Committed("step", 1))] == [0, 1]


def test_a_failure_is_as_good_an_answer_as_any_of_an_engine_that_hung():
    coordinator = hung()
    coordinator.handle(EngineHeard(2))
    coordinator.handle(UserCodeFailed(2, 1, INDEX_ERROR, lease=3))
    assert [action.engine for action in coordinator.handle(Committed("step", 1))] == [0, 1, 2]


def test_what_an_engine_had_reported_is_redone_if_it_hangs_in_the_same_slab():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    coordinator.handle(EngineLost(1, "died"))  # shard 2 goes to engine 0
    coordinator.handle(EngineSilent(0, "was stopped"))
    again = coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5)))
    assert work(again) == [Assign(2, "step", 1, (3,), fresh=False, lease=5)]
    (again,) = of_kind(report(coordinator, *work(again)), Assign)
    assert again == Assign(2, "step", 1, (0, 1, 2), fresh=True, lease=6, in_extra_slab=True)
    assert report(coordinator, again) == [Commit("step", 1, ((2, (0, 1, 2)), (2, (3,)), (2, (4, 5))))]


def test_what_an_engine_had_reported_counts_if_it_hangs_in_the_same_slab_and_is_first_all_the_same():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    coordinator.handle(EngineLost(1, "died"))  # shard 2 goes to engine 0
    coordinator.handle(EngineSilent(0, "was stopped"))
    report(coordinator, *of_kind(coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5))), Assign))
    commit = Commit("step", 1, ((0, (0, 1)), (0, (2,)), (2, (3,)), (2, (4, 5))))
    assert coordinator.handle(WorkDone(0, 4, "step", 1, (2,))) == [commit]


def test_nothing_is_taken_from_the_only_engine():
    coordinator, _ = loaded(0)
    assert coordinator.handle(EngineSilent(0, "was stopped")) == [Note("hung", "engine 0 was stopped", 0)]
    coordinator.handle(EngineHeard(0))
    assert coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1, 2, 3))) == [Commit("step", 1, ((0, (0, 1, 2, 3)),))]


def test_the_shards_of_the_only_engine_go_to_a_joiner_while_it_hangs():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineSilent(0, "was stopped"))
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 1, (0, 1, 2, 3), fresh=True, lease=2)]


def test_of_engines_that_all_hang_the_first_to_be_heard_goes_on():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineSilent(0, "was stopped"))
    coordinator.handle(EngineSilent(1, "was stopped"))
    coordinator.handle(EngineHeard(1))
    (again,) = of_kind(coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))), Assign)
    assert again == Assign(1, "step", 1, (0, 1), fresh=True, lease=3, in_extra_slab=True)


def test_a_stop_ends_at_once_if_nobody_is_heard():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineSilent(0, "was stopped"))
    assert work(coordinator.handle(Asked("stop"))) == [End("stopped")]


def test_a_run_begins_without_an_engine_that_hangs_while_it_loads():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(0), now=0.0)
    assert coordinator.handle(EngineSilent(1, "was stopped"), now=0.5) == []
    assert coordinator.handle(Tick(), now=2.4) == []
    assert coordinator.handle(Tick(), now=2.6) == [
        Note("hung", "engine 1 is silent: the run begins without it", 1),
        Note("running", "1 engines, 2 shards"),
        Assign(0, "step", 1, (0, 1), fresh=True, lease=1),
    ]


@pytest.mark.parametrize("event", [EngineSilent(9, "was stopped"), EngineHeard(9), EngineHeard(0)])
def test_news_of_hearts_that_are_none_of_the_run_s_change_nothing(event: Event):
    coordinator, _ = loaded(0)
    assert coordinator.handle(event) == []


# engines that are slow -----------------------------------------------------------------------


class Race:
    """Engines that take their own time per shard, and one clock for all."""

    def __init__(self, seconds: dict[int, float], *, num_shards: int = 48, num_steps: int = 1000) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.coordinator, self.actions = loaded(*seconds, num_shards=num_shards, num_steps=num_steps)
        self.shares: list[dict[int, int]] = []

    def step(self) -> float:
        """Let every engine answer, the fastest first; how long the step took."""
        assigned = of_kind(self.actions, Assign)
        self.shares.append({each.engine: len(each.shards) for each in assigned})
        ends = {each: self.now + len(each.shards) * self.seconds[each.engine] for each in assigned}
        begin = self.now
        for each in sorted(assigned, key=ends.__getitem__):
            self.now = ends[each]
            done = WorkDone(each.engine, each.lease, each.kind, each.step, each.shards)
            self.actions = self.coordinator.handle(done, now=self.now)
        self.actions = self.coordinator.handle(Committed(self.actions[0].kind, self.actions[0].step), now=self.now)
        return self.now - begin


def test_engines_of_about_the_same_speed_get_equal_shares_for_ever():
    race = Race({0: 0.0010, 1: 0.0012, 2: 0.0014})
    for _ in range(100):
        race.step()
    assert race.shares == [{0: 16, 1: 16, 2: 16}] * 100


def test_differences_of_a_few_milliseconds_move_no_shards():
    race = Race({0: 0.00005, 1: 0.00020})
    for _ in range(100):
        race.step()
    assert race.shares == [{0: 24, 1: 24}] * 100


@pytest.mark.parametrize("num_engines", [2, 3, 4])
def test_an_engine_slowed_4_times_has_its_share_within_10_steps(num_engines: int):
    race = Race(dict.fromkeys(range(num_engines), 0.001))
    for _ in range(20):
        race.step()
    race.seconds[0] = 0.004
    for _ in range(10):
        race.step()
    assert race.shares[-1][0] == pytest.approx(48 / (1 + 4 * (num_engines - 1)), abs=1)


@pytest.mark.parametrize("num_engines", [3, 4])
def test_with_one_engine_slowed_4_times_a_pool_does_nine_tenths_of_the_sum_of_its_speeds(num_engines: int):
    race = Race({0: 0.004, **dict.fromkeys(range(1, num_engines), 0.001)})
    for _ in range(10):
        race.step()
    seconds = sum(race.step() for _ in range(300))
    assert 300 * 48 / seconds >= 0.9 * sum(1 / each for each in race.seconds.values())


def test_an_engine_that_becomes_fast_again_gets_its_shares_back():
    race = Race({0: 0.004, 1: 0.001, 2: 0.001})
    for _ in range(30):
        race.step()
    race.seconds[0] = 0.001
    for _ in range(30):
        race.step()
    assert race.shares[-1] == {0: 16, 1: 16, 2: 16}


def test_an_engine_that_was_far_too_slow_for_a_single_shard_gets_its_shares_back():
    race = Race({0: 0.100, 1: 0.001, 2: 0.001})
    for _ in range(30):
        race.step()
    assert 0 not in race.shares[-1]
    race.seconds[0] = 0.001
    for _ in range(80):
        race.step()
    assert race.shares[-1] == {0: 16, 1: 16, 2: 16}


def test_one_slow_answer_moves_no_shards():
    race = Race({0: 0.001, 1: 0.001})
    for _ in range(10):
        race.step()
    race.seconds[0] = 0.100
    race.step()
    race.seconds[0] = 0.001
    for _ in range(10):
        race.step()
    assert race.shares == [{0: 24, 1: 24}] * 21


def late(*, elapsed: float) -> tuple[Race, list[Action]]:
    """Two engines that should take 0.24 s each; in the 6th step, engine 1 has not answered so long after its lease."""
    race = Race({0: 0.01, 1: 0.01})
    for _ in range(5):
        race.step()
    begin = race.now
    race.coordinator.handle(WorkDone(0, 11, "step", 6, tuple(range(24))), now=begin + 0.24)
    return race, race.coordinator.handle(Tick(), now=begin + elapsed)


REDONE = Assign(0, "step", 6, tuple(range(24, 48)), fresh=True, lease=13, in_extra_slab=True)


def test_a_lease_is_not_late_before_three_times_what_it_should_take():
    assert late(elapsed=0.71)[1] == []


def test_a_late_lease_is_computed_by_an_idle_engine_too_in_another_slab():
    assert late(elapsed=0.73)[1] == [
        REDONE,
        Note("reassigned", "24 shards of engine 1 are late: engine 0 computes them too", 1),
    ]


def test_a_late_lease_is_given_to_one_other_engine_only():
    race, _ = late(elapsed=0.73)
    assert race.coordinator.handle(Tick(), now=race.now + 0.9) == []


def test_of_two_who_compute_the_same_shards_the_first_counts():
    race, _ = late(elapsed=0.73)
    commit = Commit("step", 6, ((0, tuple(range(24))), (0, tuple(range(24, 48)))))
    assert report(race.coordinator, REDONE) == [commit]
    assert race.coordinator.handle(WorkDone(1, 12, "step", 6, tuple(range(24, 48)))) == []


def test_of_two_who_compute_the_same_shards_the_first_may_be_the_late_one():
    race, _ = late(elapsed=0.73)
    answer = WorkDone(1, 12, "step", 6, tuple(range(24, 48)))
    commit = Commit("step", 6, ((0, tuple(range(24))), (1, tuple(range(24, 48)))))
    assert race.coordinator.handle(answer) == [commit]
    assert report(race.coordinator, REDONE) == []


def test_an_engine_that_was_overtaken_gets_nothing_before_it_has_answered():
    race, _ = late(elapsed=0.73)
    report(race.coordinator, REDONE)
    assert [action.engine for action in race.coordinator.handle(Committed("step", 6))] == [0]


def test_an_engine_that_dies_late_leaves_its_shards_to_the_one_that_has_them_already():
    race, _ = late(elapsed=0.73)
    assert work(race.coordinator.handle(EngineLost(1, "died"))) == []
    commit = Commit("step", 6, ((0, tuple(range(24))), (0, tuple(range(24, 48)))))
    assert report(race.coordinator, REDONE) == [commit]


def test_without_room_for_another_slab_the_late_engine_is_waited_for():
    race, _ = late(elapsed=0.73)
    assert race.coordinator.handle(LeaseDeclined(0, 13)) == []
    assert race.coordinator.handle(Tick(), now=race.now + 5.0) == []
    commit = Commit("step", 6, ((0, tuple(range(24))), (1, tuple(range(24, 48)))))
    assert race.coordinator.handle(WorkDone(1, 12, "step", 6, tuple(range(24, 48)))) == [commit]


def test_short_tasks_are_not_late_before_a_quarter_of_a_second():
    race = Race({0: 0.0001, 1: 0.0001})
    for _ in range(5):
        race.step()
    begin = race.now
    race.coordinator.handle(WorkDone(0, 11, "step", 6, tuple(range(24))), now=begin + 0.0024)
    assert race.coordinator.handle(Tick(), now=begin + 0.24) == []
    assert work(race.coordinator.handle(Tick(), now=begin + 0.26)) == [REDONE]


# engines that leave on request -----------------------------------------------------------------


def test_an_engine_that_retires_is_released_when_it_has_answered():
    coordinator, _ = loaded(0, 1)
    assert coordinator.handle(RetireEngine(1)) == []
    assert coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3))) == [
        Note("left", "engine 1 left, as asked", 1),
        Release(1),
    ]


def test_what_an_engine_reported_before_it_left_counts():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(RetireEngine(1))
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    assert coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_an_engine_that_retires_gets_nothing_more():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(RetireEngine(0))
    coordinator.handle(EngineLost(1, "died"))
    assert of_kind(coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1))), Assign) == []
    assert work(coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5)))) == [
        Assign(2, "step", 1, (2, 3), fresh=False, lease=4)
    ]


@pytest.mark.parametrize("engine", [1, 2, 9], ids=["idle", "loading", "unknown"])
def test_an_engine_that_holds_nothing_is_released_at_once(engine: int):
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineJoined(2))
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    assert work(coordinator.handle(RetireEngine(engine))) == [Release(engine)]


def test_an_engine_that_hangs_is_released_at_once_and_others_redo_its_shards():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1)))
    coordinator.handle(RetireEngine(1))
    assert work(coordinator.handle(EngineSilent(1, "was stopped"))) == [
        Release(1),
        Assign(0, "step", 1, (2, 3), fresh=False, lease=3),
    ]


def test_a_released_engine_that_ends_is_not_called_dead():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(RetireEngine(1))
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    assert coordinator.handle(EngineLost(1, "died")) == []


def test_the_last_engine_may_leave_too_and_what_it_brought_is_committed():
    coordinator, _ = loaded(0)
    coordinator.handle(RetireEngine(0))
    assert work(coordinator.handle(WorkDone(0, 1, "step", 1, (0, 1, 2, 3)))) == [
        Commit("step", 1, ((0, (0, 1, 2, 3)),)),
        Release(0),
    ]
    text = "paused after step 1: the last engine left. %dtrain add, then %dtrain resume"
    assert coordinator.handle(Committed("step", 1)) == [Note("paused", text)]
    assert (coordinator.status, coordinator.error) == ("paused", "")


def test_an_engine_that_retires_is_released_when_the_run_ends():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(RetireEngine(1))
    assert work(coordinator.handle(CommitFailed(1, INDEX_ERROR)))[1:] == [Release(1)]
    assert coordinator.handle(RetireEngine(0)) == [Release(0)]


# work that ends its engine ------------------------------------------------------------------------


def end(engine: int, reason: str = "died by SIGSEGV") -> EngineLost:
    """Nobody is known to have ended it."""
    return EngineLost(engine, reason, is_suspect=True, is_crash=True)


def doomed(*reasons: str, num_steps: int = 3) -> tuple[Coordinator, list[Action]]:
    """Three engines, of which the first two end at the same shards; what was said to the last of them."""
    coordinator = Coordinator(
        num_steps=num_steps,
        num_shards=6,
        evaluate_every=None,
        engines=(0, 1, 2),
        name_samples=lambda kind, step, shards: f"samples of {kind} {step}, {shards}",
    )
    for engine in range(3):
        coordinator.handle(EngineLoaded(engine))
    coordinator.handle(WorkDone(1, 2, "step", 1, (2, 3)))
    coordinator.handle(end(0, reasons[0]))  # shard 0 goes to engine 1, shard 1 is left for engine 2
    return coordinator, coordinator.handle(end(1, reasons[1]))


def test_a_second_death_at_the_same_shards_pauses_the_run_and_names_signal_and_samples():
    coordinator, actions = doomed("died by SIGSEGV", "died by SIGSEGV")
    error = (
        "paused at step 1: engines 0, 1 died by SIGSEGV while both had shard 0: samples of step 1, [0]; nothing of "
        "this step was applied. Fix it, then run.resume(loss=fixed) or run.resume(step=fixed), or run.stop() keeps "
        "what was trained"
    )
    assert actions == [Note("died", "engine 1 died by SIGSEGV", 1), Note("paused", error), Replace(2)]
    assert (coordinator.status, coordinator.error) == ("paused", error)


def test_engines_that_ended_in_different_ways_are_told_apart():
    coordinator, _ = doomed("died by SIGSEGV", "died (exit code 3)")
    assert "engine 0 died by SIGSEGV and engine 1 died (exit code 3) while both had shard 0" in coordinator.error


def test_the_step_that_ended_engines_is_done_again_when_the_run_is_resumed():
    coordinator, _ = doomed("died by SIGSEGV", "died by SIGSEGV")
    coordinator.handle(WorkDone(2, 3, "step", 1, (4, 5)))  # refused
    for engine in (3, 4):
        coordinator.handle(EngineJoined(engine))
        coordinator.handle(EngineLoaded(engine))
    again = coordinator.handle(Asked("resume"))
    assert [each.engine for each in of_kind(again, Assign)] == [2, 3, 4]
    assert report(coordinator, *of_kind(again, Assign)) == [Commit("step", 1, ((2, (0, 1)), (3, (2, 3)), (4, (4, 5))))]


def test_a_stop_that_was_asked_for_ends_a_run_whose_work_ends_engines():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    report(coordinator, of_kind(actions, Assign)[1])
    coordinator.handle(Asked("stop"))
    coordinator.handle(end(0))
    assert work(coordinator.handle(end(1))) == [Replace(2), End("stopped")]


def test_deaths_at_different_shards_pause_nothing():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(end(0))
    coordinator.handle(end(1))
    assert coordinator.status == "running"
    assert report(coordinator, of_kind(actions, Assign)[2]) == [
        Assign(2, "step", 1, (0, 1, 2, 3), fresh=False, lease=4)
    ]


def test_what_another_engine_has_reported_is_not_suspected():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    report(coordinator, of_kind(actions, Assign)[1])
    (again,) = of_kind(coordinator.handle(end(0)), Assign)
    assert again.shards == (0,)
    report(coordinator, again)
    assert work(coordinator.handle(end(1))) == []
    assert coordinator.status == "running"


def test_a_committed_step_acquits_everybody():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(end(0))
    again = [a for each in of_kind(actions, Assign)[1:] for a in of_kind(report(coordinator, each), Assign)]
    assert of_kind(report(coordinator, *again), Commit)
    coordinator.handle(Committed("step", 1))
    coordinator.handle(end(1))
    assert coordinator.status == "running"


def test_engines_that_were_killed_on_purpose_pause_nothing():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    report(coordinator, of_kind(actions, Assign)[1])
    coordinator.handle(EngineLost(0, "died"))
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.status == "running"


def test_engines_that_end_together_get_nothing_of_each_other():
    coordinator, actions = loaded(0, 1, 2, num_shards=6)
    report(coordinator, of_kind(actions, Assign)[1])
    coordinator.handle(EngineEnding(1))
    assert work(coordinator.handle(end(0))) == []
    assert work(coordinator.handle(end(1))) == []
    assert coordinator.status == "running"


def test_the_last_engine_that_crashes_at_its_work_pauses_the_run():
    coordinator, _ = loaded(0)
    actions = coordinator.handle(end(0))
    assert work(actions) == [Replace(1)]
    assert "paused at step 1: engine 0 died by SIGSEGV while it had shards 0 to 3; nothing" in coordinator.error


def test_the_last_two_engines_that_crash_at_different_shards_pause_the_run():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(end(0))
    assert work(coordinator.handle(end(1))) == [Replace(2)]
    assert "engine 1 died by SIGSEGV while it had shards 2 to 3;" in coordinator.error


def test_the_last_engine_that_somebody_may_have_killed_fails_the_run():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineLost(0, "died by SIGKILL", is_suspect=True))
    assert (coordinator.status, coordinator.error) == (
        "failed",
        "no engine is left at step 0: engine 0 died by SIGKILL",
    )


def test_a_paused_run_whose_last_engine_ends_stays_paused():
    coordinator, _ = doomed("died by SIGSEGV", "died by SIGSEGV")
    coordinator.handle(EngineLost(2, "died"))
    assert coordinator.status == "paused"
    assert "SIGSEGV" in coordinator.error


def test_a_run_that_is_resumed_before_anybody_has_come_waits_for_the_first():
    coordinator, _ = loaded(0)
    coordinator.handle(end(0), now=5.0)
    coordinator.handle(Asked("resume"), now=6.0)
    assert coordinator.status == "running"
    coordinator.handle(EngineJoined(1), now=7.0)
    assert of_kind(coordinator.handle(EngineLoaded(1), now=8.0), Assign) == [
        Assign(1, "step", 1, (0, 1, 2, 3), fresh=True, lease=2)
    ]


def test_a_run_that_is_resumed_pauses_again_if_nobody_comes():
    coordinator, _ = loaded(0)
    coordinator.handle(end(0), now=5.0)
    coordinator.handle(Asked("resume"), now=6.0)
    assert coordinator.handle(Tick(), now=65.9) == []
    text = "paused after step 0: no engine has come within 60 s. %dtrain add, then %dtrain resume"
    assert coordinator.handle(Tick(), now=66.1) == [Note("paused", text)]


def test_an_evaluation_that_ends_engines_pauses_the_run():
    coordinator, actions = loaded(0, 1, num_steps=2, evaluate_every=1)
    first, second = of_kind(one_step(coordinator, actions), Assign)
    report(coordinator, second)
    assert [each.shards for each in of_kind(coordinator.handle(end(0)), Assign)] == [first.shards]
    coordinator.handle(end(1))
    assert coordinator.error.startswith("paused at the evaluation after step 1: engines 0, 1 died by SIGSEGV")
