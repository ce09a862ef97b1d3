from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dnb.errors import ArgumentError
from dnb.hub.history import (
    FORMAT,
    HistoryRow,
    RunFolder,
    RunSummary,
    read_events,
    read_history,
    read_summary,
    summarize,
)
from dnb.records import ParcelRef, PlainJob, RunEvent, RunSpec
from dnb.run import Run

NOTHING = ParcelRef(buffers=(), arrays=(), segment=None)
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


def test_nothing_but_the_four_files_is_left(tmp_path: Path):
    with RunFolder(tmp_path) as folder:
        folder.write_summary(summary())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.jsonl",
        "history.jsonl",
        "run.json",
        "usage.jsonl",
    ]


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
    assert (run.status, run.error) == ("failed", "the hub ended while the run was running")


def test_an_opened_run_does_not_claim_a_speed_it_does_not_know(tmp_path: Path):
    assert open_run(tmp_path, status="finished").samples_per_second is None


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": 1'], ids=["missing", "empty", "another", "torn"])
def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"{tmp_path.name} is not the folder of a run"):
        Run.open(tmp_path)
