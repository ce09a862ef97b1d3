import os
import types

import pytest

from dnb.errors import HubError
from dnb.notebook.control_panel.state import PanelState, look, obstacles, pool_sentence, run_sentence
from dnb.protocol.pool import Process
from dnb.transport.system.processes import this_process
from tests.fake_runs import FakeRun

TWO = ((0, "busy", "host-a"), (1, "ready", "host-a"))
TRAINING = PanelState(engines=TWO, run="digits", status="running", is_held=True)


class FakePool:
    def __init__(self, *, run=None, held=None, owner=None):
        self.run = held
        self.trouble = ""
        self.facts = types.SimpleNamespace(run=run, run_status="running" if run else None, owner=owner)
        self.engines = [types.SimpleNamespace(id=0, state="ready", host="host-a")]


def allowed(now: PanelState, **lines: str) -> set[str]:
    return {action for action, reason in obstacles(now, **lines).items() if not reason}


def test_without_a_pool_one_can_start_plan_and_attach():
    assert allowed(PanelState()) == {"start", "plan", "attach"}


def test_with_a_pool_and_no_run_one_can_train():
    assert allowed(PanelState(engines=TWO)) == {"add", "remove", "shutdown", "plan", "fit", "attach"}


def test_a_run_that_trains_can_be_steered_and_there_is_no_second_one():
    steering = {"pause", "stop", "set", "checkpoint", "dashboard"}
    assert allowed(TRAINING) == {"add", "remove", "shutdown", "plan"} | steering
    assert obstacles(TRAINING)["fit"] == "run digits is running: stop it, or wait for its end"


def test_a_paused_run_is_resumed():
    now = PanelState(engines=TWO, run="digits", status="paused", is_held=True)
    assert {"resume", "stop"} <= allowed(now)
    assert "pause" not in allowed(now)


def test_a_run_that_has_ended_can_be_looked_at_and_the_next_one_started():
    now = PanelState(engines=TWO, run="digits", status="finished", is_held=True)
    assert allowed(now) == {"add", "remove", "shutdown", "plan", "fit", "dashboard"}


def test_a_run_that_this_kernel_does_not_hold_is_attached_to_first():
    now = PanelState(engines=TWO, run="digits", status="running")
    assert "attach" in allowed(now)
    assert obstacles(now)["stop"] == "attach to the run first"


def test_a_pool_that_another_kernel_steers_is_only_watched():
    now = PanelState(engines=TWO, run="digits", status="running", is_held=True, steered_by=77)
    assert allowed(now) == {"shutdown", "plan", "attach", "dashboard"}
    assert "the kernel with pid 77 steers it, this one watches" in pool_sentence(now)


def test_a_run_can_be_steered_while_engines_are_added():
    assert {"pause", "stop", "set"} <= allowed(TRAINING, pool_line="add 2")
    assert obstacles(TRAINING, pool_line="add 2")["remove"] == "waits for %dtrain add 2"


def test_a_pool_in_a_sentence():
    assert pool_sentence(PanelState(engines=TWO)) == "2 engines on host-a: 0 is busy, 1 is ready"


def test_many_engines_are_counted():
    now = PanelState(engines=tuple((engine, "busy", "host-a") for engine in range(64)))
    assert pool_sentence(now).endswith("15 is busy, 48 more")


def test_a_hub_that_does_not_answer_is_told_in_place_of_the_pool():
    class Lost:
        @property
        def facts(self):
            raise HubError("the hub\nis gone")

    assert pool_sentence(look(Lost())) == "no pool is running; the hub is gone"


def test_a_look_at_a_pool_finds_the_run_that_this_kernel_holds():
    run = FakeRun(status="paused")
    now = look(FakePool(run="digits", held=run, owner=this_process()))
    assert now == PanelState(engines=((0, "ready", "host-a"),), run="digits", status="paused", is_held=True)


def test_a_look_at_a_pool_finds_who_steers_it():
    stranger = Process(host="elsewhere", pid=os.getpid(), create_time=0.0)
    assert look(FakePool(run="digits", owner=stranger)).steered_by == os.getpid()


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (PanelState(), "no run"),
        (
            PanelState(engines=TWO, run="digits", status="running"),
            "run digits is running; this kernel does not hold it",
        ),
    ],
)
def test_the_run_in_a_sentence(now, expected):
    assert run_sentence(now) == expected
