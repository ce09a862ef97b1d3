import io

import pytest

from dnb.notebook.text import summary
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
    reporter = summary.TextReporter(run, interval_seconds=5.0, stream=stream, clock=clock)
    for clock.now in at:
        run.step += 1
        reporter(run)
    return stream.getvalue().splitlines()


def test_a_progress_line_has_step_losses_speed_and_time_left():
    assert summary.progress_line(digits()) == (
        "digits: epoch 8 of 31 · step 120 of 496 · loss 0.3121 · val_loss 0.2980 · val_accuracy 0.9500 · "
        "2,410 samples/s · 9 s left"
    )


def test_a_progress_line_leaves_out_what_is_not_known():
    assert summary.progress_line(FakeRun(status="starting")) == "digits: epoch 1 of 31 · step 0 of 496"


def test_a_progress_line_says_why_a_run_paused():
    run = digits(status="paused", error="the loss is nan")
    assert summary.progress_line(run) == "digits: paused at step 120: the loss is nan"


def test_a_reason_that_names_the_step_is_not_told_twice():
    run = digits(status="paused", error="paused at step 12: the loss is nan")
    assert summary.status_sentence(run) == "paused at step 12: the loss is nan"


def test_a_failure_names_step_engine_and_error():
    run = digits(status="failed", error="step 3 on engine 1: IndexError: Target 12 is out of bounds.")
    assert summary.status_sentence(run) == "failed at step 3 on engine 1: IndexError: Target 12 is out of bounds."


def test_a_pause_without_a_fault_is_told_without_a_reason():
    assert summary.status_sentence(digits(status="paused")) == "paused at step 120"


def test_a_stopped_run_says_how_far_it_came():
    run = digits(status="stopped", elapsed_seconds=61.4)
    assert summary.status_sentence(run) == "stopped at step 120 of 496 after 1 min 01 s"


def test_dead_engines_are_not_counted():
    run = digits(workers=[FakeWorker(engine=0), FakeWorker(engine=1, state="dead")])
    assert summary.status_sentence(run) == "training on 1 engine"


def test_what_last_happened_to_engines_is_told():
    run = digits(
        workers=[FakeWorker()],
        events=[
            FakeEvent(kind="joined", text="engine 0 joined", step=0, engine=0),
            FakeEvent(kind="died", text="engine 1 closed its connection", step=100, engine=1),
            FakeEvent(kind="reassigned", text="2 shards of engine 1 go to others", step=100, engine=1),
        ],
    )
    assert summary.status_sentence(run) == ("training on 1 engine; after step 100: engine 1 closed its connection")


def test_text_of_unknown_origin_is_put_on_one_line():
    assert summary.one_line("a\nb\x1b[31m\tc") == "a b [31m c"


def test_text_of_unknown_origin_is_cut():
    assert summary.one_line("x" * 500, limit=10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.94, "0.9 s"), (12.3, "12 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")],
)
def test_durations_are_told_as_a_person_would(seconds, words):
    assert summary.duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(0.31214, "0.3121"), (1e-7, "1.000e-07"), (float("nan"), "nan")])
def test_numbers_keep_what_they_say(value, words):
    assert summary.number(value) == words


def test_a_summary_tells_all_that_the_view_shows():
    worker = FakeWorker(
        engine=0, samples=7936, steps=496, compute=0.85, wait=0.05, data=0.06, idle=0.04,
        device="cpu", cores=2, cpu_percent=181.0, rss_bytes=512_000_000, memory_bytes=8_000_000_000,
        peak_rss_bytes=600_000_000, start_rss_bytes=400_000_000, shards=(0, 1, 2),
    )  # fmt: skip
    run = digits(status="finished", step=496, elapsed_seconds=4.0, workers=[worker])
    run.history.set("lr", [3e-4] * 120)
    run.history.set("grad_norm", [3.0, 1.5], steps=[50, 100])
    run.events = [FakeEvent(kind="checkpoint", text="checkpoint of step 400", step=400)]
    assert summary.summary(run).splitlines() == [
        "digits: finished after 496 steps in 4.0 s",
        "engine 0 computed 85 % of the time",
        "loss 0.3121 at step 120",
        "val_loss 0.2980 at step 120, best 0.2500 at step 80",
        "val_accuracy 0.9500 at step 120, lowest 0.8000 at step 40, highest 0.9500 at step 120",
        "learning rate 3.000e-04 at step 120",
        "gradient norm 1.5000 at step 100, lowest 1.5000 at step 100, highest 3.0000 at step 50",
        "1,984 samples/s on average",
        "engine 0 on host-a: compute 85%, wait 5%, data 6%, idle 4%; cpu, 2 cores; CPU 180 % of 200 %; "
        "memory 512 MB of 8 GB; 7,936 samples in 496 steps; share of the batch 38 %; "
        "peak 600 MB of memory, 200 MB more than before the run",
        "step 400: checkpoint of step 400",
    ]


def test_what_is_not_known_of_an_engine_is_said():
    assert summary.worker_line(FakeWorker(engine=2, state="spare")) == (
        "engine 2 (spare) on host-a: compute 60%, wait 25%, data 10%, idle 5%; device not known, cores not known; "
        "0 samples in 0 steps; not known: CPU, memory, peak memory, share of the batch"
    )


def test_a_summary_of_many_engines_tells_what_their_heat_map_shows():
    workers = [FakeWorker(engine=i, compute=i / 100, state="dead" if i == 7 else "busy") for i in range(64)]
    words = summary.summary(digits(workers=workers))
    assert "64 engines, computing: median 32 %, lowest 0 % (engine 0), highest 63 % (engine 63)" in words
    assert "✕ dead: engine 7" in words
    assert "engine 0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 8: 8," in words


def test_a_summary_of_many_engines_is_short():
    assert len(summary.summary(digits(workers=[FakeWorker(engine=i) for i in range(64)]))) < 2000


def test_a_summary_tells_the_last_events_only():
    run = digits(events=[FakeEvent(kind="set", text=f"lr of {i}", step=i) for i in range(12)])
    assert summary.summary(run).splitlines()[-6:] == [
        "last 5 events of 12:",
        *(f"step {i}: lr of {i}" for i in range(7, 12)),
    ]


def test_a_hung_engine_is_told_in_a_summary():
    run = digits(workers=[FakeWorker(engine=1, heartbeat_age_seconds=3.2)])
    assert "engine 1 (hung) on host-a" in summary.summary(run)
    assert "no word for 3 s" in summary.summary(run)


def test_shares_in_a_summary_are_those_that_are_drawn():
    run = digits(workers=[FakeWorker(compute=0.5)], recent=[FakeWorker(compute=0.75)])
    assert "compute 75%" in summary.summary(run)


@pytest.mark.parametrize("place", ["name", "error", "host", "device", "event", "key"])
def test_text_from_outside_cannot_make_lines_of_its_own(place):
    evil = "a\nb\x1b[31m\u202e" + "c" * 5000
    run = FakeRun(
        status="failed",
        name=evil if place == "name" else "digits",
        error=evil if place == "error" else None,
        workers=[FakeWorker(host=evil if place == "host" else "h", device=evil if place == "device" else None)],
        events=[FakeEvent(kind="set", text=evil if place == "event" else "x")],
        history=FakeHistory(**{f"val_{evil}" if place == "key" else "val_x": [1.0]}),
    )
    lines = summary.summary(run).split("\n")
    assert len(lines) == 5
    assert all(line.isprintable() and len(line) < 600 for line in lines)


def test_a_summary_of_a_run_without_steps_says_so():
    assert summary.summary(FakeRun(status="failed")).splitlines()[1:] == [
        "nothing was trained: the run failed before its first step",
        "no step was committed",
    ]


def test_a_best_validation_loss_is_never_nan():
    run = FakeRun(status="stopped")
    run.history.set("val_loss", [float("nan"), 0.5], steps=[4, 8])
    assert "best 0.5000 at step 8" in summary.summary(run)


def test_a_reporter_writes_at_once_and_then_once_per_interval():
    lines = reported(FakeRun(), at=[0.0, 0.2, 4.9, 5.0, 5.2, 10.1])
    assert lines == [
        "digits: epoch 1 of 31 · step 1 of 496",
        "digits: epoch 1 of 31 · step 4 of 496",
        "digits: epoch 1 of 31 · step 6 of 496",
    ]


def test_a_reporter_does_not_repeat_a_line_that_says_nothing_new():
    run = FakeRun(status="paused")
    clock, stream = Clock(), io.StringIO()
    reporter = summary.TextReporter(run, stream=stream, clock=clock)
    for clock.now in (0.0, 6.0, 12.0):
        reporter(run)
    assert stream.getvalue() == "digits: paused at step 0\n"


def test_a_reporter_tells_of_a_pause_without_waiting_for_its_turn():
    run, clock, stream = FakeRun(), Clock(), io.StringIO()
    reporter = summary.TextReporter(run, stream=stream, clock=clock)
    reporter(run)
    run.status = "paused"
    reporter(run)
    assert stream.getvalue().splitlines()[-1] == "digits: paused at step 0"


def test_a_reporter_writes_the_summary_once():
    run, stream = FakeRun(status="stopped"), io.StringIO()
    reporter = summary.TextReporter(run, stream=stream, clock=Clock())
    reporter(run)
    reporter(run)
    assert stream.getvalue() == summary.summary(run) + "\n"


def test_a_reporter_without_a_stream_writes_to_what_standard_output_is_now(capsys):
    summary.TextReporter(FakeRun(), clock=Clock())(FakeRun())
    assert capsys.readouterr().out == "digits: epoch 1 of 31 · step 0 of 496\n"


def test_a_run_of_one_epoch_is_told_by_steps_alone():
    assert summary.progress_line(FakeRun(step=3, num_steps=16)) == "digits: step 3 of 16"


def test_the_last_step_is_in_the_last_epoch():
    assert summary.place_in_run(FakeRun(step=496)) == ["epoch 31 of 31", "step 496 of 496"]


def test_of_metrics_that_are_measured_twice_the_line_has_those_of_validation():
    run = FakeRun(step=2)
    run.history.set("accuracy", [0.5, 0.6])
    run.history.set("val_accuracy", [0.7], steps=[2])
    run.history.set("f1", [0.1, 0.2])
    assert summary.latest_values(run) == ["val_accuracy 0.7000", "f1 0.2000"]
