from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dnb.hub.coordinator import (
    Action,
    Asked,
    Assign,
    Commit,
    CommitFailed,
    CommitRefused,
    Committed,
    Coordinator,
    End,
    EngineJoined,
    EngineLoaded,
    EngineLost,
    Event,
    LoadEngine,
    Note,
    UserCodeFailed,
    WorkDone,
)
from dnb.records import Failure, WorkKind

INDEX_ERROR = Failure(kind="IndexError", message="Target 12 is out of bounds.", traceback="Traceback: line 7")


def of_kind(actions: Iterable[Action], *kinds: type) -> list[Action]:
    return [action for action in actions if isinstance(action, kinds)]


def work(actions: Iterable[Action]) -> list[Action]:
    """What the engines and the master copy are told; notes left out."""
    return [action for action in actions if not isinstance(action, Note)]


def notes(actions: Iterable[Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, Note)]


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
        actions = coordinator.handle(WorkDone(each.engine, each.kind, each.step, each.shards))
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
    assert coordinator.handle(EngineLoaded(1)) == [Note("joined", "engine 1 has model and data", 1)]


def test_the_status_is_starting_until_all_engines_have_loaded():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(1))
    assert coordinator.status == "starting"


def test_the_last_engine_to_load_opens_the_first_step():
    _, actions = loaded(0, 1)
    assert actions == [
        Note("joined", "engine 1 has model and data", 1),
        Note("running", "2 engines, 4 shards"),
        Assign(0, "step", 1, (0, 1), fresh=True),
        Assign(1, "step", 1, (2, 3), fresh=True),
    ]


def test_an_engine_lost_while_loading_does_not_hold_up_the_start():
    coordinator = Coordinator(num_steps=1, num_shards=2, evaluate_every=None, engines=[0, 1])
    coordinator.start()
    coordinator.handle(EngineLoaded(0))
    assert work(coordinator.handle(EngineLost(1, "died"))) == [Assign(0, "step", 1, (0, 1), fresh=True)]


def test_an_engine_that_loads_twice_is_counted_once():
    coordinator, _ = loaded(0)
    assert coordinator.handle(EngineLoaded(0)) == []


def test_more_engines_than_shards_leaves_some_without_work():
    _, actions = loaded(0, 1, 2, num_shards=2)
    assert [action.shards for action in of_kind(actions, Assign)] == [(0,), (1,)]


# steps ---------------------------------------------------------------------------------------


def test_a_step_is_not_committed_while_a_shard_is_open():
    coordinator, _ = loaded(0, 1)
    assert coordinator.handle(WorkDone(0, "step", 1, (0, 1))) == []


def test_a_step_is_committed_when_every_shard_is_reported():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(1, "step", 1, (2, 3)))
    assert coordinator.handle(WorkDone(0, "step", 1, (0, 1))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_a_committed_step_opens_the_next():
    coordinator, actions = loaded(0, 1)
    assert one_step(coordinator, actions) == [
        Assign(0, "step", 2, (0, 1), fresh=True),
        Assign(1, "step", 2, (2, 3), fresh=True),
    ]


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
    coordinator.handle(WorkDone(0, "step", 1, (0, 1)))
    assert coordinator.working == {1}


def test_nobody_is_working_when_the_run_has_ended():
    coordinator, actions = loaded(0, num_steps=1)
    one_step(coordinator, actions)
    assert coordinator.working == frozenset()


# reports that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "stray",
    [
        pytest.param(WorkDone(0, "step", 1, (0, 1)), id="repeated"),
        pytest.param(WorkDone(1, "step", 0, (2, 3)), id="of an earlier step"),
        pytest.param(WorkDone(1, "step", 2, (2, 3)), id="of a later step"),
        pytest.param(WorkDone(1, "evaluation", 1, (2, 3)), id="of another kind"),
        pytest.param(WorkDone(0, "step", 1, (2, 3)), id="of shards of another engine"),
        pytest.param(WorkDone(7, "step", 1, (2, 3)), id="of an unknown engine"),
        pytest.param(WorkDone(1, "step", 1, ()), id="of nothing"),
        pytest.param(WorkDone(1, "step", 1, (3, 4)), id="of a shard that there is not"),
        pytest.param(WorkDone(1, "step", 1, (2, 2, 3)), id="of the same shard twice"),
    ],
)
def test_a_report_that_fits_no_open_lease_changes_nothing(stray: WorkDone):
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(0, "step", 1, (0, 1)))
    coordinator.handle(stray)
    assert coordinator.handle(WorkDone(1, "step", 1, (2, 3))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


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


def test_open_shards_of_a_lost_engine_go_to_the_survivors_and_the_note_says_so():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    assert coordinator.handle(EngineLost(1, "died")) == [
        Note("died", "engine 1 died", 1),
        Note("reassigned", "2 shards of engine 1 go to others", 1),
        Assign(0, "step", 1, (2,), fresh=False),
        Assign(2, "step", 1, (3,), fresh=False),
    ]


def test_a_step_with_a_lost_engine_counts_each_shard_once():
    coordinator, first = loaded(0, 1, 2, num_shards=6)
    second = coordinator.handle(EngineLost(1, "died"))
    of_survivors = [action for action in of_kind([*first, *second], Assign) if action.engine != 1]
    assert report(coordinator, *of_survivors) == [Commit("step", 1, ((0, (0, 1)), (0, (2,)), (2, (3,)), (2, (4, 5))))]


def test_a_late_report_of_a_lost_engine_changes_nothing():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.handle(WorkDone(1, "step", 1, (2, 3))) == []
    assert coordinator.working == {0}


def test_an_engine_that_dies_after_reporting_all_it_had_still_counts():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(WorkDone(1, "step", 1, (2, 3)))
    assert coordinator.handle(EngineLost(1, "died")) == [Note("died", "engine 1 died", 1)]
    assert coordinator.handle(WorkDone(0, "step", 1, (0, 1))) == [Commit("step", 1, ((0, (0, 1)), (1, (2, 3))))]


def test_what_a_lost_engine_had_reported_is_redone_if_it_was_at_work_again():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    coordinator.handle(WorkDone(0, "step", 1, (0, 1)))
    coordinator.handle(EngineLost(1, "died"))  # shard 2 to engine 0, shard 3 to engine 2
    assert coordinator.handle(EngineLost(0, "died")) == [
        Note("died", "engine 0 died", 0),
        Note("reassigned", "3 shards of engine 0 go to others", 0),
        Assign(2, "step", 1, (0, 1, 2), fresh=False),
    ]


def test_a_redone_report_counts_once_in_the_commit():
    coordinator, _ = loaded(0, 1, 2, num_shards=6)
    for event in [
        WorkDone(0, "step", 1, (0, 1)),
        EngineLost(1, "died"),
        EngineLost(0, "died"),
        WorkDone(2, "step", 1, (4, 5)),
        WorkDone(2, "step", 1, (3,)),
    ]:
        coordinator.handle(event)
    assert coordinator.handle(WorkDone(2, "step", 1, (0, 1, 2))) == [
        Commit("step", 1, ((2, (0, 1, 2)), (2, (3,)), (2, (4, 5))))
    ]


def test_a_loss_while_the_step_is_committed_redoes_nothing():
    coordinator, actions = loaded(0, 1)
    report(coordinator, *of_kind(actions, Assign))
    assert work(coordinator.handle(EngineLost(1, "died"))) == []
    assert coordinator.handle(Committed("step", 1)) == [Assign(0, "step", 2, (0, 1, 2, 3), fresh=True)]


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
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 1, (0, 1, 2, 3), fresh=True)]


def test_a_step_that_opens_while_no_engine_is_ready_waits_for_the_one_that_is_loading():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    report(coordinator, *of_kind(actions, Assign))
    coordinator.handle(EngineLost(0, "died"))
    coordinator.handle(Committed("step", 1))
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 2, (0, 1, 2, 3), fresh=True)]


def test_a_resume_while_no_engine_is_ready_waits_for_the_one_that_is_loading():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(Asked("pause"))
    one_step(coordinator, actions)
    coordinator.handle(EngineLost(0, "died"))
    coordinator.handle(Asked("resume"))
    assert work(coordinator.handle(EngineLoaded(1))) == [Assign(1, "step", 2, (0, 1, 2, 3), fresh=True)]


def test_a_step_with_shards_that_nobody_holds_is_not_committed():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineJoined(2))
    coordinator.handle(WorkDone(1, "step", 1, (2, 3)))
    coordinator.handle(EngineLost(1, "died"))
    coordinator.handle(EngineLost(0, "died"))
    assert work(coordinator.handle(EngineLoaded(2))) == [Assign(2, "step", 1, (0, 1), fresh=True)]


def test_an_engine_that_comes_back_in_the_same_step_starts_from_a_zeroed_slab():
    coordinator, _ = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineLost(0, "died"))  # in the middle of shards 0 to 3: its slab is torn
    coordinator.handle(EngineJoined(0))
    coordinator.handle(EngineLost(1, "died"))
    assert work(coordinator.handle(EngineLoaded(0))) == [Assign(0, "step", 1, (0, 1, 2, 3), fresh=True)]


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
    assert coordinator.handle(EngineLoaded(1)) == [Note("joined", "engine 1 has model and data", 1)]


def test_a_joiner_works_from_the_next_step():
    coordinator, actions = loaded(0)
    coordinator.handle(EngineJoined(1))
    coordinator.handle(EngineLoaded(1))
    assert one_step(coordinator, actions) == [
        Assign(0, "step", 2, (0, 1), fresh=True),
        Assign(1, "step", 2, (2, 3), fresh=True),
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
    one_step(coordinator, actions)
    assert work(coordinator.handle(EngineLost(0, "died"))) == [Assign(1, "evaluation", 1, (0, 1), fresh=False)]


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
    assert one_step(coordinator, actions) == [Assign(0, "evaluation", 1, (0, 1, 2, 3), fresh=True)]


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
        Assign(0, "step", 2, (0, 1, 2, 3), fresh=True),
    ]


def test_resume_takes_back_a_pause_that_has_not_happened():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("pause"))
    coordinator.handle(Asked("resume"))
    assert work(one_step(coordinator, actions)) == [Assign(0, "step", 2, (0, 1, 2, 3), fresh=True)]


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
    assert work(coordinator.handle(Asked("resume"))) == [Assign(0, "step", 2, (0, 1, 2, 3), fresh=True)]


def test_resume_clears_the_error():
    coordinator, _ = refused()
    coordinator.handle(Asked("resume"))
    assert coordinator.error == ""


def test_a_refused_step_ends_the_run_if_a_stop_was_asked_for():
    coordinator, actions = loaded(0)
    coordinator.handle(Asked("stop"))
    report(coordinator, *of_kind(actions, Assign))
    assert work(coordinator.handle(CommitRefused(1, "the loss is nan"))) == [End("stopped")]


def test_user_code_that_fails_in_a_step_ends_the_run_with_its_traceback():
    coordinator, _ = loaded(0, 1)
    text = "step 1 on engine 1: IndexError: Target 12 is out of bounds."
    assert work(coordinator.handle(UserCodeFailed(1, 1, INDEX_ERROR))) == [End("failed", text, "Traceback: line 7")]


def test_user_code_that_fails_while_loading_ends_the_run():
    coordinator = Coordinator(num_steps=1, num_shards=1, evaluate_every=None, engines=[0])
    coordinator.start()
    text = "loading on engine 0: IndexError: Target 12 is out of bounds."
    assert work(coordinator.handle(UserCodeFailed(0, 0, INDEX_ERROR))) == [End("failed", text, "Traceback: line 7")]


def test_user_code_that_fails_on_a_lost_engine_changes_nothing():
    coordinator, _ = loaded(0, 1)
    coordinator.handle(EngineLost(1, "died"))
    assert coordinator.handle(UserCodeFailed(1, 1, INDEX_ERROR)) == []


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
        WorkDone(0, "step", 1, (0, 1, 2, 3)),
        UserCodeFailed(0, 1, INDEX_ERROR),
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


# every shard once, whatever happens --------------------------------------------------------------------

MOST_STEPS = 6


class CoordinatorMachine(RuleBasedStateMachine):
    """A hub with its engines, as the real service behaves, in any order of events.

    An engine computes its assignments one after the other and reports each exactly as it was given. A slab is
    known by the (kind, step, shards) added to it since it was last zeroed, or is torn when its engine dies
    while computing: so each commit is checked against what really lies in the slabs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_shards = 5
        self.engines: dict[int, deque[Assign]] = {}  # alive: what they still are to compute
        self.loading: set[int] = set()
        self.slabs: dict[int, list[tuple[WorkKind, int, int]] | None] = {}  # None is torn
        self.sent: list[WorkDone] = []
        self.next_engine = 0
        self.commit: Commit | None = None
        self.committed: list[int] = []
        self.evaluated: list[int] = []
        self.ended: End | None = None
        for _ in range(3):
            self._new_engine()
        self.coordinator = Coordinator(
            num_steps=MOST_STEPS, num_shards=self.num_shards, evaluate_every=2, engines=list(self.engines)
        )
        self._perform(self.coordinator.start())

    def _new_engine(self) -> int:
        engine = self.next_engine
        self.next_engine += 1
        self.engines[engine] = deque()
        return engine

    def _tell(self, event: Event) -> None:
        self._perform(self.coordinator.handle(event))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.ended is None, f"{action} after {self.ended}"
            match action:
                case LoadEngine(engine):
                    assert engine in self.engines
                    self.loading.add(engine)
                case Assign(engine):
                    assert engine in self.engines
                    assert engine not in self.loading
                    assert action.shards
                    self.engines[engine].append(action)
                case Commit():
                    assert self.commit is None
                    self._check_slabs(action)
                    self.commit = action
                case End():
                    self.ended = action

    def _check_slabs(self, commit: Commit) -> None:
        """What lies in the slabs of the engines that count is every shard of the task, once."""
        in_slabs: list[tuple[WorkKind, int, int]] = []
        for engine in sorted({engine for engine, _ in commit.reports}):
            slab = self.slabs[engine]
            assert slab is not None, f"the slab of engine {engine} is torn"
            in_slabs += slab
        assert sorted(in_slabs) == [(commit.kind, commit.step, shard) for shard in range(self.num_shards)]
        counted = sorted(shard for _, shards in commit.reports for shard in shards)
        assert counted == list(range(self.num_shards))

    def _compute(self, engine: int) -> None:
        """Compute the next assignment of an engine, and report it."""
        assigned = self.engines[engine].popleft()
        added = [(assigned.kind, assigned.step, shard) for shard in assigned.shards]
        before = [] if assigned.fresh else self.slabs[engine]
        assert before is not None
        self.slabs[engine] = before + added
        done = WorkDone(engine, assigned.kind, assigned.step, assigned.shards)
        self.sent.append(done)
        self._tell(done)

    def _answer_commit(self) -> None:
        commit, self.commit = self.commit, None
        assert commit is not None
        if self.ended is None:
            (self.committed if commit.kind == "step" else self.evaluated).append(commit.step)
        self._tell(Committed(commit.kind, commit.step))

    def _busy(self) -> list[int]:
        return [engine for engine, tasks in self.engines.items() if tasks]

    # rules

    @initialize(num_loaded=st.sampled_from([3, 3, 3, 1, 0]))
    def begin(self, num_loaded: int) -> None:
        for engine in range(num_loaded):
            self.loading.discard(engine)
            self._tell(EngineLoaded(engine))

    @precondition(lambda self: len(self.engines) < 5)
    @rule()
    def join(self) -> None:
        self._tell(EngineJoined(self._new_engine()))

    @precondition(lambda self: len(self.engines) < min(5, self.next_engine))
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """A new process under an engine's old id, which finds the old slab as it was left."""
        gone = sorted(set(range(self.next_engine)) - set(self.engines))
        engine = data.draw(st.sampled_from(gone))
        self.engines[engine] = deque()
        self.sent = [done for done in self.sent if done.engine != engine]  # all of its earlier life came before
        self._tell(EngineJoined(engine))

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.discard(engine)
        self._tell(EngineLoaded(engine))

    def _lose(self, engine: int, *, at_work: bool) -> None:
        if self.engines.pop(engine) and at_work:
            self.slabs[engine] = None
        self.loading.discard(engine)
        self._tell(EngineLost(engine, "died"))

    @precondition(lambda self: len(self.engines) > 1)
    @rule(data=st.data(), at_work=st.booleans())
    def lose(self, data: st.DataObject, at_work: bool) -> None:
        self._lose(data.draw(st.sampled_from(sorted(self.engines))), at_work=at_work)

    @precondition(lambda self: len(self.engines) > 1 and self._busy())
    @rule(data=st.data())
    def lose_at_work(self, data: st.DataObject) -> None:
        busy = self._busy()
        again = [engine for engine in busy if not self.engines[engine][0].fresh]  # it has reported a part already
        self._lose(data.draw(st.sampled_from(again or busy)), at_work=True)

    @precondition(lambda self: self._busy())
    @rule(data=st.data(), num_parts=st.integers(1, 3))
    def compute(self, data: st.DataObject, num_parts: int) -> None:
        for _ in range(num_parts):
            if busy := self._busy():
                self._compute(data.draw(st.sampled_from(busy)))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def report_again(self, data: st.DataObject) -> None:
        before = self.coordinator.working
        self._tell(data.draw(st.sampled_from(self.sent)))
        assert self.coordinator.working == before

    @rule(
        engine=st.sampled_from([-1, 99]),
        step=st.integers(0, MOST_STEPS + 1),
        shards=st.lists(st.integers(-1, 6), max_size=6).map(tuple),
    )
    def report_as_a_stranger(self, engine: int, step: int, shards: tuple[int, ...]) -> None:
        before = self.coordinator.working
        self._tell(WorkDone(engine, "step", step, shards))
        assert self.coordinator.working == before

    @precondition(lambda self: self.commit is not None)
    @rule(is_refused=st.sampled_from([False, False, False, True]))
    def answer_commit(self, is_refused: bool) -> None:
        if is_refused and self.commit is not None and self.commit.kind == "step":
            step, self.commit = self.commit.step, None
            self.sent.clear()  # a socket keeps order: none of these can come after the step is tried again
            self._tell(CommitRefused(step, "the loss is nan"))
        else:
            self._answer_commit()

    @rule(verb=st.sampled_from(["pause", "resume", "resume"]))
    def ask(self, verb: str) -> None:
        self._tell(Asked(verb))

    @precondition(lambda self: self.coordinator.status == "paused")
    @rule()
    def resume(self) -> None:
        self._tell(Asked("resume"))

    @precondition(lambda self: len(self.committed) >= 2)
    @rule()
    def stop(self) -> None:
        self._tell(Asked("stop"))

    # claims

    @invariant()
    def a_running_run_with_a_ready_engine_has_work_under_way(self) -> None:
        if self.coordinator.status == "running" and set(self.engines) - self.loading:
            assert self._busy() or self.commit is not None

    @invariant()
    def steps_follow_each_other_without_gap(self) -> None:
        assert self.committed == list(range(1, len(self.committed) + 1))
        assert self.coordinator.step == len(self.committed)

    @invariant()
    def evaluations_are_those_due_and_none_twice(self) -> None:
        due = [step for step in range(2, MOST_STEPS + 1, 2) if step <= self.coordinator.step]
        assert self.evaluated == due[: len(self.evaluated)]
        assert len(due) - len(self.evaluated) <= 1

    @invariant()
    def a_finished_run_has_all_steps_and_evaluations(self) -> None:
        if self.ended is not None and self.ended.status == "finished":
            assert (self.committed[-1], self.evaluated[-1]) == (MOST_STEPS, MOST_STEPS)

    @invariant()
    def a_run_fails_only_without_engines(self) -> None:
        assert self.coordinator.status != "failed"

    def teardown(self) -> None:
        """From wherever the events led, a run that is resumed and served reaches its end."""
        for _ in range(500):
            if self.ended is not None:
                break
            if self.coordinator.status == "paused":
                self._tell(Asked("resume"))
            elif self.loading:
                engine = self.loading.pop()
                self._tell(EngineLoaded(engine))
            elif self.commit is not None:
                self._answer_commit()
            else:
                self._compute(self._busy()[0])
        assert self.ended is not None
        assert self.ended.status in ("finished", "stopped")
        self.steps_follow_each_other_without_gap()
        self.a_finished_run_has_all_steps_and_evaluations()


TestEveryShardIsCountedOnce = CoordinatorMachine.TestCase
# Explaining a failure traces every line, which takes minutes here.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
TestEveryShardIsCountedOnce.settings = settings(max_examples=300, stateful_step_count=40, deadline=None, phases=PHASES)
