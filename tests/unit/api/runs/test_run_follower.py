"""A run as its follower knows it: one snapshot after the other, from a hub that answers as it is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dnb.api.runs.run_follower import RunFollower
from dnb.api.runs.run_snapshot import KnownRun, RunSnapshot
from dnb.api.runs.write_back import NotebookObjects
from dnb.errors import ArgumentError, HubError
from dnb.protocol.client_messages import Done, GetRun, RunState
from dnb.protocol.measurements import RunEvent

STATE = RunState(
    status="running",
    step=3,
    num_steps=8,
    steps_per_epoch=4,
    first_step=0,
    started=1000.0,
    elapsed_seconds=1.5,
    error="",
    remote_traceback="",
    columns=(),
    workers=(),
    events=(RunEvent(step=0, time=1000.0, kind="joined", engine=0, text="engine 0 joined"),),
)
FINISHED = msgspec.structs.replace(STATE, status="finished", step=8, elapsed_seconds=4.0, events=())


class ToldHub:
    """Gives one answer after the other to who asks for a run; the last one for ever."""

    is_alive = True

    def __init__(self, *answers: RunState | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def ask(self, request: Any, _expect: Any, **_options: Any) -> tuple[Any, list[bytes]]:
        self.asked.append(request)
        if not isinstance(request, GetRun):
            return Done(), []
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer, []


class Home:
    """Stands for the notebook's objects; notes what is known of the run while they get the trained state."""

    model = object()

    def __init__(self) -> None:
        self.follower: RunFollower | None = None
        self.seen: list[tuple[str, int]] = []

    def bring_home(self, _hub: Any, _run: str, _step: int) -> None:
        assert self.follower is not None
        self.seen.append((self.follower.snapshot.status, self.follower.snapshot.step))


class Followed:
    """A follower and the snapshots that it has told of."""

    def __init__(self, folder: Path, *answers: RunState | Exception, own: Any = None) -> None:
        self.hub: Any = ToldHub(*answers)
        self.told: list[RunSnapshot] = []
        self._ended = threading.Event()
        known = KnownRun(name="digits")
        self.follower = RunFollower(known, self.hub, folder=folder, own=own or NotebookObjects(), notify=self._note)

    def _note(self) -> None:
        self.told.append(self.follower.snapshot)
        if not self.follower.snapshot.is_active:
            self._ended.set()

    def until_its_end(self) -> list[RunSnapshot]:
        self.follower.start()
        assert self._ended.wait(60)
        return self.told


def test_a_snapshot_stays_as_it_was_when_the_next_one_is_there(tmp_path: Path):
    first, last = Followed(tmp_path, STATE, FINISHED).until_its_end()
    assert (first.status, first.step, first.elapsed_seconds) == ("running", 3, 1.5)
    assert (last.status, last.step, last.elapsed_seconds) == ("finished", 8, 4.0)


def test_events_are_those_of_all_answers(tmp_path: Path):
    more = msgspec.structs.replace(FINISHED, events=(msgspec.structs.replace(STATE.events[0], engine=1),))
    followed = Followed(tmp_path, STATE, more)
    assert [event.engine for event in followed.until_its_end()[-1].events] == [0, 1]
    assert [request.seen_events for request in followed.hub.asked] == [0, 1]


def test_while_the_trained_state_comes_home_the_last_step_is_known_and_not_that_the_run_has_ended(tmp_path: Path):
    home = Home()
    followed = Followed(tmp_path, STATE, FINISHED, own=home)
    home.follower = followed.follower
    followed.until_its_end()
    assert home.seen == [("running", 8)]


def test_a_lost_hub_fails_the_run_with_its_last_step(tmp_path: Path):
    last = Followed(tmp_path, STATE, HubError("no answer")).until_its_end()[-1]
    assert (last.status, last.error) == ("failed", "the hub was lost at step 3: no answer")


def test_an_answer_that_cannot_be_understood_fails_the_run_and_says_so(tmp_path: Path, caplog: Any):
    last = Followed(tmp_path, ValueError("no text")).until_its_end()[-1]
    assert (last.status, last.error) == ("failed", "the run cannot be followed further: ValueError: no text")
    assert "run 'digits' cannot be followed" in caplog.text


def test_a_run_that_has_ended_cannot_be_paused_and_is_stopped_already(tmp_path: Path):
    followed = Followed(tmp_path, FINISHED)
    followed.until_its_end()
    followed.follower.control("stop")
    with pytest.raises(ArgumentError, match="run 'digits' is finished: there is nothing to pause"):
        followed.follower.control("pause")
    assert [type(request) for request in followed.hub.asked] == [GetRun]


def test_a_paused_run_that_is_resumed_runs_before_the_hub_is_asked_again(tmp_path: Path):
    followed = Followed(tmp_path, FINISHED)
    followed.follower.snapshot = RunSnapshot(status="paused", error="the loss is nan")
    followed.follower.control("resume")
    assert (followed.follower.snapshot.status, followed.follower.snapshot.error) == ("running", "")
