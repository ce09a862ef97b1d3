from __future__ import annotations

import json
import math
import os
import platform
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dnb.api.runs.run import Run
from dnb.errors import ArgumentError
from dnb.hub.checkpoints.restore import rows_between
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.history.run_files import FORMAT, HistoryRow, RunSummary, read_events, read_history, read_summary, summarize
from dnb.hub.history.run_folder import RunFolder, make_run_folder
from dnb.protocol.measurements import RunEvent
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import PlainJob, RunSpec
from dnb.protocol.versions import name_this_dnb
from tests.disks import files_end_at

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)
SPEC = RunSpec(
    id="0",
    name="digits",
    folder="/nowhere",
    num_samples=100,
    num_val_samples=20,
    num_steps=6,
    steps_per_epoch=3,
    batch_size=32,
    num_shards=12,
    seed=7,
    clip_norm=1.0,
    exact=False,
    transport={},
    telemetry=True,
    micro_batch=None,
    precision="float32",
    linger_seconds=1.0,
    notes=(),
    sys_path=(),
    job=NOTHING,
    data=NOTHING,
)


def row(step: int, **values: float) -> HistoryRow:
    return HistoryRow(kind="step", step=step, time=100.0 + step, values=values)


STATE = {
    "status": "running",
    "error": "",
    "remote_traceback": "",
    "started": 100.0,
    "elapsed_seconds": 2.5,
    "step": 2,
}


def summary(**changes: Any) -> RunSummary:
    return summarize(SPEC, **{**STATE, **changes})


def joined(engine: int) -> RunEvent:
    return RunEvent(kind="joined", text=f"engine {engine}\nhas data", step=0, time=1.0, engine=engine)


def tear(path: Path, *, num_bytes: int) -> None:
    """Cut the end off a file, as a crash of the machine does."""
    path.write_bytes(path.read_bytes()[:-num_bytes])


# rows and events ---------------------------------------------------------------------------------------


def test_rows_are_read_back_in_order(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
        folder.append_row(row(2, loss=0.25, lr=0.1))
    assert read_history(tmp_path) == [row(1, loss=0.5), row(2, loss=0.25, lr=0.1)]


def test_events_are_read_back_in_order(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_event(joined(0))
        folder.append_event(joined(1))
    assert read_events(tmp_path) == [joined(0), joined(1)]


def test_a_row_is_on_disk_before_the_folder_is_closed(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
        assert read_history(tmp_path) == [row(1, loss=0.5)]


def test_a_folder_without_rows_has_an_empty_history(tmp_path: Path):
    RunFolder(tmp_path).close()
    assert (read_history(tmp_path), read_events(tmp_path)) == ([], [])


def test_the_folder_is_made_with_its_parents(tmp_path: Path):
    RunFolder(tmp_path / "runs" / "digits").close()
    assert (tmp_path / "runs" / "digits").is_dir()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_survives_the_file(tmp_path: Path, value: float):
    with RunFolder(tmp_path) as folder:
        folder.append_row(HistoryRow(kind="evaluation", step=1, time=1.0, values={"val_loss": value}))
    assert str(read_history(tmp_path)[0].values["val_loss"]) == str(value)


def test_every_bit_of_a_loss_survives_the_file(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.1 + 0.2))
    assert read_history(tmp_path)[0].values["loss"] == 0.30000000000000004


# torn lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [1, 2, 20])
def test_a_torn_last_line_is_left_out(tmp_path: Path, num_bytes: int):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
        folder.append_row(row(2, loss=0.25))
    tear(tmp_path / "history.jsonl", num_bytes=num_bytes)
    assert read_history(tmp_path) == [row(1, loss=0.5)]


def test_a_torn_last_event_is_left_out(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_event(joined(0))
        folder.append_event(joined(1))
    tear(tmp_path / "events.jsonl", num_bytes=5)
    assert read_events(tmp_path) == [joined(0)]


def test_a_torn_only_line_leaves_an_empty_history(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
    tear(tmp_path / "history.jsonl", num_bytes=5)
    assert read_history(tmp_path) == []


def test_a_torn_line_is_cut_off_when_the_folder_is_opened_again(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
        folder.append_row(row(2, loss=0.25))
    tear(tmp_path / "history.jsonl", num_bytes=5)
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(2, loss=0.125))
    assert read_history(tmp_path) == [row(1, loss=0.5), row(2, loss=0.125)]


def test_whole_lines_are_kept_when_the_folder_is_opened_again(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(2, loss=0.25))
    assert [each.step for each in read_history(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_not_hidden(tmp_path: Path):
    (tmp_path / "history.jsonl").write_bytes(b'{"kind": "step"\n{}\n')
    with pytest.raises(msgspec.DecodeError):
        read_history(tmp_path)


def test_a_run_that_goes_on_leaves_out_what_somebody_has_written_into_its_history(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.append_row(row(1, loss=0.5))
        with (tmp_path / "history.jsonl").open("ab") as file:
            file.write(b"\xff\xfe\n{}\n" + b"[" * 10_000 + b"\n" + b'{"step": 123456789012345678901234567890}\n')
        folder.append_row(row(2, loss=0.25))
    assert read_history(tmp_path, skip_broken=True) == [row(1, loss=0.5), row(2, loss=0.25)]


# run.json --------------------------------------------------------------------------------------------------


def test_the_summary_is_read_back(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.write_summary(summary())
    assert read_summary(tmp_path) == summary()


def test_the_summary_names_its_format(tmp_path: Path):
    assert summary().format == FORMAT == 1


def test_the_summary_holds_the_numbers_of_the_run():
    assert summary().options == {
        "num_samples": 100,
        "num_val_samples": 20,
        "batch_size": 32,
        "num_shards": 12,
        "seed": 7,
        "clip_norm": 1.0,
        "micro_batch": None,
        "precision": "float32",
        "exact": False,
        "memory_limit": None,
    }


def test_the_summary_holds_the_words_of_the_job():
    plain = PlainJob(
        loss="cross_entropy",
        optimizer="adamw",
        lr=0.001,
        metrics=("accuracy",),
        shuffle=True,
        drop_last=False,
        others=(),
    )
    spec = msgspec.structs.replace(SPEC, plain=plain)
    told = summarize(spec, **STATE).options
    assert (told["loss"], told["optimizer"], told["lr"], told["metrics"]) == (
        "cross_entropy",
        "adamw",
        0.001,
        ["accuracy"],
    )


def test_the_summary_tells_objects_in_words_and_words_as_they_were_given():
    plain = PlainJob(loss=None, optimizer="adamw", lr=None, metrics=(), shuffle=True, drop_last=False, others=("loss",))
    words = {
        "loss": "my_loss",
        "optimizer": "not this",
        "lr": "0.001, torch's default",
        "metrics": "error",
        "epochs": "3",
    }
    spec = msgspec.structs.replace(SPEC, plain=plain, described=words)
    told = summarize(spec, **STATE).options
    assert [told[name] for name in words] == ["my_loss", "adamw", "0.001, torch's default", "error", "3"]


def test_the_summary_says_with_which_versions_was_trained():
    assert summary().versions["python"] == platform.python_version()


def test_a_reader_of_run_json_never_sees_half_of_two(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.write_summary(summary(step=2))
        with open(tmp_path / "run.json", "rb") as reader:
            begin = reader.read(20)
            folder.write_summary(summary(step=3, error="a longer text, which moves all that follows"))
            seen = begin + reader.read()
    assert msgspec.json.decode(seen, type=RunSummary) == summary(step=2)


def test_nothing_but_the_five_files_is_left(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.write_summary(summary())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.jsonl",
        "history.jsonl",
        "output.log",
        "run.json",
        "usage.jsonl",
    ]


# disks that fail -------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def later(clock: Clock, folder: RunFolder, seconds: float = 2.0) -> list[str]:
    clock.now += seconds
    return folder.tick()


FULL = "File too large"  # as the limit of these tests says; a full disk says "No space left on device"


def test_rows_that_a_full_disk_did_not_take_are_all_there_when_it_has_room(tmp_path: Path):
    with RunFolder(tmp_path, clock=(clock := Clock())) as folder:
        with files_end_at(1000):
            for step in range(1, 101):
                folder.append_row(row(step, loss=1 / step))
        assert len(read_history(tmp_path)) < 100
        later(clock, folder)
    assert [each.step for each in read_history(tmp_path)] == list(range(1, 101))


def test_a_full_disk_and_its_end_are_told_once(tmp_path: Path):
    folder, told = RunFolder(tmp_path, clock=(clock := Clock())), []
    with files_end_at(1000):
        for step in range(1, 101):
            folder.append_row(row(step, loss=1 / step))
            told += later(clock, folder)
    told += [*later(clock, folder), *later(clock, folder)]
    assert told == [
        f"{tmp_path} cannot be written (No space left on device): training goes on, and what is missing there is "
        "written as soon as it can be",
        f"{tmp_path} is whole again: all that waited for the disk is there",
    ]


def test_a_disk_that_is_full_again_and_again_says_so_once_a_minute(tmp_path: Path):
    folder, told = RunFolder(tmp_path, clock=(clock := Clock())), []
    for step in range(60):
        with files_end_at(10):
            folder.append_row(row(step, loss=0.5))
            told += later(clock, folder, 1.5)
        told += later(clock, folder, 1.5)
    assert len([text for text in told if "cannot be written" in text]) == 3


def test_a_disk_that_is_full_is_tried_no_more_than_once_a_second(tmp_path: Path):
    folder = RunFolder(tmp_path, clock=(clock := Clock()))
    with files_end_at(10):
        folder.append_row(row(1, loss=0.5))
        later(clock, folder)
    later(clock, folder, 0.5)
    assert read_history(tmp_path) == []
    later(clock, folder, 0.5)
    assert len(read_history(tmp_path)) == 1


def test_run_json_that_could_not_be_written_is_written_later(tmp_path: Path):
    folder = RunFolder(tmp_path, clock=(clock := Clock()))
    with files_end_at(10):
        folder.write_summary(summary(step=3))
    later(clock, folder)
    assert (read_summary(tmp_path).step, list(tmp_path.glob(".*"))) == (3, [])


def test_the_next_hub_finds_the_summary_that_a_full_disk_did_not_take(tmp_path: Path):
    folder, memory = tmp_path / "run", tmp_path / "memory"
    files = RunFolder(folder, folders=[memory])
    files.write_summary(summary(step=3))
    (folder / "run.json").unlink()
    (folder / "run.json").mkdir()
    files.write_summary(summary(step=4, status="paused"))
    following = RunFolder(folder, folders=[memory])
    assert (following.summary().step, following.summary().status) == (4, "paused")


def test_the_next_hub_finds_rows_and_events_that_a_full_disk_did_not_take(tmp_path: Path):
    folder, memory = tmp_path / "run", tmp_path / "memory"
    memory.mkdir()
    files = RunFolder(folder, folders=[memory])
    with files_end_at(4000):
        for step in range(1, 61):
            files.append_row(row(step, loss=1 / step))
            files.append_event(joined(step))
        following = RunFolder(folder, folders=[memory])
        assert [each.step for each in following.rows()] == list(range(1, 61))
        assert [each.engine for each in following.events()] == list(range(1, 61))
    assert following.tick() == [f"{folder} is whole again: all that waited for the disk is there"]


def test_rows_that_are_too_many_to_wait_are_rebuilt(tmp_path: Path):
    folder = RunFolder(tmp_path, clock=(clock := Clock()), most_waiting_bytes=2000)
    columns = HistoryColumns()
    folder.rebuild_with(partial(rows_between, columns, started=100.0))

    def commit(step: int) -> None:
        values = {"loss": 1 / step, "seconds": float(step)}
        columns.add_step(values)
        folder.append_row(HistoryRow(kind="step", step=step, time=100.0 + step, values=values, samples={0: 64}))
        if step % 10 == 0:
            columns.add_evaluation(step, {"val_loss": 2 / step})
            folder.append_row(
                HistoryRow(kind="evaluation", step=step, time=100.0 + step, values={"val_loss": 2 / step})
            )

    with files_end_at(1000):
        for step in range(1, 301):
            commit(step)
        told = later(clock, folder)
    for step in range(301, 303):
        commit(step)
    while folder.num_waiting_bytes or len(read_history(tmp_path)) < 302 + 30:
        later(clock, folder)
    commit(303)
    later(clock, folder)
    rows = read_history(tmp_path)
    steps = [each for each in rows if each.kind == "step"]
    assert [each.step for each in steps] == list(range(1, 304))
    assert [(each.values["loss"], each.time) for each in steps] == [(1 / step, 100.0 + step) for step in range(1, 304)]
    assert [each.step for each in rows if each.kind == "evaluation"] == list(range(10, 301, 10))
    assert [each.step for each in rows] == sorted(each.step for each in rows)
    assert any("without which engine had which samples" in text for text in told)


def test_a_folder_that_was_removed_is_written_anew_and_told_once(tmp_path: Path):
    folder = RunFolder(tmp_path / "run", clock=(clock := Clock()))
    folder.write_summary(summary(step=3))
    folder.append_row(row(1, loss=0.5))
    folder.append_event(joined(0))
    shutil.rmtree(tmp_path / "run")
    folder.append_row(row(2, loss=0.25))
    told = later(clock, folder)
    folder.append_row(row(3, loss=0.125))
    assert [each.step for each in read_history(tmp_path / "run")] == [1, 2, 3]
    assert (read_events(tmp_path / "run"), read_summary(tmp_path / "run").step) == ([joined(0)], 3)
    assert told == [
        f"history.jsonl, events.jsonl, usage.jsonl, output.log, run.json in {tmp_path / 'run'} had been removed or "
        "replaced: written anew"
    ]


def test_what_is_written_is_its_users_alone_whatever_the_umask_says(tmp_path: Path):
    before = os.umask(0)
    try:
        with RunFolder(tmp_path / ".dnb" / "runs" / "digits") as folder:
            folder.write_summary(summary())
            folder.append_row(row(1, loss=0.5))
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {path.name: oct(mode) for path, mode in modes.items()} == {
        ".dnb": "0o700",
        "runs": "0o700",
        "digits": "0o700",
        "run.json": "0o600",
        "history.jsonl": "0o600",
        "events.jsonl": "0o600",
        "usage.jsonl": "0o600",
        "output.log": "0o600",
    }


def test_a_folder_of_an_older_run_goes_on_and_is_closed_to_others(tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.append_row(row(1, loss=0.5))
    (tmp_path / "run").chmod(0o755)
    (tmp_path / "run" / "history.jsonl").chmod(0o644)
    with RunFolder(tmp_path / "run") as folder:
        folder.append_row(row(2, loss=0.25))
    assert [each.step for each in read_history(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / "history.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_run_is_refused_where_nothing_can_be_written(tmp_path: Path):
    with (
        files_end_at(1000),
        pytest.raises(ArgumentError, match=rf"run 'digits' cannot be kept in .*{FULL}, [\d,.]+ MB free.*nothing was"),
    ):
        make_run_folder(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_a_run_can_be_kept_is_made_and_empty(tmp_path: Path):
    make_run_folder(tmp_path / "runs" / "digits")
    assert list((tmp_path / "runs" / "digits").iterdir()) == []


# Run.open ----------------------------------------------------------------------------------------------------


def open_run(folder_path: Path, **changes: Any) -> Run:
    with RunFolder(folder_path) as folder:
        folder.write_summary(summary(**changes))
        folder.append_row(row(1, loss=0.5, lr=0.1))
        folder.append_row(row(2, loss=0.25, lr=0.1))
        folder.append_row(HistoryRow(kind="evaluation", step=2, time=3.0, values={"val_loss": 0.75}))
        folder.append_event(joined(0))
    return Run.open(folder_path)


def test_a_run_is_opened_with_its_history(tmp_path: Path):
    assert dict(open_run(tmp_path, status="finished").history) == {
        "loss": [0.5, 0.25],
        "lr": [0.1, 0.1],
        "val_loss": [0.75],
    }


def test_a_run_is_opened_with_the_steps_of_its_history(tmp_path: Path):
    steps, values = open_run(tmp_path, status="finished").history.column("val_loss")
    assert (steps.tolist(), values.tolist()) == ([2], [0.75])


def test_a_run_is_opened_with_its_events(tmp_path: Path):
    assert open_run(tmp_path, status="finished").events == [joined(0)]


def test_a_run_is_opened_with_its_numbers(tmp_path: Path):
    run = open_run(tmp_path, status="finished")
    assert (run.name, run.step, run.num_steps, run.steps_per_epoch, run.elapsed_seconds) == ("digits", 2, 6, 3, 2.5)


def test_a_run_that_failed_is_opened_with_its_error(tmp_path: Path):
    run = open_run(tmp_path, status="failed", error="step 2 on engine 0: IndexError")
    assert (run.status, run.error) == ("failed", "step 2 on engine 0: IndexError")


def test_a_run_whose_hub_ended_in_the_middle_has_failed(tmp_path: Path):
    run = open_run(tmp_path, status="running")
    assert run.status == "failed"
    assert run.error == (
        "the hub ended while the run was running; it has no checkpoint to resume from: fit(..., checkpoint_every=N), "
        "or %dtrain fit --checkpoint-every N, keeps some"
    )


def test_an_opened_run_has_the_speed_of_its_whole_time(tmp_path: Path):
    assert open_run(tmp_path, status="finished").samples_per_second == 64 / 2.5


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": 1'], ids=["missing", "empty", "another", "torn"])
def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"{tmp_path.name} is not the folder of a run"):
        Run.open(tmp_path)


GARBAGE = {
    "binary": bytes(range(256)),
    "no text": b'{"format": 1, "name": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_run_file_of_garbage_is_refused_in_a_sentence(tmp_path: Path, name: str):
    (tmp_path / "run.json").write_bytes(GARBAGE[name])
    with pytest.raises(ArgumentError):
        Run.open(tmp_path)


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("file", ["history.jsonl", "events.jsonl", "usage.jsonl"])
def test_lines_of_garbage_are_refused_in_a_sentence(tmp_path: Path, file: str, name: str):
    open_run(tmp_path, status="finished")
    (tmp_path / file).write_bytes(GARBAGE[name] + b"\n")
    with pytest.raises(ArgumentError):
        Run.open(tmp_path)


@pytest.mark.parametrize("name", GARBAGE)
def test_a_timeline_of_garbage_is_left_out(tmp_path: Path, name: str):
    open_run(tmp_path, status="finished")
    (tmp_path / "timeline.json").write_bytes(GARBAGE[name])
    assert Run.open(tmp_path).timeline.record is None


def rewrite(folder_path: Path, **changes: Any) -> None:
    path = folder_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2, "versions": {"dnb": "9.9.9"}}, "dnb 9.9.9 (format 2), and this is {}, which cannot read it ("),
        (
            {"mood": "good", "versions": {"dnb": "9.9.9"}},
            r"dnb 9.9.9 (format 1), and this is {}, which cannot read it (the field 'mood' is not known): read it with",
        ),
        (
            {"versions": {}, "mood": 1},
            "dnb of an unknown version (format 1), and this is {}, which cannot read it (the",
        ),
    ],
    ids=["a format", "a field more", "no version"],
)
def test_a_run_of_another_version_is_named_with_both(tmp_path: Path, changes: dict[str, Any], reason: str):
    open_run(tmp_path, status="finished")
    rewrite(tmp_path, **changes)
    with pytest.raises(ArgumentError) as caught:
        Run.open(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} was written by {reason.format(name_this_dnb(FORMAT))}")


def test_a_history_of_another_version_is_named_with_both(tmp_path: Path):
    open_run(tmp_path, status="finished")
    rewrite(tmp_path, versions={"dnb": "9.9.9"})
    path = tmp_path / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"kind":"step",', b'"kind":"step","mood":1,', 1))
    with pytest.raises(ArgumentError, match=r"dnb 9.9.9 \(format 1\), and this is .*the field 'mood' is not known"):
        Run.open(tmp_path)


def test_a_history_with_a_broken_line_is_refused_in_a_sentence(tmp_path: Path):
    open_run(tmp_path, status="finished")
    (tmp_path / "history.jsonl").write_bytes(b'{"kind": "step"\n{}\n')
    with pytest.raises(ArgumentError, match=r"the run in .* is damaged: Input data was truncated"):
        Run.open(tmp_path)
