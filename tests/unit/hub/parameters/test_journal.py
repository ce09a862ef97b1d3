"""Hubs are killed while they commit; the next one must go on as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnb.hub.parameters.journal import JournalFull, Unrecoverable, create_journal
from dnb.hub.parameters.master import Contribution, Master
from dnb.hub.parameters.recovery import recover_master
from dnb.job import Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.measurements import Sums
from dnb.protocol.memory import SegmentRef
from tests.unit.journal_nursery import CASES

ROOT = Path(__file__).parents[4]
FORWARD = [name for name, case in CASES.items() if isinstance(case.optimizer, str)] + ["groups"]
SMALL_BACK = ["plain adam", "momentum", "user's optimizer", "thawed momentum"]


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory):
    """Let hubs live and die by order; what is wrong with those that followed."""
    folder = tmp_path_factory.mktemp("nursery")
    command = [sys.executable, "-m", "tests.unit.journal_nursery", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as fork_server:
        assert fork_server.stdin is not None
        assert fork_server.stdout is not None

        def give(case: str, how: str, **options: Any) -> str:
            fork_server.stdin.write(json.dumps({"case": case, "how": how, **options}) + "\n")
            fork_server.stdin.flush()
            return json.loads(fork_server.stdout.readline())

        yield give
        fork_server.stdin.close()


Order = Callable[..., str]


@pytest.mark.parametrize("case", CASES)
def test_a_journal_changes_no_bit_and_leaves_no_file(order: Order, case: str):
    assert order(case, "not at all") == ""


@pytest.mark.parametrize("case", [*FORWARD, *SMALL_BACK])
def test_a_hub_that_dies_in_the_middle_of_an_update_loses_nothing(order: Order, case: str):
    places = ["update", "scheduler"] if case in FORWARD else ["step", "scheduler"]
    assert order(case, "in the update", **{"in": places}) == ""


@pytest.mark.parametrize("case", ["every kind of tensor", "momentum", "user's optimizer", "thawed", "thawed momentum"])
def test_a_hub_that_dies_at_any_store_of_its_journal_loses_nothing(order: Order, case: str):
    assert order(case, "at a store", stores=range_of(case)) == ""


def range_of(case: str) -> list[int]:
    """Stores of the first two steps; rolling forward has one before and one after each chunk."""
    return list(range(1, 15)) if case in ("every kind of tensor", "thawed") else list(range(1, 9))


@pytest.mark.parametrize("case", ["adamw", "every kind of tensor", "groups", "momentum"])
def test_hubs_that_die_again_and_again_lose_nothing(order: Order, case: str):
    assert order(case, "again and again", times=3) == ""


@pytest.mark.parametrize("case", ["adam with two threads", "every kind of tensor", "user's optimizer"])
def test_hubs_that_die_at_random_moments_lose_nothing(order: Order, case: str):
    assert order(case, "at random moments", times=2) == ""


def test_an_update_of_which_there_is_no_copy_is_torn(order: Order):
    assert order("no room for a copy", "in the update", **{"in": ["step"]}, wanted="torn") == ""


@pytest.mark.parametrize(("kind", "stores"), [("before", [1, 2, 5]), ("after", [1, 3, 4])])
def test_an_optimizer_that_is_not_copied_loses_nothing_between_its_updates(order: Order, kind: str, stores: list[int]):
    """The update of the first step lies between the second store and the third, the next between 5 and 6."""
    assert order("no room for a copy", "at a store", stores=stores, kinds=[kind]) == ""


# in one process -------------------------------------------------------------------------------------------


def job_of(optimizer: Any = "adamw") -> Job:
    torch.manual_seed(0)
    return Job(
        model=nn.Linear(3, 2),
        loss=None,
        step=None,
        metrics={},
        optimizer=optimizer,
        lr=0.1 if isinstance(optimizer, str) else None,
        scheduler=None,
        order=BatchOrder(num_samples=8, batch_size=4),
    )


@pytest.fixture
def masters(tmp_path: Path):
    made: list[Master] = []

    def make(optimizer: Any = "adamw") -> Master:
        made.append(Master(job_of(optimizer), folders=[tmp_path], prefix="run", clip_norm=2.0))
        made[-1].keep_journal(step=0, evaluated=0)
        return made[-1]

    yield make
    for master in made:
        master.drop_slabs()
        master.close()


Make = Callable[..., Master]


def commit(master: Master, *, kind: Any = "memory", **options: Any) -> dict[str, float]:
    master.add_slabs(0, 1, kind=kind)
    for gradient in master.slabs_of(0)[0].gradients:
        gradient.fill_(0.5)
    sums = Sums(loss_total=2.0, loss_weight=4, metric_totals={}, metric_weights={}, num_samples=4)
    return master.commit([Contribution(0, 0, 0, sums, False)], **options).values


def recover(master: Master, tmp_path: Path, optimizer: Any = "adamw"):
    assert master.journal_ref is not None
    return recover_master(job_of(optimizer), journal=master.journal_ref, folders=[tmp_path], prefix="run")


def test_what_the_history_is_to_say_is_in_the_journal(masters: Make, tmp_path: Path):
    master = masters()
    commit(master, describe=lambda result: {"loss": result.loss, "samples_per_second": 7.0})
    assert recover(master, tmp_path)[1].values == {"loss": 0.5, "samples_per_second": 7.0}


def test_an_evaluation_is_committed(masters: Make, tmp_path: Path):
    master = masters()
    commit(master)
    master.commit_evaluation(1, {"val_loss": 0.25})
    last = recover(master, tmp_path)[1]
    assert (last.step, last.evaluated, last.kind, last.values) == (1, 1, "evaluation", {"val_loss": 0.25})


def test_moments_are_written_down_as_they_are_when_a_function_is_called_after_each_update(tmp_path: Path):
    plain = job_of().model
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    job = dataclasses.replace(job_of(), after_step=lambda _: None)
    master = Master(job, folders=[tmp_path], prefix="run", clip_norm=None)
    master.keep_journal(step=0, evaluated=0)
    for _ in range(4):
        commit(master)
        for parameter in plain.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    found, _ = recover(master, tmp_path)
    expected = optimizer.state_dict()["state"]
    state = found.optimizer.state_dict()["state"]
    found.drop_slabs()
    found.close()
    assert all(torch.equal(state[n][key], expected[n][key]) for n in (0, 1) for key in ("exp_avg", "step"))


def test_a_run_that_goes_on_from_a_checkpoint_begins_there(tmp_path: Path):
    master = Master(job_of(), folders=[tmp_path], prefix="run", clip_norm=None)
    master.keep_journal(step=500, evaluated=400)
    found, last = recover(master, tmp_path)
    found.close()
    master.close()
    assert (last.step, last.evaluated) == (500, 400)


def test_what_was_set_is_found_again(masters: Make, tmp_path: Path):
    master = masters()
    commit(master)
    master.set({"lr": 0.25, "weight_decay": 0.5, "clip_norm": None})
    found, _ = recover(master, tmp_path)
    (group,) = found.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], found._clip_norm) == (0.25, 0.5, None)


@pytest.mark.parametrize(
    "optimizer", ["adamw", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)], ids=["forward", "back"]
)
def test_the_optimizer_works_in_shared_memory_alone(masters: Make, optimizer: Any):
    master = masters(optimizer)
    commit(master)
    commit(master)
    optimizer_state = master._update_log._optimizer_state
    tensors = [each for state in master.optimizer.state.values() for each in state.values()]
    assert tensors
    assert all(optimizer_state._has(each) for each in tensors)


def test_a_state_that_was_loaded_is_moved_into_shared_memory(tmp_path: Path, masters: Make):
    first = masters()
    commit(first)
    loaded = Master(job_of(), folders=[tmp_path], prefix="other", clip_norm=None)
    loaded.optimizer.load_state_dict(first.optimizer.state_dict())
    loaded.keep_journal(step=1, evaluated=0)
    state = loaded.optimizer.state[loaded.model.weight]
    assert loaded._update_log._optimizer_state._has(state["exp_avg"])
    assert torch.equal(state["exp_avg"], first.optimizer.state[first.model.weight]["exp_avg"])
    loaded.close()


def test_a_slab_that_is_filled_over_a_wire_is_not_shared_with_its_engine(masters: Make):
    master = masters()
    (slab,) = master.add_slabs(0, 1, kind="socket")
    assert slab.ref.path == ""


def test_slabs_of_a_dead_hub_are_removed(masters: Make, tmp_path: Path):
    master = masters()
    commit(master)
    recover(master, tmp_path)
    assert list(tmp_path.glob("*slab*")) == []


def test_no_room_for_a_journal_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    master = Master(job_of(), folders=[tmp_path], prefix="run", clip_norm=None)
    monkeypatch.setattr(master, "_folders", [])
    master.keep_journal(step=0, evaluated=0)
    assert master.journal_ref is None
    assert "if the hub dies, the run goes on from its last checkpoint: run-journal needs" in master.notes[0]
    master.close()


def test_a_run_without_a_journal_is_trained(tmp_path: Path):
    master = Master(job_of(), folders=[tmp_path], prefix="run", clip_norm=None)
    assert commit(master) == {"loss": 0.5, "lr": 0.1}
    master.drop_slabs()
    master.close()


def test_a_run_whose_values_outgrow_the_journal_goes_on_without(masters: Make, tmp_path: Path):
    master = masters()
    commit(master, describe=lambda _: {f"metric {number}": 0.0 for number in range(10_000)})
    commit(master)
    assert master.optimizer.state[master.model.weight]["step"].item() == 2
    with pytest.raises(Unrecoverable, match="there is no journal"):
        recover(master, tmp_path)


def test_a_journal_that_is_gone_is_torn(tmp_path: Path):
    ref = SegmentRef(path=str(tmp_path / "gone"), num_bytes=1 << 20)
    with pytest.raises(Unrecoverable, match="the journal is of no use: FileNotFoundError"):
        recover_master(job_of(), journal=ref, folders=[tmp_path], prefix="run")


def test_nothing_is_left_of_what_is_torn(tmp_path: Path):
    master = Master(job_of(), folders=[tmp_path], prefix="run", clip_norm=None)
    master.keep_journal(step=0, evaluated=0)
    commit(master)
    master._update_log.journal.give_up()
    with pytest.raises(Unrecoverable):
        recover(master, tmp_path)
    master.close()
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_is_too_large_leaves_the_last_commit(tmp_path: Path):
    journal = create_journal("run-journal", state_bytes=1 << 10, folders=[tmp_path])
    journal.publish(step=3, values={"loss": 1.0})
    with pytest.raises(JournalFull):
        journal.publish(step=4, values={str(number): 0.0 for number in range(5_000)})
    assert (journal.step, journal.has_begun) == (3, True)
    journal.segment.unlink()
