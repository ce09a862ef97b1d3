"""A pool has one run, none, or what is left of one that hubs have died of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dnb.errors import ArgumentError, HubError
from dnb.hub.handover import LOST_FILE, RUN_FILE, RunHandover, read_handover, write_handover
from dnb.hub.hub_failures import Recorder
from dnb.hub.server.lost_run import LostRun
from dnb.hub.server.no_run import NoRun
from dnb.hub.server.run_slot import RunSlot
from tests.unit.hub.server.test_lost_run import spec_of


@dataclass
class Run:
    """A run that does nothing, in whatever state."""

    spec: Any
    status: str = "running"
    is_active: bool = True
    is_over: bool = False
    has_advanced: bool = False
    asked: list[str] = field(default_factory=list)
    is_closed: bool = False

    @property
    def handover(self) -> RunHandover:
        return RunHandover(frames=(b"spec", b"job", b"data", b"signature"), clip_norm=None, mended=None, journal=None)

    def ask(self, verb: str) -> None:
        self.asked.append(verb)

    def set(self, options: dict[str, float]) -> None:
        self.asked.append(f"set {options}")

    def close(self) -> None:
        self.is_closed = True


class Opener:
    """Refuses what it is to verify."""

    def verified_spec(self, frames: Any) -> Any:
        raise HubError("a payload without this cluster's signature was refused")


@pytest.fixture
def slot(tmp_path: Path) -> RunSlot:
    return RunSlot(folders=[tmp_path], recorder=Recorder())


def held(slot: RunSlot, tmp_path: Path, **facts: Any) -> Run:
    run: Any = Run(spec_of(tmp_path), **facts)
    slot.hold(run, step=0)
    return run


def test_a_slot_without_a_run_says_so():
    slot = RunSlot(folders=[], recorder=Recorder())
    with pytest.raises(HubError, match=r"the hub does not hold a run 'digits': %dtrain status says which it holds"):
        slot.named("digits")


def test_a_slot_without_a_run_has_neither_name_nor_status(slot: RunSlot):
    assert (slot.name, slot.status, slot.active_name) == (None, None, None)


def test_a_run_is_found_by_its_name(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path)
    assert slot.named("digits") is run


def test_a_run_of_another_name_is_not_found(slot: RunSlot, tmp_path: Path):
    held(slot, tmp_path)
    with pytest.raises(HubError, match="does not hold a run 'cats'"):
        slot.named("cats")


def test_a_run_that_has_ended_has_a_name_but_is_not_active(slot: RunSlot, tmp_path: Path):
    held(slot, tmp_path, status="done", is_active=False, is_over=True)
    assert (slot.name, slot.active_name) == ("digits", None)


def test_a_run_that_is_not_over_keeps_its_place(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path)
    with pytest.raises(ArgumentError, match=r"run 'digits' is running: wait for it with %dtrain wait"):
        slot.clear()
    assert (slot.held, run.is_closed) == (run, False)


def test_a_run_that_writes_its_last_checkpoint_keeps_its_place(slot: RunSlot, tmp_path: Path):
    held(slot, tmp_path, status="done", is_active=False)
    with pytest.raises(ArgumentError, match="run 'digits' is writing its last checkpoint"):
        slot.clear()


def test_a_run_that_is_over_makes_place(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path, status="done", is_active=False, is_over=True)
    slot.clear()
    assert isinstance(slot.held, NoRun)
    assert (run.is_closed, slot.has("0")) == (True, False)


def test_a_run_is_paused_only_while_it_runs(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path, status="paused")
    with pytest.raises(ArgumentError, match="is paused, not running: there is nothing to pause"):
        slot.control("digits", "pause")
    assert run.asked == []


def test_a_run_that_is_paused_goes_on(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path, status="paused")
    slot.control("digits", "resume")
    assert run.asked == ["resume"]


def test_a_run_that_has_ended_takes_no_other_numbers(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path, status="done", is_active=False, is_over=True)
    with pytest.raises(ArgumentError, match="run 'digits' is done: there is nothing to set"):
        slot.set_options("digits", {"lr": 0.1})
    assert run.asked == []


def test_a_run_whose_numbers_were_changed_is_kept_anew(slot: RunSlot, tmp_path: Path):
    held(slot, tmp_path)
    slot.write_handover()
    slot.set_options("digits", {"lr": 0.1})
    assert slot.changed


def test_a_run_gets_other_functions_only_while_it_is_paused(slot: RunSlot, tmp_path: Path):
    held(slot, tmp_path)
    with pytest.raises(ArgumentError, match="is running, not paused: pause it before it gets other functions"):
        slot.replace_functions("digits", b"pickle", b"signature")


def test_a_run_that_was_written_down_is_not_written_again(slot: RunSlot, tmp_path: Path):
    run = held(slot, tmp_path)
    slot.write_handover()
    assert (slot.changed, read_handover([tmp_path], RUN_FILE, RunHandover)) == (False, run.handover)


def test_a_run_that_no_folder_takes_is_written_again(tmp_path: Path):
    (tmp_path / "file").touch()
    slot = RunSlot(folders=[tmp_path / "file" / "folder"], recorder=Recorder())
    held(slot, tmp_path)
    slot.write_handover()
    assert slot.changed


def test_a_hub_notes_that_it_is_at_work_on_its_run(slot: RunSlot, tmp_path: Path):
    recorder = Recorder()
    slot = RunSlot(folders=[tmp_path], recorder=recorder)
    run = held(slot, tmp_path)
    assert recorder.crash(1, lived_seconds=0.0).was_at_work
    run.status = "paused"
    slot.note_work()
    assert not recorder.crash(1, lived_seconds=0.0).was_at_work


def test_what_nobody_has_signed_is_forgotten(slot: RunSlot, tmp_path: Path):
    write_handover([tmp_path], RUN_FILE, Run(None).handover)
    opener: Any = Opener()
    slot.take_over(opener, [], engines=[])
    assert isinstance(slot.held, NoRun)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_hubs_have_died_of_says_why_to_the_hub_after(slot: RunSlot, tmp_path: Path):
    lost = LostRun(
        spec=spec_of(tmp_path),
        status="failed",
        step=3,
        started=1.0,
        elapsed_seconds=2.0,
        error="the hub died 3 times in step 3",
        remote_traceback="",
    )
    write_handover([tmp_path], LOST_FILE, lost)
    opener: Any = Opener()
    slot.take_over(opener, [], engines=[])
    assert (slot.name, slot.status, slot.active_name) == ("digits", "failed", None)
    with pytest.raises(HubError, match="run 'digits' is failed: the hub died 3 times in step 3"):
        slot.named("digits")


def test_a_run_that_was_submitted_to_the_hub_before_is_not_taken_twice(slot: RunSlot, tmp_path: Path):
    held(slot, tmp_path)
    assert slot.has("0")
    assert not slot.has("1")


def test_a_slot_without_a_run_has_none_of_any_id(slot: RunSlot):
    assert not slot.has("")
