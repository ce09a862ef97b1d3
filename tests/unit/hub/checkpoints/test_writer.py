"""Checkpoints while a run goes on: when they are written, which stay, and what a full disk does."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dnb.hub.checkpoints.format import Disk
from dnb.hub.checkpoints.reader import find_checkpoint
from dnb.protocol.run import CheckpointPolicy
from tests.unit.kept_runs import KeptRun, job_of

MakeRun = Callable[..., KeptRun]


class Gate(Disk):
    """A disk that takes files only while it is open."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def create(self, path: Path) -> int:
        self.reached.set()
        assert self.opened.wait(30)
        return super().create(path)


class Full(Disk):
    """A disk with so much room left."""

    def __init__(self, free: int = 0) -> None:
        self.free = free

    def free_bytes(self, folder: Path) -> int:
        return self.free


@pytest.fixture
def run_of(tmp_path: Path):
    runs: list[KeptRun] = []

    def make(*, disk: Disk | None = None, every: int | None = 2, keep: int = 2, best: str | None = None) -> KeptRun:
        torch.manual_seed(0)
        policy = None if every is None else CheckpointPolicy(every=every, keep=keep, best=best)
        runs.append(KeptRun(tmp_path / str(len(runs)), job_of(nn.Linear(2, 1)), disk=disk, policy=policy))
        return runs[-1]

    yield make
    for run in runs:
        gate = run.checkpoints._thread.disk
        if isinstance(gate, Gate):
            gate.opened.set()
        run.close()


def steps(run: KeptRun, number: int) -> KeptRun:
    """Steps, each with time for its checkpoint."""
    for _ in range(number):
        run.train(1).wait()
    return run


def test_every_nth_step_is_followed_by_a_checkpoint_and_the_last_two_stay(run_of: MakeRun):
    assert steps(run_of(), 7).kept_steps == [4, 6]


def test_every_checkpoint_is_an_event_with_its_step_and_place(run_of: MakeRun):
    run = steps(run_of(), 4)
    assert [(kind, step) for kind, _, step in run.events] == [("checkpoint", 2), ("checkpoint", 4)]
    assert f"step 4 is in {run.folder_of(4)} (" in run.events[1][1]


def test_without_a_policy_nothing_is_written(run_of: MakeRun):
    run = steps(run_of(every=None), 3)
    run.checkpoints.end()
    assert not (run.run_folder / "checkpoints").exists()


def test_the_best_one_stays_too(run_of: MakeRun):
    run = run_of(every=1, keep=1, best="val_loss")
    for value in (0.5, 0.1, 0.3, 0.2):
        run.train(1, owes_evaluation=True).evaluate(val_loss=value).wait()
    assert run.kept_steps == [2, 4]


def test_the_best_evaluation_so_far_gets_a_checkpoint_between_two(run_of: MakeRun):
    run = run_of(every=100, best="val_loss")
    steps(run, 3).evaluate(val_loss=0.5).wait()
    steps(run, 1).evaluate(val_loss=0.7).wait()
    assert run.kept_steps == [3]


def test_a_checkpoint_waits_for_the_evaluation_of_its_step(run_of: MakeRun):
    run = run_of(every=2, best="val_loss")
    assert not run.checkpoints.is_due("step", 2, {"loss": 1.0}, owes_evaluation=True)
    assert run.checkpoints.is_due("evaluation", 2, {"val_loss": 1.0}, owes_evaluation=False)


def test_training_goes_on_while_one_is_written_and_the_next_is_left_out(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate).train(2)
    assert gate.reached.wait(30)
    run.train(4)
    gate.opened.set()
    steps(run.wait(), 2)
    assert run.kept_steps == [6, 8]
    assert left_out(run) == ["the checkpoint of step 4 was left out, as the one before was still being written"]


def left_out(run: KeptRun) -> list[str]:
    return [text for _, text, _ in run.events if "left out" in text]


def test_a_last_checkpoint_whose_turn_comes_too_early_is_written_and_not_said_to_be_left_out(run_of: MakeRun):
    """The run ends while the checkpoint before is being written, as that of a large model was."""
    gate = Gate()
    run = run_of(disk=gate).train(2)
    assert gate.reached.wait(30)
    run.train(2)
    run.checkpoints.end()
    gate.opened.set()
    run.wait_for_end()
    assert run.kept_steps == [2, 4]
    assert [(kind, step) for kind, _, step in run.events] == [("checkpoint", 2), ("checkpoint", 4)]
    assert left_out(run) == []


def test_while_the_run_stands_still_a_checkpoint_whose_turn_came_too_early_is_written(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate).train(2)
    assert gate.reached.wait(30)
    run.train(2)
    gate.opened.set()
    run.until(lambda: run.kept_steps == [2, 4], what="that of step 4 is there")
    run.wait().train(1)
    assert left_out(run) == []


def test_a_checkpoint_that_was_left_out_of_a_run_that_fails_is_told(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate).train(2)
    assert gate.reached.wait(30)
    run.train(2)
    run.checkpoints.is_torn = True
    run.checkpoints.end()
    gate.opened.set()
    run.wait_for_end()
    assert left_out(run) == ["the checkpoint of step 4 was left out, as the one before was still being written"]


def test_the_wish_of_a_best_one_that_a_better_one_replaces_is_fulfilled(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate, every=2, keep=1, best="val_loss").train(2)
    assert gate.reached.wait(30)
    ticket = run.checkpoints.ask(None).ticket
    run.train(1).evaluate(val_loss=0.5)
    run.train(2).evaluate(val_loss=0.25)
    gate.opened.set()
    assert run.settle(ticket).path == str(run.folder_of(5))


def test_the_end_is_late_when_its_checkpoint_is_not_whole_in_time(run_of: MakeRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dnb.hub.checkpoints.writer.FINISH_SECONDS", 0.0)
    gate = Gate()
    run = run_of(disk=gate).train(3)
    run.checkpoints.end()
    assert not run.checkpoints.is_finishing
    assert run.checkpoints.shortfall.startswith("the last checkpoint, of step 3, is not whole after ")
    gate.opened.set()
    run.until(lambda: not run.checkpoints.shortfall, what="it is whole")


def test_that_the_last_one_fails_is_told_though_the_cause_was_told_before(run_of: MakeRun):
    run = steps(run_of(disk=Full(100_000)), 5)
    run.checkpoints.end()
    run.wait_for_end()
    assert [(kind, step) for kind, _, step in run.events] == [("disk", 2), ("disk", 5)]
    assert run.events[1][1].endswith("0.1 MB free; earlier checkpoints stay")


def test_the_best_so_far_waits_for_its_turn_and_is_the_state_of_its_step(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate, every=2, keep=1, best="val_loss").train(2)
    assert gate.reached.wait(30)
    run.train(1).evaluate(val_loss=0.5)
    weight = run.master.model.weight.clone()
    run.train(4)
    gate.opened.set()
    run.wait()
    assert run.kept_steps == [3]
    written = load_file(run.folder_of(3) / "model.safetensors")["weight"]
    assert torch.equal(written, weight)


def test_a_wish_is_served_once_the_one_before_is_written(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate).train(2)
    assert gate.reached.wait(30)
    ticket = run.checkpoints.ask(None).ticket
    run.train(1)
    assert run.checkpoints.state_of(ticket).state == "waiting"
    gate.opened.set()
    assert run.settle(ticket).path == str(run.folder_of(3))


def test_what_was_wished_for_stays(run_of: MakeRun):
    run = steps(run_of(keep=1), 2)
    assert run.keep().folder == run.folder_of(2)  # the one of the policy, now the user's
    assert steps(run, 4).kept_steps == [2, 6]


def test_a_wish_at_a_step_that_is_kept_writes_nothing_more(run_of: MakeRun):
    run = steps(run_of(), 2)
    before = (run.folder_of(2) / "checkpoint.json").stat().st_mtime_ns
    run.keep()
    assert (run.folder_of(2) / "checkpoint.json").stat().st_mtime_ns == before


def test_the_end_waits_for_a_last_checkpoint(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate).train(3)
    run.checkpoints.end()
    assert run.checkpoints.is_finishing
    gate.opened.set()
    run.until(lambda: not run.checkpoints.is_finishing, what="the last one is durable")
    assert run.kept_steps == [2, 3]


def test_a_run_that_ends_at_a_checkpoint_writes_it_once(run_of: MakeRun):
    run = steps(run_of(), 2)
    run.checkpoints.end()
    assert not run.checkpoints.is_finishing
    assert len(run.events) == 1


def test_a_run_that_ended_before_its_first_step_leaves_none(run_of: MakeRun):
    run = run_of()
    run.checkpoints.end()
    run.wait()
    assert run.kept_steps == []


def test_the_last_state_is_in_the_run_s_folder_though_it_was_kept_elsewhere(run_of: MakeRun, tmp_path: Path):
    run = run_of().train(3).wait()
    run.keep(tmp_path / "mine")
    run.checkpoints.end()
    assert run.wait().kept_steps == [2, 3]


def test_closing_writes_what_is_still_due(run_of: MakeRun):
    run = run_of().train(3)
    run.checkpoints.end()
    run.checkpoints.close()
    assert run.kept_steps == [2, 3]


def test_a_full_disk_is_told_once_with_what_is_needed_and_what_is_free(run_of: MakeRun):
    disk = Full(100_000)
    run = steps(run_of(disk=disk), 8)
    assert [(kind, step) for kind, _, step in run.events] == [("disk", 2)]
    text = run.events[0][1]
    assert text.startswith(f"no checkpoint of step 2: {run.folder_of(2)} cannot be written (No space left on device): ")
    assert "0.3 MB needed, 0.1 MB free; the run goes on, and earlier checkpoints stay" in text


def test_a_disk_that_has_room_again_and_is_full_again_is_told_again(run_of: MakeRun):
    disk = Full()
    run = steps(run_of(disk=disk), 2)
    disk.free = 1 << 30
    steps(run, 2)
    disk.free = 0
    steps(run, 4)
    assert [(kind, step) for kind, _, step in run.events] == [("disk", 2), ("checkpoint", 4), ("disk", 6)]


def test_what_was_durable_stays_while_the_disk_is_full(run_of: MakeRun):
    disk = Full(1 << 30)
    run = steps(run_of(disk=disk, keep=1), 2)
    disk.free = 0
    steps(run, 6)
    found, told = find_checkpoint(run.run_folder, wants=lambda _: ["job.pickle"])
    assert (found.manifest.step, told, run.hidden) == (2, [], [])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_whatever_the_system_says_is_told_and_the_run_goes_on(run_of: MakeRun, code: int):
    class Broken(Disk):
        def create(self, path: Path) -> int:
            raise OSError(code, "the reason")

    run = steps(run_of(disk=Broken()), 4)
    assert [kind for kind, _, _ in run.events] == ["disk"]
    assert "(the reason)" in run.events[0][1]
    assert run.hidden == []


def test_a_wish_on_a_full_disk_fails_with_the_same_words(run_of: MakeRun):
    run = run_of(disk=Full(), every=None).train(1)
    state = run.settle(run.checkpoints.ask(None).ticket)
    assert (state.state, state.error) == ("failed", "SpaceError")
    assert "needed" in state.message


def test_an_optimizer_whose_state_only_pickle_could_keep_is_told_by_name(run_of: MakeRun):
    run = run_of()
    run.master.optimizer.param_groups[0]["rule"] = print
    steps(run, 4)
    assert [(kind, step) for kind, _, step in run.events] == [("checkpoint", 2)]
    assert "optimizer.param_groups.0.rule is a builtin_function_or_method" in run.events[0][1]


def test_after_an_update_that_failed_half_way_nothing_is_kept(run_of: MakeRun):
    run = run_of().train(1)
    run.checkpoints.is_torn = True
    run.checkpoints.end()
    assert run.wait().kept_steps == []
    with pytest.raises(ValueError, match="failed in the middle of an update"):
        run.checkpoints.ask(None)


def test_memory_for_a_wish_is_given_back(run_of: MakeRun):
    run = run_of(every=None).train(1)
    run.keep()
    assert run.checkpoints._buffers == {}


def test_memory_of_a_policy_is_used_again(run_of: MakeRun):
    run = steps(run_of(), 2)
    address = _address(run)
    assert _address(steps(run, 2)) == address


def _address(run: KeptRun) -> Any:
    return run.checkpoints._buffers["model.safetensors"]._flat.data_ptr()
