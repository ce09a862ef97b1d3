"""What is known of a hub's end, and what the next one concludes from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from dnb.hub.guarded_calls import UserCodeError
from dnb.hub.hub_failures import (
    FAIL_DEATHS,
    SAME_DEATHS,
    SAME_KILLS,
    SHUN_DEATHS,
    Caution,
    Crash,
    Recorder,
    caution_after,
    num_idle_deaths,
    restarts_of,
)

FAULT = """Fatal Python error: Segmentation fault

Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007e (most recent call first):
  File "/home/a b/train.py", line 12 in step
  File "/home/dnb/hub/optimizers.py", line 200 in step
"""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder()
    made.reset()
    yield made
    os.close(made.descriptor)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


def crash(**options: Any) -> Crash:
    return Crash(
        **{
            "cause": "ValueError in _tick (service.py:7)",
            "reason": "ValueError: seven",
            "traceback": "",
            "time": 0.0,
            "lived_seconds": 0.3,
            "num_commits": 0,
            "step": 30,
            "run": "r1",
            "was_at_work": True,
            "was_healthy": False,
            **options,
        }
    )


# what is recorded


def test_an_exception_is_told_with_its_place_and_traceback(recorder: Recorder):
    recorder.hold("r1", step=12)
    recorder.set_at_work(True)
    recorder.count_commit(13)
    recorder.leave(raised(ValueError("seven")))
    found = recorder.crash(1, lived_seconds=0.5)
    assert found.reason.startswith("ValueError: seven (in raised (test_hub_failures.py:")
    assert "raise error" in found.traceback
    assert (found.run, found.step, found.num_commits, found.was_at_work, found.was_healthy) == (
        "r1",
        13,
        1,
        True,
        False,
    )


def test_two_exceptions_from_one_place_have_one_cause_whatever_they_say(recorder: Recorder):
    causes = set()
    for text in ("seven", "at 0x7f8e"):
        recorder.reset()
        recorder.leave(raised(ValueError(text)))
        causes.add(recorder.crash(1, lived_seconds=0.5).cause)
    assert len(causes) == 1


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError("\ud800"), ValueError("x" * 10**6)])
def test_whatever_was_raised_can_be_told(recorder: Recorder, error: BaseException):
    recorder.leave(raised(error))
    found = recorder.crash(1, lived_seconds=0.5)
    assert found.reason.startswith(type(error).__name__)
    assert len(msgspec.json.encode(found)) < 100_000


def test_of_user_code_it_is_told_what_that_has_raised(recorder: Recorder):
    recorder.leave(UserCodeError("in the scheduler", raised(ValueError("seven"))))
    found = recorder.crash(1, lived_seconds=0.5)
    assert found.reason.startswith("ValueError: seven (in the scheduler, in raised (test_hub_failures.py:")


def test_a_signal_is_named(recorder: Recorder):
    found = recorder.crash(-9, lived_seconds=0.5)
    assert (found.cause, found.reason) == ("SIGKILL", "it was ended by SIGKILL")


def test_a_native_crash_is_told_with_the_python_line_that_led_to_it(recorder: Recorder):
    os.write(recorder.descriptor, FAULT.encode())
    found = recorder.crash(-11, lived_seconds=0.5)
    assert found.reason == "it was ended by SIGSEGV in step (train.py:12)"
    assert "optimizers.py" in found.traceback


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_ends_without_a_word_is_a_crash_whatever_its_code(recorder: Recorder, code: int):
    assert not recorder.has_ended_as_meant
    assert f"ended with code {code}" in recorder.crash(code, lived_seconds=0.5).reason


def test_an_end_that_is_meant_is_no_crash(recorder: Recorder):
    recorder.end_as_meant()
    assert recorder.has_ended_as_meant


def test_a_hub_shares_the_record_with_its_guardian_and_the_next_one_begins_anew(recorder: Recorder):
    Recorder(os.dup(recorder.descriptor)).count_commit(5)
    assert recorder.crash(-9, lived_seconds=0.5).num_commits == 1
    recorder.leave(raised(ValueError("seven")))
    recorder.reset()
    found = recorder.crash(1, lived_seconds=0.5)
    assert (found.num_commits, found.step, "seven" in found.reason) == (0, 0, False)


def test_a_hub_that_lives_long_was_of_use(recorder: Recorder):
    assert recorder.crash(-9, lived_seconds=5.0).was_healthy


# what is concluded


def test_one_crash_makes_nobody_cautious():
    assert caution_after([crash()]) is Caution.NONE
    assert caution_after([]) is Caution.NONE


def test_hubs_that_die_at_once_of_whatever_give_the_run_up_and_then_leave_it_alone():
    crashes = [crash(cause=f"cause {number}", step=number) for number in range(SHUN_DEATHS)]
    assert caution_after(crashes[: FAIL_DEATHS - 1]) is Caution.NONE
    assert caution_after(crashes[:FAIL_DEATHS]) is Caution.FAIL
    assert caution_after(crashes) is Caution.SHUN
    assert num_idle_deaths(crashes) == SHUN_DEATHS


def test_one_cause_in_one_step_gives_the_run_up_however_long_hubs_live():
    crashes = [crash(num_commits=30, lived_seconds=60.0, was_healthy=True)]
    crashes += [crash(lived_seconds=60.0, was_healthy=True)] * (SAME_DEATHS - 1)
    assert caution_after(crashes[:-1]) is Caution.NONE
    assert caution_after(crashes) is Caution.FAIL


@pytest.mark.parametrize(
    "differs",
    [
        {"step": 31, "num_commits": 1, "was_healthy": True},
        {"cause": "another", "was_healthy": True},
        {"run": "r2", "was_healthy": True},
        {"was_at_work": False, "was_healthy": True},
    ],
    ids=str,
)
def test_progress_or_another_cause_or_run_or_a_pause_between_makes_nobody_cautious(differs: dict[str, Any]):
    alike = crash(was_healthy=True)
    crashes = [alike] * (SAME_DEATHS - 1) + [msgspec.structs.replace(alike, **differs)]
    assert caution_after(crashes) is Caution.NONE


def test_deaths_with_progress_between_them_never_end_a_run():
    crashes = [crash(step=number, num_commits=1, was_healthy=True) for number in range(100)]
    assert caution_after(crashes) is Caution.NONE
    assert num_idle_deaths(crashes) == 0


def test_whoever_kills_hubs_may_do_so_more_often():
    killed = crash(cause="SIGKILL", was_healthy=True, lived_seconds=3.0)
    assert caution_after([killed] * (SAME_KILLS - 1)) is Caution.NONE
    assert caution_after([killed] * SAME_KILLS) is Caution.FAIL


def test_people_are_told_when_why_and_from_where():
    (told,) = restarts_of([crash(time=3.0, traceback="Traceback ...")])
    assert (told.time, told.reason, told.traceback) == (3.0, "ValueError: seven", "Traceback ...")
