"""The format of checkpoints: what they hold, that they are whole or not there, and what is said of damaged ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save
from torch import nn
from torch.optim import lr_scheduler

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.format import (
    HISTORY_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    SIGNATURE_FILE,
    TENSOR_FILES,
    Disk,
    remove_torn,
    write_file,
)
from dnb.hub.checkpoints.reader import DamagedError, find_checkpoint, open_checkpoint
from dnb.hub.checkpoints.restore import restore, rows_of
from dnb.hub.checkpoints.signing import Signer, is_signed, keep_secret
from dnb.hub.checkpoints.tensor_files import CODES, TensorBuffer, read_tensors
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.transport.pickling.payloads import unpack
from dnb.transport.state_trees import put_together, take_apart
from tests.models import Odd, Tied
from tests.unit.kept_runs import KeptRun, job_of, rewrite

SOURCES = ("job.pickle", "job.buffers", "data.pickle", "data.buffers")
ALL_FILES = (*TENSOR_FILES, *SOURCES, MANIFEST_FILE)


def small(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def nothing(_: Any) -> list[str]:
    return []


def everything(_: Any) -> list[str]:
    return list(SOURCES)


@pytest.fixture
def run_of(tmp_path: Path):
    runs: list[KeptRun] = []

    def make(model: nn.Module | None = None, *, disk: Disk | None = None, **options: Any) -> KeptRun:
        folder = tmp_path / str(len(runs))
        runs.append(KeptRun(folder, job_of(model or small(), **options), disk=disk))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


MakeRun = Callable[..., KeptRun]


# what a plain program can read -----------------------------------------------------------------


def test_plain_safetensors_loads_the_parameters_and_buffers_into_a_plain_model(run_of: MakeRun):
    run = run_of().train(3)
    folder = run.keep().folder
    model = small()
    model.load_state_dict(load_file(folder / MODEL_FILE), strict=True)
    trained = run.master.model.state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, trained[name])] == []


def test_tied_weights_are_stored_once_and_load_strictly(run_of: MakeRun):
    run = run_of(Tied()).train(2)
    folder = run.keep().folder
    assert "second.weight" not in load_file(folder / MODEL_FILE)
    model = Tied()
    assert load_model(model, folder / MODEL_FILE, strict=True) == (set(), [])
    assert torch.equal(model.second.weight, run.master.model.second.weight)


def test_the_file_says_which_names_are_tied(run_of: MakeRun):
    folder = run_of(Tied()).keep().folder
    with safe_open(folder / MODEL_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "second.weight": "first.weight"}


def test_a_copy_of_the_state_is_written_not_what_came_after(run_of: MakeRun):
    gate = Gate()
    run = run_of(disk=gate).train(2)
    before = {name: tensor.clone() for name, tensor in run.master.model.state_dict().items()}
    ticket = run.checkpoints.ask(None).ticket
    run.checkpoints.tick(is_still=True)
    assert gate.reached.wait(30)
    run.train(1)
    gate.opened.set()
    written = load_file(Path(run.settle(ticket).path) / MODEL_FILE)
    assert [name for name, tensor in written.items() if not torch.equal(tensor, before[name])] == []


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_dtype_comes_back_to_the_bit(dtype: torch.dtype, tmp_path: Path):
    raw = torch.arange(48, dtype=torch.uint8)
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "of_it": (raw % 2).view(dtype) if dtype is torch.bool else raw.view(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    buffer = TensorBuffer()
    buffer.fill(tensors, {})
    write_file(tmp_path / "file", buffer.pieces(), Disk())
    found = read_tensors(tmp_path / "file")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert all(
        torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for name, tensor in tensors.items()
    )


def test_tensors_that_are_not_contiguous_come_back(run_of: MakeRun):
    run = run_of(Odd()).train(2)
    model = Odd()
    model.load_state_dict(load_file(run.keep().folder / MODEL_FILE))
    assert torch.equal(model.turned, run.master.model.turned)


def test_a_dtype_that_safetensors_does_not_have_is_named(run_of: MakeRun):
    model = small()
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    run = run_of(model).train(1)
    state = run.settle(run.checkpoints.ask(None).ticket)
    assert state.state == "failed"
    assert "'phases' is of complex128, which a checkpoint cannot hold" in state.message


# what comes back -----------------------------------------------------------------------------------


def again(run: KeptRun, run_of: MakeRun, model: nn.Module, **options: Any) -> KeptRun:
    """A run restored from a checkpoint of another."""
    folder = run.keep().folder
    new = run_of(model, **options)
    manifest = restore(folder, new.master, new.columns)
    new.step, new.evaluated = manifest.step, manifest.evaluated
    return new


def state_of(run: KeptRun) -> dict[str, torch.Tensor]:
    return run.pool.state()


OPTIMIZERS = {
    "adamw": "adamw",
    "adam_amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "sgd_momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": "adagrad",
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2, momentum=0.5, centered=True),
    "adamax": "adamax",
    "radam": "radam",
    "nadam": "nadam",
    "asgd": "asgd",
    "rprop": "rprop",
    "adadelta": "adadelta",
    "adafactor": "adafactor",
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_to_the_same_bits(run_of: MakeRun, optimizer: Any):
    run = run_of(optimizer=optimizer).train(3)
    new = again(run, run_of, small(), optimizer=optimizer)
    expected, found = state_of(run.train(3)), state_of(new.train(3))
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    cold = lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    return lr_scheduler.SequentialLR(optimizer, [warm, cold], milestones=[3])


def halved(step: int) -> float:
    return 0.5**step


SCHEDULERS = {
    "one_cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=halved),
    "lambda_of_object": partial(lr_scheduler.LambdaLR, lr_lambda=partial(pow, 0.9)),
    "multi_step": partial(lr_scheduler.MultiStepLR, milestones=[2, 4, 4, 5]),
    "warm_restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, mode="triangular2"),
    "sequential": sequential,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_goes_on_with_the_same_rates(run_of: MakeRun, scheduler: Any):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9), "scheduler": scheduler}
    run = run_of(**options).train(4)
    new = again(run, run_of, small(), **options)
    run.train(6)
    new.train(6)
    assert list(new.columns.by_step["lr"]) == list(run.columns.by_step["lr"])


def test_an_optimizer_instance_gets_its_state(run_of: MakeRun):
    def with_instance() -> dict[str, Any]:
        model = small()
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}

    run = run_of(**with_instance()).train(3)
    new = again(run, run_of, **with_instance())
    expected, found = state_of(run.train(2)), state_of(new.train(2))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class WithHiddenBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(3), persistent=False)


def test_a_buffer_that_no_state_dict_has_comes_back(run_of: MakeRun):
    run = run_of(WithHiddenBuffer()).train(1)
    run.master.model.seen.copy_(torch.tensor([1.0, 2.0, 3.0]))
    new = again(run, run_of, WithHiddenBuffer())
    assert new.master.model.seen.tolist() == [1.0, 2.0, 3.0]


def test_a_state_in_a_wider_dtype_than_its_parameter_stays_wide(run_of: MakeRun):
    class Wide(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter].setdefault("sum", torch.full_like(parameter, 1 / 3, dtype=torch.float64))

    options = {"optimizer": partial(Wide, lr=0.1)}
    new = again(run_of(**options).train(1), run_of, small(), **options)
    (values, *_) = new.master.optimizer.state.values()
    assert values["sum"].dtype == torch.float64
    assert values["sum"].flatten()[0].item() == 1 / 3


def test_the_history_comes_back_with_its_evaluations(run_of: MakeRun):
    run = run_of().train(2).evaluate(val_loss=float("nan")).train(1)
    new = again(run, run_of, small())
    assert list(new.columns.by_step["loss"]) == [1.0, 0.5, 1 / 3]
    rows = [(row.kind, row.step) for row in rows_of(new.columns, time=0.0)]
    assert rows == [("step", 1), ("step", 2), ("evaluation", 2), ("step", 3)]
    assert new.evaluated == 2


def test_a_checkpoint_before_the_first_step_holds_no_history(run_of: MakeRun):
    new = again(run_of(), run_of, small())
    assert (new.step, rows_of(new.columns, time=0.0)) == (0, [])


def test_the_user_s_objects_are_there_as_they_were_sent(run_of: MakeRun):
    run = run_of().train(1)
    checkpoint = run.keep()
    memory = memoryview(bytearray((checkpoint.folder / "data.buffers").read_bytes()))
    data = unpack((checkpoint.folder / "data.pickle").read_bytes(), checkpoint.manifest.spec.data, memory=memory)
    assert data.train.samples[0].tolist() == list(range(8))


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": [1.5, None, True, "text"]},
        {0: (1, 2), "x": {1: 2}},
        {"$": "tensor", "of": "a lie"},
        float("-inf"),
        10**30,
        {1, 2},
    ],
    ids=str,
)
def test_a_state_survives_json(value: Any):
    tree, _ = take_apart(value, root="x")
    assert put_together(json.loads(json.dumps(tree, allow_nan=False)), {}) == value


def test_two_tensors_never_share_a_name():
    value = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2)}
    tree, tensors = take_apart(value, root="x")
    assert len(tensors) == 2
    assert put_together(tree, tensors)["a.b"].item() == 2


def test_what_only_pickle_could_keep_is_named_with_its_place():
    with pytest.raises(TypeError, match=r"x\.groups\.0\.rule is a function, which cannot be kept without pickle"):
        take_apart({"groups": [{"rule": halved}]}, root="x")


# another model, optimizer, format --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: small(4), r"parameter '0\.weight' is float32 of shape \(3, 2\) in the checkpoint, and float32 of "),
        (lambda: nn.Sequential(*small()[:2]), r"parameter '2\.weight' of shape \(1, 3\) is in the checkpoint and not"),
        (lambda: small().append(nn.Linear(1, 1)), r"parameter '3\.weight' of shape \(1, 1\) is in the model and not"),
        (lambda: small().double(), r"parameter '0\.weight' is float32 .* and float64"),
    ],
)
def test_another_model_is_refused_with_the_first_name_and_its_shapes(run_of: MakeRun, model: Any, told: str):
    checkpoint = run_of().train(1).keep()
    new = run_of(model())
    with pytest.raises(ArgumentError, match=f"is of another model: {told}"):
        restore(checkpoint.folder, new.master, new.columns)


def test_another_optimizer_is_refused_by_name(run_of: MakeRun):
    folder = run_of().train(1).keep().folder
    new = run_of(optimizer="sgd")
    with pytest.raises(ArgumentError, match="the checkpoint's optimizer is a AdamW, not a SGD"):
        restore(folder, new.master, HistoryColumns())


def test_a_newer_format_is_told_with_both_numbers(run_of: MakeRun):
    folder = run_of().keep().folder
    path = folder / MANIFEST_FILE
    text = json.loads(path.read_text())
    del text["digest"]
    path.write_text(json.dumps(text | {"format": 3}))
    with pytest.raises(
        ArgumentError,
        match=r"written by a newer dnb \([0-9.a-z+]+, format 3; this is dnb [0-9.a-z+]+ and reads up to 1\)",
    ):
        open_checkpoint(folder)


def test_a_format_number_that_was_only_changed_is_told_too(run_of: MakeRun):
    folder = run_of().keep().folder
    path = folder / MANIFEST_FILE
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 3'))
    with pytest.raises(
        ArgumentError, match=r"does not have its own digest, and says it was written by a newer dnb \(.*, format 3"
    ):
        find_checkpoint(folder, wants=nothing)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other"])
def test_a_path_that_is_no_checkpoint_is_refused_with_the_way_to_one(kind: str, tmp_path: Path):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind != "missing":
        path.mkdir()
        if kind == "other":
            (path / "notes.txt").write_text("")
    told = {"missing": "it does not exist", "file": "it is a file, not a folder"}.get(kind, "is not a checkpoint, as")
    with pytest.raises(ArgumentError, match=told):
        find_checkpoint(path, wants=nothing)


# whole, or not there -----------------------------------------------------------------------------------


class Failing(Disk):
    """A disk on which the nth call fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails_at = -1

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in ("make", "create", "write", "sync", "sync_folder", "link", "rename"):
            return method

        def counted(*arguments: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fails_at:
                raise OSError(errno.EIO, "Input/output error")
            return method(*arguments)

        return counted


def test_whichever_call_fails_the_checkpoint_before_is_whole_and_nothing_is_left_of_the_new_one(run_of: MakeRun):
    disk = Failing()
    run = run_of(disk=disk).train(1)
    run.keep()
    failed: list[str] = []
    while True:
        disk.calls, disk.fails_at = [], len(failed) + 1
        run.train(1)
        state = run.settle(run.checkpoints.ask(None).ticket)
        if state.state == "durable":
            break
        failed.append(disk.calls[-1])
        is_renamed = disk.calls.count("rename") and failed[-1] == "sync_folder"
        assert run.hidden == []
        assert run.kept_steps == ([1, run.step] if is_renamed else [1])
        found, _ = find_checkpoint(run.run_folder, wants=everything)
        assert found.manifest.step == (run.step if is_renamed else 1)
        if is_renamed:
            shutil.rmtree(run.folder_of(run.step))
    assert {"make", "create", "write", "sync", "sync_folder", "link", "rename"} == set(failed)
    assert len(failed) > 20


def test_the_first_checkpoint_may_fail_at_any_call_and_the_next_one_is_whole(tmp_path: Path):
    num_calls = 0
    for fails_at in range(1, 100):
        disk = Failing()
        disk.fails_at = fails_at
        run = KeptRun(tmp_path / str(fails_at), job_of(small()), disk=disk)
        state = run.settle(run.checkpoints.ask(None).ticket)
        disk.fails_at = -1
        run.train(1).keep()
        found, _ = find_checkpoint(run.run_folder, wants=everything)
        assert found.manifest.step == 1
        run.close()
        num_calls = fails_at
        if state.state == "durable":
            break
    assert 30 < num_calls < 99


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(run_of: MakeRun):
    class Slow(Disk):
        def write(self, descriptor: int, piece: memoryview) -> int:
            return super().write(descriptor, piece[:7])

    run = run_of(disk=Slow()).train(1)
    run.keep()
    find_checkpoint(run.run_folder, wants=everything)


def test_a_checkpoint_in_a_folder_of_the_user_is_replaced_and_stays_whole_if_that_fails(
    run_of: MakeRun, tmp_path: Path
):
    disk = Failing()
    run = run_of(disk=disk).train(1)
    run.keep(tmp_path / "mine")
    run.train(1)
    for number, steps in ((1, 1), (2, 1), (0, 2)):  # which of the two renames fails
        disk.calls = []
        disk.fails_at = _index_of_rename(run, disk, number)
        state = run.settle(run.checkpoints.ask(tmp_path / "mine").ticket)
        assert state.state == ("failed" if number else "durable")
        assert open_checkpoint(tmp_path / "mine").manifest.step == steps
    assert [path.name for path in tmp_path.glob(".*")] == []


def _index_of_rename(run: KeptRun, disk: Failing, number: int) -> int:
    """The number of the call that is the nth rename of a checkpoint, counted on another folder."""
    if not number:
        return -1
    disk.fails_at = -1
    other = run.run_folder.parent / "other"
    run.keep(other)
    disk.calls = []
    run.keep(other)
    places = [place for place, name in enumerate(disk.calls, 1) if name == "rename"]
    disk.calls = []
    return places[number - 1]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_something_else_is_never_overwritten(run_of: MakeRun, tmp_path: Path, what: str):
    path = tmp_path / "thesis"
    if what == "file":
        path.write_text("words")
    else:
        path.mkdir()
        (path / "chapter.txt").write_text("words")
    with pytest.raises(ArgumentError, match="thesis exists and is not a checkpoint, so it is not overwritten"):
        run_of().checkpoints.ask(path)


def test_an_empty_folder_is_taken(run_of: MakeRun, tmp_path: Path):
    (tmp_path / "new").mkdir()
    assert run_of().keep(tmp_path / "new").folder == tmp_path / "new"


def test_what_a_dead_process_had_begun_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path):
    host = os.uname().nodename
    dead = tmp_path / f".step-000001.{host}-{2**22 + 1}-00ff00"
    ours = tmp_path / f".step-000002.{host}-{os.getpid()}-00ff00"
    for folder in (dead, ours):
        folder.mkdir()
    remove_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ours.name]


# damage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept_twice(tmp_path_factory: pytest.TempPathFactory):
    """A run with checkpoints of steps 2 and 4."""
    run = KeptRun(tmp_path_factory.mktemp("kept"), job_of(small()))
    for _ in range(2):
        run.train(2).keep()
    yield run.run_folder
    run.close()


@pytest.fixture
def damaged(kept_twice: Path, tmp_path: Path):
    """A copy of that run, and what damages a file of its last checkpoint."""
    copy = tmp_path / "run"
    shutil.copytree(kept_twice, copy)
    last = copy / "checkpoints" / "step-000004"

    def damage(name: str, change: Callable[[bytes], bytes | None]) -> Path:
        changed = change((last / name).read_bytes())
        (last / name).unlink()
        if changed is not None:
            (last / name).write_bytes(changed)
        return copy

    return damage


def flipped(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        place = at(len(data))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "first byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but one": lambda data: data[:-1],
    "one more": lambda data: data + b"\0",
    "flip first": flipped(lambda _: 0),
    "flip in header": flipped(lambda size: min(9, size - 1)),
    "flip middle": flipped(lambda size: size // 2),
    "flip last": flipped(lambda size: size - 1),
    "zeros at the end": lambda data: data[:-8] + bytes(8) if data[-8:] != bytes(8) else data[:-8] + b"\1" * 8,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(damaged: Any, name: str, damage: Any):
    found, told = find_checkpoint(damaged(name, damage), wants=everything)
    assert found.manifest.step == 2
    assert len(told) == 1
    assert f"step-000004/{name} " in told[0]
    assert told[0].endswith("step 2 is used, not step 4")


def test_no_byte_of_the_manifest_can_change_unseen(kept_twice: Path, tmp_path: Path):
    text = (kept_twice / "checkpoints" / "step-000004" / MANIFEST_FILE).read_bytes()
    path = tmp_path / MANIFEST_FILE
    unseen: list[int] = []
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ (1 << place % 8)]) + text[place + 1 :])
        try:
            open_checkpoint(tmp_path)
        except DamagedError:
            continue
        unseen.append(place)
    assert unseen == []


def test_a_damaged_checkpoint_named_itself_is_passed_over_too(damaged: Any):
    run = damaged(MODEL_FILE, flipped(lambda size: size - 1))
    found, _ = find_checkpoint(run / "checkpoints" / "step-000004", wants=nothing)
    assert found.manifest.step == 2


def test_a_checkpoint_named_itself_is_used_though_later_ones_are_there(kept_twice: Path):
    found, told = find_checkpoint(kept_twice / "checkpoints" / "step-000002", wants=everything)
    assert (found.manifest.step, told) == (2, [])


def test_a_run_s_folder_stands_for_its_newest(kept_twice: Path):
    found, _ = find_checkpoint(kept_twice, wants=everything)
    assert found.manifest.step == 4


def test_pickles_that_are_not_wanted_may_be_damaged(damaged: Any):
    found, told = find_checkpoint(damaged("job.pickle", lambda _: b""), wants=nothing)
    assert (found.manifest.step, told) == (4, [])


def test_when_none_is_whole_every_damage_is_told_in_one_error(damaged: Any):
    run = damaged(OPTIMIZER_FILE, lambda data: data[:-1])
    (run / "checkpoints" / "step-000002" / MODEL_FILE).unlink()
    with pytest.raises(ArgumentError, match=r"no checkpoint at .* is whole: .*step-000004/optimizer.* has .* bytes.*;"):
        find_checkpoint(run, wants=nothing)


# from a stranger -------------------------------------------------------------------------------------


@pytest.fixture
def strangers(kept_twice: Path, tmp_path: Path) -> Path:
    """A checkpoint that a stranger may have changed."""
    return Path(shutil.copytree(kept_twice / "checkpoints" / "step-000004", tmp_path / "theirs"))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "", ".", "..", "a\0b"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(strangers: Path, name: str):
    rewrite(strangers, lambda manifest: manifest["files"].update({name: {"num_bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(DamagedError, match=r"it names the file '.*', which is not in its folder"):
        open_checkpoint(strangers)


ODD_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "negative step": lambda manifest: manifest.update(step=-1),
    "huge step": lambda manifest: manifest.update(step=10**30, evaluated=0),
    "evaluated later": lambda manifest: manifest.update(evaluated=5),
    "negative bytes": lambda manifest: manifest["files"][MODEL_FILE].update(num_bytes=-1),
    "huge bytes": lambda manifest: manifest["files"][MODEL_FILE].update(num_bytes=1 << 80),
    "far away": lambda manifest: manifest.update(elapsed_seconds=1e300),
    "text for a number": lambda manifest: manifest.update(step="4"),
    "one field more": lambda manifest: manifest.update(code="import os"),
    "one field less": lambda manifest: manifest.pop("optimizer"),
    "one field more of the run": lambda manifest: manifest["spec"].update(code="import os"),
    "a transport of its own": lambda manifest: manifest["spec"].update(transport={"": "pigeon"}),
}


@pytest.mark.parametrize("change", ODD_MANIFESTS.values(), ids=ODD_MANIFESTS)
def test_an_odd_manifest_is_refused(strangers: Path, change: Callable[[dict[str, Any]], object]):
    rewrite(strangers, change)
    with pytest.raises(DamagedError, match="is not a checkpoint's: "):
        open_checkpoint(strangers)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"9" * 10_000], ids=len)
def test_what_is_no_manifest_at_all_is_refused(strangers: Path, text: bytes):
    (strangers / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(DamagedError):
        open_checkpoint(strangers)


def test_a_state_as_deep_as_can_be_is_refused(strangers: Path, run_of: MakeRun):
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    rewrite(strangers, lambda manifest: manifest["optimizer"].update(tree={"state": deep, "param_groups": deep}))
    new = run_of()
    with pytest.raises((ArgumentError, DamagedError)):
        restore(strangers, new.master, new.columns)


def test_a_manifest_with_fields_of_another_dnb_names_both_versions(strangers: Path):
    rewrite(strangers, lambda manifest: (manifest.update(more=1), manifest["versions"].update(dnb="9.9")))
    with pytest.raises(DamagedError, match=r"unknown field `more` \(dnb 9\.9 wrote it, this is dnb \d"):
        open_checkpoint(strangers)


def test_words_of_a_newer_dnb_are_not_told_as_they_are(strangers: Path):
    rewrite(strangers, lambda manifest: (manifest.update(format=9), manifest["versions"].update(dnb="\x1b[2J" * 99)))
    with pytest.raises(ArgumentError, match=r"was written by a newer dnb \(\?, format 9; this is dnb"):
        open_checkpoint(strangers)


@pytest.mark.parametrize("name", [MANIFEST_FILE, MODEL_FILE])
@pytest.mark.parametrize(("what", "told"), [("link", "is a symbolic link"), ("pipe", "is not a file|has 0 bytes")])
def test_links_and_pipes_are_not_read(strangers: Path, tmp_path: Path, name: str, what: str, told: str):
    (strangers / name).rename(tmp_path / "elsewhere")
    if what == "link":
        (strangers / name).symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(strangers / name)
    with pytest.raises((DamagedError, ArgumentError), match=told):
        open_checkpoint(strangers).verify([MODEL_FILE])


def test_a_file_that_is_replaced_after_it_was_verified_is_not_taken(strangers: Path):
    checkpoint = open_checkpoint(strangers)
    checkpoint.verify(["job.pickle"])
    size = checkpoint.manifest.files["job.pickle"].num_bytes
    (strangers / "job.pickle").write_bytes(b"x" * size)
    with pytest.raises(DamagedError, match=r"job\.pickle does not have the digest with which it was written"):
        checkpoint.load("job.pickle")
    with pytest.raises(DamagedError, match=r"job\.pickle does not have the digest"):
        checkpoint.load_into(memoryview(bytearray(size)), "job.pickle", report=lambda _: None)


def test_a_manifest_that_is_replaced_after_it_was_verified_is_not_taken(strangers: Path, run_of: MakeRun):
    digest = open_checkpoint(strangers).manifest.digest
    rewrite(strangers, lambda manifest: manifest.update(num_steps=7))
    new = run_of()
    with pytest.raises(ArgumentError, match="was replaced while the run was handed to the hub: resume once more"):
        restore(strangers, new.master, new.columns, digest=digest)


def changed_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        rewrite(folder, lambda _: None, {name: save(tensors)})

    return apply


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


MOMENT = "optimizer.state.0.exp_avg"
ODD_STATES: dict[str, Callable[[Path], None]] = {
    "a parameter that would be broadcast": changed_tensors(
        MODEL_FILE, lambda tensors: tensors.update({"0.weight": torch.ones(1, 2)})
    ),
    "a parameter of another dtype": changed_tensors(
        MODEL_FILE, lambda tensors: tensors.update({"0.weight": torch.ones(3, 2, dtype=torch.int64)})
    ),
    "a parameter that is missing": changed_tensors(MODEL_FILE, lambda tensors: tensors.pop("0.weight")),
    "a moment that is too short": changed_tensors(OPTIMIZER_FILE, lambda t: t.update({MOMENT: torch.ones(1)})),
    "a moment of one number": changed_tensors(OPTIMIZER_FILE, lambda t: t.update({MOMENT: torch.tensor(1.0)})),
    "a moment that is missing": changed_tensors(OPTIMIZER_FILE, lambda tensors: tensors.pop(MOMENT)),
    "no step": changed_tensors(OPTIMIZER_FILE, lambda t: t.update({"optimizer.state.0.step": torch.empty(0)})),
    "a state of no parameter": changed(lambda manifest: _states(manifest).append([99, _states(manifest)[0][1]])),
    "a state of a word": changed(lambda manifest: _states(manifest).append(["lr", _states(manifest)[0][1]])),
    "no groups": changed(lambda manifest: manifest["optimizer"]["tree"].pop("param_groups")),
    "a kind of value that there is not": changed(
        lambda manifest: manifest["optimizer"]["tree"].update(state={"$": "eval", "of": "1"})
    ),
    "a history of whole numbers": changed_tensors(
        HISTORY_FILE, lambda tensors: tensors.update({"step/loss": torch.ones(4, dtype=torch.int64)})
    ),
    "a history that is longer than the run": changed_tensors(
        HISTORY_FILE, lambda tensors: tensors.update({"step/loss": torch.ones(5, dtype=torch.float64)})
    ),
    "evaluations of a later step": changed_tensors(
        HISTORY_FILE, lambda t: t.update({"evaluation/val_loss": torch.tensor([[5.0, 1.0]], dtype=torch.float64)})
    ),
    "evaluations of no step": changed_tensors(
        HISTORY_FILE, lambda t: t.update({"evaluation/val_loss": torch.tensor([[torch.nan, 1.0]], dtype=torch.float64)})
    ),
    "no tensors": lambda folder: rewrite(folder, lambda _: None, {OPTIMIZER_FILE: b"x" * 100}),
}


def _states(manifest: dict[str, Any]) -> list[Any]:
    pairs: list[Any] = manifest["optimizer"]["tree"]["state"]["of"]
    return pairs


@pytest.mark.parametrize("change", ODD_STATES.values(), ids=ODD_STATES)
def test_an_odd_state_is_refused_before_anything_works_on_it(
    strangers: Path, run_of: MakeRun, change: Callable[[Path], None]
):
    change(strangers)
    new = run_of()
    with pytest.raises(ArgumentError, match=r"theirs|the optimizer is not that of the checkpoint"):
        restore(strangers, new.master, new.columns)


@pytest.mark.parametrize("name", ["step", "optimizer", "get_lr", "load_state_dict"])
def test_the_state_of_a_scheduler_takes_no_method_s_place(run_of: MakeRun, tmp_path: Path, name: str):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "scheduler": SCHEDULERS["one_cycle"]}
    folder = run_of(**options).train(1).keep().folder
    rewrite(folder, lambda manifest: manifest["scheduler"]["tree"].update({name: "text"}))
    new = run_of(**options)
    with pytest.raises(ArgumentError, match=f"the scheduler's state has '{name}', which is no number of a OneCycleLR"):
        restore(folder, new.master, new.columns)


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, MemoryError, ValueError], ids=lambda kind: kind.__name__
)
def test_whatever_an_optimizer_raises_at_its_state_is_told_and_ends_nothing(
    run_of: MakeRun, error: type[BaseException]
):
    class Picky(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            raise error("not this one")

    folder = run_of(optimizer=partial(Picky, lr=0.1)).train(1).keep().folder
    new = run_of(optimizer=partial(Picky, lr=0.1))
    with pytest.raises(ArgumentError, match="the optimizer is not that of the checkpoint: not this one"):
        restore(folder, new.master, new.columns)


# whose it is -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_signed_with_the_secret_of_its_user(run_of: MakeRun):
    checkpoint = run_of().train(1).keep()
    assert is_signed(keep_secret(), (checkpoint.folder / MANIFEST_FILE).read_bytes(), checkpoint.signature)


def test_a_checkpoint_that_was_changed_has_no_signature_that_fits(strangers: Path):
    rewrite(strangers, lambda manifest: manifest.update(num_steps=7))
    checkpoint = open_checkpoint(strangers)
    assert checkpoint.signature
    assert not is_signed(keep_secret(), checkpoint.text, checkpoint.signature)


def test_a_home_that_cannot_be_written_is_told_once_and_checkpoints_are_written_all_the_same(tmp_path: Path):
    (tmp_path / "home").write_text("no folder")
    run = KeptRun(tmp_path, job_of(small()), signer=Signer(tmp_path / "home" / "dnb" / "checkpoint_secret"))
    folders = [run.train(1).keep().folder for _ in range(2)]
    run.close()
    told = [text for kind, text, _ in run.events if "not signed" in text]
    assert len(told) == 1
    assert told[0].startswith(f"checkpoints are not signed: {tmp_path}/home/dnb/checkpoint_secret cannot be written (")
    assert told[0].endswith("dnb.resume needs trust=True for their pickles")
    assert not any((folder / SIGNATURE_FILE).exists() for folder in folders)
    assert open_checkpoint(folders[1]).manifest.step == 2


@pytest.mark.parametrize("umask", [0, 0o777], ids=oct)
def test_only_this_user_gets_at_a_checkpoint_whatever_the_umask(tmp_path: Path, umask: int):
    run = KeptRun(tmp_path, job_of(small()))
    before = os.umask(umask)
    try:
        folder = run.train(1).keep(tmp_path / "some" / "where").folder
        own = run.keep().folder
    finally:
        os.umask(before)
    run.close()
    folders = [folder.parent, folder, own, own.parent, own.parent / "sources"]
    assert {stat.S_IMODE(each.stat().st_mode) for each in folders} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for each in (folder, own) for file in each.iterdir()} == {0o600}


# while it goes on --------------------------------------------------------------------------------------


class Gate(Disk):
    """A disk that takes its first file only when it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def create(self, path: Path) -> int:
        self.reached.set()
        assert self.opened.wait(30)
        return super().create(path)


def test_a_user_s_objects_are_on_disk_once_and_linked(run_of: MakeRun):
    run = run_of()
    first, second = run.train(1).keep(), run.train(1).keep()
    assert (first.folder / "data.buffers").samefile(second.folder / "data.buffers")
    assert not (first.folder / MODEL_FILE).samefile(second.folder / MODEL_FILE)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_files_cannot_be_linked_they_are_copied(run_of: MakeRun, code: int):
    class Linkless(Disk):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(code, os.strerror(code))

    checkpoint = run_of(disk=Linkless()).train(1).keep()
    checkpoint.verify(ALL_FILES[:-1])
    assert (checkpoint.folder / "job.pickle").stat().st_nlink == 1


def test_the_user_s_objects_outlive_their_memory(run_of: MakeRun, tmp_path: Path):
    run = run_of().train(1)
    for payload in (run.spec.job, run.spec.data):
        assert payload.segment is not None
        Path(payload.segment.path).unlink()
    run.keep().verify(ALL_FILES[:-1])


def test_after_the_end_a_run_without_checkpoints_keeps_all_but_its_data(run_of: MakeRun):
    run = run_of().train(1)
    run.checkpoints.end()
    checkpoint = run.keep()
    assert set(SOURCES[:2]) <= set(checkpoint.manifest.files)
    assert not set(SOURCES[2:]) & set(checkpoint.manifest.files)
