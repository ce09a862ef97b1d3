from dnb.api.runs.run_snapshot import RunSnapshot, printed
from dnb.protocol.measurements import RunEvent

# 10 samples an epoch, in batches of 4, 4 and 2
ENDED = RunSnapshot(
    status="finished", step=5, num_steps=6, steps_per_epoch=3, elapsed_seconds=2.0, batch_size=4, num_samples=10
)


def test_the_speed_of_a_run_without_accounts_of_engines_is_that_of_its_samples():
    assert ENDED.samples_per_second == 9.0


def test_a_run_that_goes_on_without_accounts_has_no_speed_yet():
    assert (
        RunSnapshot(status="running", step=5, batch_size=4, num_samples=10, steps_per_epoch=3).samples_per_second
        is None
    )


def test_a_run_that_never_made_a_step_has_no_speed():
    assert RunSnapshot(status="stopped", elapsed_seconds=2.0, batch_size=4, num_samples=10).samples_per_second is None


def event(kind, text, engine=None):
    return RunEvent(kind=kind, text=text, step=1, time=0.0, engine=engine)


def test_printed_lines_bear_their_engine_or_the_hub_and_counts_stand_in_brackets():
    events = [
        event("output", "f.py:1: UserWarning: careful\n  warn()", 2),
        event("joined", "engine 3 joined", 3),
        event("repeated", "loss 2\nloss 3", 0),
        event("output", "norm 1"),
        event("counted", "18,233 more like loss 1\n7 more lines of other kinds"),
    ]
    assert printed(events) == [
        "engine 2: f.py:1: UserWarning: careful",
        "engine 2:   warn()",
        "engine 0: loss 2",
        "engine 0: loss 3",
        "hub: norm 1",
        "(18,233 more like loss 1)",
        "(7 more lines of other kinds)",
    ]


def test_lines_of_an_older_run_that_are_one_event_are_told_one_by_one():
    assert printed([event("output", "one\ntwo", 0)]) == ["engine 0: one", "engine 0: two"]
