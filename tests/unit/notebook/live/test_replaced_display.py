import json

import pytest

from dnb.notebook.live.replaced_display import INTERVAL_SECONDS, ReplacedDisplay, pause_after
from dnb.notebook.pages.snapshot import PLOTLY_MIME, bundle
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, long_run, wait_until


@pytest.fixture
def run() -> FakeRun:
    return FakeRun(step=2, history=FakeHistory(loss=[0.5, 0.25]), workers=[FakeWorker()])


class Shown(list):
    def __call__(self, content, *, display_id, update=False):
        self.append((content, display_id, update))


def displayed(run: FakeRun, draw=None) -> tuple[ReplacedDisplay, Shown]:
    shown, draw = Shown(), draw or in_words
    display = ReplacedDisplay(run, publish=shown, draw=draw)
    display.show()
    return display, shown


def in_words(run: FakeRun) -> dict[str, str]:
    return {"text/plain": f"drawn {run.status}"}


def end(run: FakeRun, display: ReplacedDisplay) -> None:
    run.end("finished")
    assert display.join(timeout_seconds=30.0)


def test_a_line_is_there_at_once(run):
    display, shown = displayed(run)
    assert shown[0][0] == {"text/plain": "digits: epoch 1 of 31 · step 2 of 496 · loss 0.2500"}
    end(run, display)


def test_chart_image_and_words_take_its_place(run):
    shown = Shown()
    display = ReplacedDisplay(run, publish=shown)
    display.show()
    wait_until(lambda: len(shown) > 1)
    content, display_id, is_update = shown[1]
    assert (set(content), display_id, is_update) == (
        {PLOTLY_MIME, "image/png", "text/plain"},
        shown[0][1],
        True,
    )
    end(run, display)


def test_a_refresh_of_a_long_run_is_under_200_kilobytes():
    content = bundle(long_run(), with_image=True)
    assert len(json.dumps(content)) < 200_000


def test_the_last_thing_shown_is_the_end(run):
    display, shown = displayed(run)
    end(run, display)
    assert shown[-1][0]["text/plain"] == "drawn finished"


def test_a_second_cell_gets_a_display_that_is_kept_up_to_date_too(run):
    display, shown = displayed(run)
    display.show()
    end(run, display)
    first, second = (display_id for _, display_id, is_update in shown if not is_update)
    assert [display_id for _, display_id, _ in shown[-2:]] == [first, second]


def test_a_cell_that_comes_after_the_end_gets_the_end(run):
    display, shown = displayed(run)
    end(run, display)
    display.show()
    content, _, is_update = shown[-1]
    assert (content["text/plain"], is_update) == ("drawn finished", False)


def test_a_picture_that_fails_does_not_hide_the_next_one(run, caplog):
    faults = iter([ZeroDivisionError()])

    def fail_once(run):
        for fault in faults:
            raise fault
        return in_words(run)

    display, shown = displayed(run, fail_once)
    wait_until(lambda: "could not be painted" in caplog.text)
    end(run, display)
    assert shown[-1][0]["text/plain"] == "drawn finished"


def test_a_cell_that_waits_brings_the_end_once_more_and_only_once(run):
    display, shown = displayed(run)
    end(run, display)
    num_shown = len(shown)
    for _ in range(2):
        run.wait_hooks[0](run)
    assert [content["text/plain"] for content, _, _ in shown[num_shown:]] == ["drawn finished"]


def test_a_cell_that_waits_brings_nothing_before_the_end(run):
    display, shown = displayed(run)
    wait_until(lambda: len(shown) > 1)
    run.wait_hooks[0](run)
    assert len(shown) == 2
    end(run, display)


def test_nobody_is_called_back_after_the_end(run):
    display, _ = displayed(run)
    end(run, display)
    assert run.listeners == []


def test_a_refresh_comes_every_two_seconds():
    assert pause_after(0.05) == INTERVAL_SECONDS == 2.0


def test_pictures_that_take_long_take_no_more_than_a_twentieth_of_the_time():
    assert pause_after(0.4) == pytest.approx(7.6)


def test_the_first_picture_which_imports_much_does_not_hold_up_the_second():
    assert pause_after(3.0) == 10.0
