import threading

from dnb.notebook.controls import Controls
from tests.fake_runs import FakeRun, FakeWorker, wait_until


class StubbornRun(FakeRun):
    """A run whose hub does not answer."""

    def stop(self) -> None:
        raise RuntimeError("the hub did not answer within 5 s <b>")


class SlowRun(FakeRun):
    """A run whose hub takes its time; notes which thread waited for it."""

    def stop(self) -> None:
        self.stopper = threading.current_thread().name
        super().stop()


def test_the_bar_shows_steps_of_all_steps():
    controls = Controls(FakeRun(step=124, num_steps=496))
    assert (controls.progress.value, controls.progress.max) == (124, 496)


def test_the_strip_tells_step_speed_and_time_left():
    controls = Controls(FakeRun(step=1200, num_steps=4960, samples_per_second=2410.4, seconds_left=9.2))
    assert "step 1,200 of 4,960, 2,410 samples/s, 9 s left" in controls.pace.value


def test_the_strip_says_in_words_why_a_run_paused():
    controls = Controls(FakeRun(step=12, status="paused", error="the loss is nan"))
    assert "paused at step 12: the loss is nan" in controls.status.value


def test_text_from_an_engine_is_shown_and_not_run():
    controls = Controls(FakeRun(status="failed", error="step 3 on engine 1: <img src=x onerror=alert(1)>"))
    assert "<img" not in controls.status.value
    assert "&lt;img src=x onerror=alert(1)&gt;" in controls.status.value


def test_the_name_of_a_run_is_shown_and_not_run():
    assert "&lt;b&gt;digits&lt;/b&gt;" in Controls(FakeRun(name="<b>digits</b>")).status.value


def test_a_press_on_stop_stops_the_run():
    run = FakeRun()
    Controls(run).stop_button.click()
    wait_until(lambda: run.num_stops == 1)


def test_stopping_does_not_block_the_thread_of_the_callback():
    run = SlowRun()
    Controls(run).stop_button.click()
    wait_until(lambda: run.num_stops == 1)
    assert run.stopper == "dnb-stop-digits"


def test_stop_cannot_be_pressed_twice():
    controls = Controls(FakeRun())
    controls.stop_button.click()
    assert controls.stop_button.disabled


def test_stop_cannot_be_pressed_when_the_run_has_ended():
    run = FakeRun()
    controls = Controls(run)
    run.status = "finished"
    controls.refresh()
    assert controls.stop_button.disabled


def test_a_stop_that_failed_is_told():
    controls = Controls(StubbornRun())
    controls.stop_button.click()
    wait_until(lambda: "stop failed: the hub did not answer within 5 s &lt;b&gt;" in controls.status.value)


def test_a_stop_that_failed_can_be_tried_again():
    controls = Controls(StubbornRun())
    controls.stop_button.click()
    wait_until(lambda: "stop failed" in controls.status.value)
    assert not controls.stop_button.disabled


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
