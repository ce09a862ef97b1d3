import io

import pytest

from dnb.notebook import text
from tests.fake_runs import FakeEvent, FakeHistory, FakeRun, FakeWorker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def digits(**properties) -> FakeRun:
    history = FakeHistory(loss=[0.5] * 119 + [0.31214])
    history.set("val_loss", [0.4, 0.25, 0.298], steps=[40, 80, 120])
    history.set("val_accuracy", [0.8, 0.9, 0.95], steps=[40, 80, 120])
    facts = {"step": 120, "history": history, "samples_per_second": 2410.0, "seconds_left": 9.2}
    return FakeRun(**{**facts, **properties})


def reported(run: FakeRun, *, at: list[float]) -> list[str]:
    """What a reporter writes that is called at these times."""
    clock, stream = Clock(), io.StringIO()
    reporter = text.TextReporter(run, interval_seconds=5.0, stream=stream, clock=clock)
    for clock.now in at:
        run.step += 1
        reporter(run)
    return stream.getvalue().splitlines()


def test_a_progress_line_has_step_losses_speed_and_time_left():
    assert text.progress_line(digits()) == (
        "digits: step 120/496, loss 0.3121, val_loss 0.2980, 2,410 samples/s, 9 s left"
    )


def test_a_progress_line_leaves_out_what_is_not_known():
    assert text.progress_line(FakeRun(status="starting")) == "digits: step 0/496"


def test_a_progress_line_says_why_a_run_paused():
    run = digits(status="paused", error="the loss is nan")
    assert text.progress_line(run) == "digits: paused at step 120: the loss is nan"


def test_a_reason_that_names_the_step_is_not_told_twice():
    run = digits(status="paused", error="paused at step 12: the loss is nan")
    assert text.status_sentence(run) == "paused at step 12: the loss is nan"


def test_a_failure_names_step_engine_and_error():
    run = digits(status="failed", error="step 3 on engine 1: IndexError: Target 12 is out of bounds.")
    assert text.status_sentence(run) == "failed at step 3 on engine 1: IndexError: Target 12 is out of bounds."


def test_a_pause_without_a_fault_is_told_without_a_reason():
    assert text.status_sentence(digits(status="paused")) == "paused at step 120"


def test_a_stopped_run_says_how_far_it_came():
    run = digits(status="stopped", elapsed_seconds=61.4)
    assert text.status_sentence(run) == "stopped at step 120 of 496 after 1 min 01 s"


def test_dead_engines_are_not_counted():
    run = digits(workers=[FakeWorker(engine=0), FakeWorker(engine=1, state="dead")])
    assert text.status_sentence(run) == "training on 1 engine"


def test_what_last_happened_to_engines_is_told():
    run = digits(
        workers=[FakeWorker()],
        events=[
            FakeEvent(kind="joined", text="engine 0 has model and data", step=0, engine=0),
            FakeEvent(kind="died", text="engine 1 closed its connection", step=100, engine=1),
            FakeEvent(kind="reassigned", text="2 shards of engine 1 go to others", step=100, engine=1),
        ],
    )
    assert text.status_sentence(run) == (
        "training on 1 engine; after step 100: engine 1 closed its connection, 2 shards of engine 1 go to others"
    )


def test_text_of_unknown_origin_is_put_on_one_line():
    assert text.one_line("a\nb\x1b[31m\tc") == "a b [31m c"


def test_text_of_unknown_origin_is_cut():
    assert text.one_line("x" * 500, limit=10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.94, "0.9 s"), (12.3, "12 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")],
)
def test_durations_are_told_as_a_person_would(seconds, words):
    assert text.duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(0.31214, "0.3121"), (1e-7, "1.000e-07"), (float("nan"), "nan")])
def test_numbers_keep_what_they_say(value, words):
    assert text.number(value) == words


def test_a_summary_tells_status_losses_metrics_speed_and_engines():
    worker = FakeWorker(engine=0, samples=7936, steps=496, compute=0.6, wait=0.25, data=0.1, idle=0.05)
    run = digits(status="finished", step=496, elapsed_seconds=4.0, workers=[worker])
    assert text.summary(run).splitlines() == [
        "digits: finished after 496 steps in 4.0 s",
        "loss 0.3121 at step 120",
        "val_loss 0.2980 at step 120, best 0.2500 at step 80",
        "val_accuracy 0.9500 at step 120, lowest 0.8000 at step 40, highest 0.9500 at step 120",
        "1,984 samples/s on average",
        "engine 0 on host-a: compute 60%, wait 25%, data 10%, idle 5%; 7,936 samples in 496 steps",
    ]


def test_a_summary_of_a_run_without_steps_says_so():
    assert text.summary(FakeRun(status="failed")).splitlines()[1] == "no step was committed"


def test_a_best_validation_loss_is_never_nan():
    run = FakeRun(status="stopped")
    run.history.set("val_loss", [float("nan"), 0.5], steps=[4, 8])
    assert "best 0.5000 at step 8" in text.summary(run)


def test_a_reporter_writes_at_once_and_then_once_per_interval():
    lines = reported(FakeRun(), at=[0.0, 0.2, 4.9, 5.0, 5.2, 10.1])
    assert lines == ["digits: step 1/496", "digits: step 4/496", "digits: step 6/496"]


def test_a_reporter_does_not_repeat_a_line_that_says_nothing_new():
    run = FakeRun(status="paused")
    clock, stream = Clock(), io.StringIO()
    reporter = text.TextReporter(run, stream=stream, clock=clock)
    for clock.now in (0.0, 6.0, 12.0):
        reporter(run)
    assert stream.getvalue() == "digits: paused at step 0\n"


def test_a_reporter_tells_of_a_pause_without_waiting_for_its_turn():
    run, clock, stream = FakeRun(), Clock(), io.StringIO()
    reporter = text.TextReporter(run, stream=stream, clock=clock)
    reporter(run)
    run.status = "paused"
    reporter(run)
    assert stream.getvalue().splitlines()[-1] == "digits: paused at step 0"


def test_a_reporter_writes_the_summary_once():
    run, stream = FakeRun(status="stopped"), io.StringIO()
    reporter = text.TextReporter(run, stream=stream, clock=Clock())
    reporter(run)
    reporter(run)
    assert stream.getvalue() == text.summary(run) + "\n"


def test_a_reporter_without_a_stream_writes_to_what_standard_output_is_now(capsys):
    text.TextReporter(FakeRun(), clock=Clock())(FakeRun())
    assert capsys.readouterr().out == "digits: step 0/496\n"
