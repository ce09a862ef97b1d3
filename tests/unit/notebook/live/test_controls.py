import html
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dnb.errors import ArgumentError
from dnb.notebook.live.controls import Controls
from dnb.notebook.text.engine_rows import engine_rows
from dnb.notebook.text.summary import summary
from tests.fake_runs import FakeEvent, FakeHistory, FakeRun, FakeWorker, advance, long_run, wait_until

WATCHED = "the kernel with pid 7 on host-a steers this pool, this one only watches: %dtrain attach --steer takes over"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StubbornRun(FakeRun):
    """A run whose hub does not answer."""

    def stop(self) -> None:
        raise RuntimeError("the hub did not answer within 5 s <b>")


class WatchedRun(FakeRun):
    """A run that another kernel steers."""

    def refuse(self) -> None:
        raise ArgumentError(WATCHED)

    pause = resume = stop = refuse

    def checkpoint(self) -> Path:
        raise ArgumentError(WATCHED)


class SlowRun(FakeRun):
    """A run whose hub takes its time; notes which thread waited for it."""

    def stop(self) -> None:
        self.stopper = threading.current_thread().name
        super().stop()


class LongCheckpoint(FakeRun):
    """A run whose checkpoint is durable when the test says so."""

    def checkpoint(self) -> Path:
        self.written = getattr(self, "written", None) or threading.Event()
        assert self.written.wait(20)
        return super().checkpoint()


def buttons(controls: Controls) -> dict[str, bool]:
    """What is written on the buttons, and whether they can be pressed."""
    shown = (controls.buttons.pause, controls.buttons.stop, controls.buttons.checkpoint)
    return {button.description: not button.disabled for button in shown}


def sent_by(controls: Controls, action) -> list:
    """Changes of what the browser shows."""
    sent = []
    for widget in controls.widgets:
        widget.observe(sent.append)
    action()
    for widget in controls.widgets:
        widget.unobserve(sent.append)
    return sent


def test_the_bar_shows_steps_of_all_steps():
    controls = Controls(FakeRun(step=124, num_steps=496))
    assert (controls.progress.value, controls.progress.max) == (124, 496)


def test_the_strip_tells_step_speed_and_time_left():
    controls = Controls(FakeRun(step=1200, num_steps=4960, samples_per_second=2410.4, seconds_left=9.2))
    assert "epoch 76 of 310 · step 1,200 of 4,960 · 2,410 samples/s · 9 s left" in controls.pace.value


def test_the_strip_says_in_words_why_a_run_paused():
    controls = Controls(FakeRun(step=12, status="paused", error="the loss is nan"))
    assert "paused at step 12: the loss is nan" in controls.status.value


def test_text_from_an_engine_is_shown_and_not_run():
    controls = Controls(FakeRun(status="failed", error="step 3 on engine 1: <img src=x onerror=alert(1)>"))
    assert "<img" not in controls.status.value
    assert "&lt;img src=x onerror=alert(1)&gt;" in controls.status.value


def test_the_name_of_a_run_is_shown_and_not_run():
    assert "&lt;b&gt;digits&lt;/b&gt;" in Controls(FakeRun(name="<b>digits</b>")).pace.value


def test_a_press_on_stop_stops_the_run():
    run = FakeRun()
    Controls(run).buttons.stop.click()
    wait_until(lambda: run.num_stops == 1)


def test_stopping_does_not_block_the_thread_of_the_callback():
    run = SlowRun()
    Controls(run).buttons.stop.click()
    wait_until(lambda: run.num_stops == 1)
    assert run.stopper == "dnb-stop-digits"


def test_stop_cannot_be_pressed_twice():
    controls = Controls(FakeRun())
    controls.buttons.stop.click()
    assert controls.buttons.stop.disabled


def test_stop_cannot_be_pressed_when_the_run_has_ended():
    run = FakeRun()
    controls = Controls(run)
    run.status = "finished"
    controls.refresh()
    assert controls.buttons.stop.disabled


def test_a_stop_that_failed_is_told():
    controls = Controls(StubbornRun())
    controls.buttons.stop.click()
    wait_until(lambda: "stop failed: the hub did not answer within 5 s &lt;b&gt;" in controls.buttons.notice.value)


def test_a_stop_that_failed_can_be_tried_again():
    controls = Controls(StubbornRun())
    controls.buttons.stop.click()
    wait_until(lambda: "stop failed" in controls.buttons.notice.value)
    assert not controls.buttons.stop.disabled


def test_a_refresh_without_news_sends_nothing():
    run = FakeRun(workers=[FakeWorker()])
    controls = Controls(run)
    sent = []
    for widget in controls.widgets:
        widget.observe(sent.append)
    controls.refresh()
    assert sent == []


def test_the_bar_does_not_end_before_the_run():
    run = FakeRun(step=0, num_steps=0, status="starting")
    assert Controls(run).progress.max == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("starting", {"Pause": False, "Stop": True, "Checkpoint": False}),
        ("running", {"Pause": True, "Stop": True, "Checkpoint": True}),
        ("paused", {"Resume": True, "Stop": True, "Checkpoint": True}),
        ("finished", {"Pause": False, "Stop": False, "Checkpoint": False}),
        ("failed", {"Pause": False, "Stop": False, "Checkpoint": False}),
        ("stopped", {"Pause": False, "Stop": False, "Checkpoint": False}),
    ],
)
def test_buttons_can_be_pressed_while_they_apply(status, expected):
    assert buttons(Controls(FakeRun(status=status))) == expected


def test_a_press_on_pause_pauses_the_run():
    run = FakeRun()
    Controls(run).buttons.pause.click()
    wait_until(lambda: run.num_pauses == 1)


def test_a_press_on_resume_lets_a_paused_run_go_on():
    run = FakeRun(status="paused")
    Controls(run).buttons.pause.click()
    wait_until(lambda: run.num_resumes == 1)


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("pause", "running", "Pausing"),
        ("pause", "paused", "Resuming"),
        ("stop", "running", "Stopping"),
        ("checkpoint", "running", "Writing"),
    ],
)
def test_a_press_is_seen_at_once_and_cannot_be_repeated(name, status, told):
    run = LongCheckpoint(status=status)
    run.written = threading.Event()
    controls = Controls(run)
    getattr(controls.buttons, name).click()
    assert buttons(controls)[told] is False
    run.written.set()


def test_pausing_ends_when_the_run_stands_still():
    run = FakeRun()
    controls = Controls(run)
    controls.buttons.pause.click()
    wait_until(lambda: run.num_pauses == 1)
    run.status = "paused"
    controls.refresh()
    assert buttons(controls)["Resume"]


def test_the_effect_of_a_press_is_shown_as_soon_as_the_run_tells_of_it():
    run = FakeRun()
    controls = Controls(run)
    controls.buttons.pause.click()
    wait_until(lambda: run.num_pauses == 1)
    run.status = "paused"
    run.tell()
    assert buttons(controls)["Resume"]


def test_nobody_listens_when_nothing_was_pressed():
    run = FakeRun()
    controls = Controls(run)
    assert run.listeners == []
    for _ in range(2):
        controls.buttons.checkpoint.click()
        wait_until(lambda: buttons(controls).get("Checkpoint", False))
    run.tell()
    assert run.listeners == []


def test_a_pause_that_somebody_took_back_can_be_asked_for_again():
    run = FakeRun(step=10)
    controls = Controls(run)
    controls.buttons.pause.click()
    wait_until(lambda: controls.buttons._pending.get("pause") == 10)
    run.step = 13
    controls.refresh()
    assert buttons(controls)["Pause"]


def test_a_checkpoint_is_told_with_its_folder():
    controls = Controls(FakeRun(step=12))
    controls.buttons.checkpoint.click()
    wait_until(lambda: "checkpoint written: /work/checkpoints/step-12" in controls.buttons.notice.value)
    assert buttons(controls)["Checkpoint"]


@pytest.mark.parametrize(
    ("name", "status", "verb"),
    [
        ("pause", "running", "pause"),
        ("pause", "paused", "resume"),
        ("stop", "running", "stop"),
        ("checkpoint", "running", "checkpoint"),
    ],
)
def test_a_kernel_that_only_watches_is_told_so(name, status, verb):
    controls = Controls(WatchedRun(status=status))
    getattr(controls.buttons, name).click()
    wait_until(lambda: f"{verb} failed: {WATCHED}" in html.unescape(controls.buttons.notice.value))


def test_a_failure_is_forgotten_when_the_next_press_succeeds():
    run = WatchedRun()
    controls = Controls(run)
    controls.buttons.pause.click()
    wait_until(lambda: "failed" in controls.buttons.notice.value)
    run.pause = lambda: None
    controls.buttons.pause.click()
    wait_until(lambda: controls.buttons.notice.value == "")


def test_a_failure_is_spoken():
    controls = Controls(StubbornRun())
    controls.buttons.stop.click()
    wait_until(lambda: 'role="alert"' in controls.buttons.notice.value)


def test_every_button_has_its_name_in_words():
    assert all(buttons(Controls(FakeRun())))


def test_another_axis_is_told_to_whoever_draws():
    chosen = []
    controls = Controls(FakeRun(), on_axis=chosen.append)
    controls.choices.axis.value = "time"
    assert chosen == ["time"]


def test_axes_are_step_samples_and_time():
    assert Controls(FakeRun()).choices.axis.options == ("step", "samples", "time")


def test_an_axis_and_a_scale_can_be_chosen_when_nobody_draws():
    controls = Controls(FakeRun())
    controls.choices.axis.value = "samples"
    controls.choices.log_loss.value = True


def test_a_scale_of_the_loss_is_told_to_whoever_draws():
    chosen = []
    controls = Controls(FakeRun(), on_loss_scale=chosen.append)
    controls.choices.log_loss.value = True
    controls.choices.log_loss.value = False
    assert chosen == ["log", "linear"]


def test_the_strip_has_a_sentence_of_diagnosis():
    controls = Controls(FakeRun(step=9, workers=[FakeWorker(compute=0.93, wait=0.0, data=0.0, idle=0.07)]))
    assert "<b>diagnosis</b>: engine 0 computes 93 % of the time" in controls.diagnosis.value


def test_the_strip_has_a_row_for_each_engine():
    run = FakeRun(workers=[FakeWorker(engine=0), FakeWorker(engine=1, state="dead")])
    assert Controls(run).engines.rows == engine_rows(run) != []


def test_many_engines_are_a_heat_map_in_the_place_of_rows():
    controls = Controls(FakeRun(workers=[FakeWorker(engine=engine) for engine in range(13)]))
    assert (controls.engines.rows, controls.engines.crowd.count("<table>")) == ([], 1)


def test_an_error_looks_like_one():
    run = FakeRun(status="paused", error="step 3: ValueError: no")
    assert "--jp-error-color1" in Controls(run).status.value
    assert "--jp-error-color1" not in Controls(FakeRun(status="paused")).status.value


def test_a_step_that_failed_can_be_tried_again_and_is_not_said_to_go_on():
    assert "Retry" in buttons(Controls(FakeRun(status="paused", error="step 3: ValueError: no")))


def test_rows_are_sent_at_most_twice_a_second():
    run, clock = FakeRun(workers=[FakeWorker()]), Clock()
    controls = Controls(run, clock=clock)
    seen = []
    controls.engines.observe(seen.append, names="rows")
    for clock.now in (0.1, 0.2, 0.3, 0.49, 0.5, 0.6, 0.9, 1.0):
        run.workers = [replace(run.workers[0], samples=run.workers[0].samples + 100)]
        controls.refresh()
    assert len(seen) == 2


def test_an_end_is_shown_without_waiting_for_its_turn():
    run, clock = FakeRun(workers=[FakeWorker(samples=12_345)]), Clock()
    controls = Controls(run, clock=clock)
    run.status = "finished"
    controls.refresh()
    assert ["samples", "12,345 in 0 steps"] in controls.engines.rows[0]["more"]


def test_a_second_of_refreshes_with_four_engines_sends_less_than_12_kilobytes():
    run, clock = long_run(num_steps=5000), Clock()
    controls = Controls(run, clock=clock)
    sent = []
    for widget in controls.widgets:
        widget.comm.send = lambda data, **_: sent.append(json.dumps(data))
    for clock.now in (0.35, 0.7, 1.05):
        advance(run)
        run.workers = [replace(worker, samples=worker.samples + 100) for worker in run.workers]
        controls.refresh()
    assert 0 < sum(map(len, sent)) < 12_000


def test_the_chart_is_told_in_words_line_by_line():
    run = FakeRun(step=3, history=FakeHistory(loss=[0.5, 0.4, 0.3]), workers=[FakeWorker()])
    told = html.unescape(Controls(run).words.value).removeprefix("<ul><li>").removesuffix("</li></ul>")
    assert told.split("</li><li>") == summary(run).splitlines()


def test_words_are_sent_at_most_every_two_seconds():
    run, clock = FakeRun(workers=[FakeWorker()]), Clock()
    controls = Controls(run, clock=clock)
    seen = []
    controls.words.observe(seen.append, names="value")
    for clock.now in (0.5, 1.0, 1.9, 2.0, 2.5, 3.9):
        advance(run)
        controls.refresh()
    assert len(seen) == 1


def test_what_opens_the_words_is_never_sent_again():
    run, clock = FakeRun(workers=[FakeWorker()]), Clock()
    controls = Controls(run, clock=clock)
    (head,) = [widget for widget in controls.widgets if "<details>" in str(getattr(widget, "value", ""))]
    before = head.value
    clock.now = 10.0
    assert all(change["owner"] is not head for change in sent_by(controls, lambda: (advance(run), controls.refresh())))
    assert head.value == before


def test_news_of_the_diagnosis_are_spoken_and_changed_figures_are_not():
    worker = FakeWorker(compute=0.93, wait=0.0, data=0.0, idle=0.0)
    run, clock = FakeRun(step=9, workers=[worker]), Clock()
    controls = Controls(run, clock=clock)
    assert 'aria-live="polite"' in controls.diagnosis.value
    run.workers, clock.now = [replace(worker, compute=0.88)], 2.0
    controls.refresh()
    assert "88 %" in controls.diagnosis.value
    assert 'aria-live="off"' in controls.diagnosis.value


def test_news_of_the_status_are_spoken():
    run = FakeRun(workers=[FakeWorker()])
    controls = Controls(run)
    run.status = "paused"
    controls.refresh()
    assert 'aria-live="polite"' in controls.status.value


def test_the_pace_is_not_spoken():
    assert "aria-live" not in Controls(FakeRun(samples_per_second=10.0)).pace.value


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><b onclick=x>'])
def test_nothing_from_outside_is_markup_anywhere_in_the_strip(evil):
    run = FakeRun(
        name=evil,
        status="paused",
        step=3,
        error=evil,
        history=FakeHistory(**{"loss": [0.5], f"val_{evil}": [0.5]}),
        workers=[FakeWorker(host=evil, device=evil), FakeWorker(engine=1, host=evil, state="dead")],
        events=[FakeEvent(kind=evil, text=evil, step=1), FakeEvent(kind="died", text=evil, step=2, engine=1)],
    )
    controls = Controls(run)
    values = [widget.value for widget in controls.widgets if isinstance(getattr(widget, "value", None), str)]
    assert not any(evil in value for value in values)
    assert sum(html.escape(evil) in value for value in values) >= 3


def test_everything_in_the_strip_is_closed_with_it():
    controls = Controls(FakeRun())

    def inside(box) -> set:
        return {box, *(deeper for child in getattr(box, "children", ()) for deeper in inside(child))}

    assert inside(controls.box) == set(controls.widgets)
