import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dnb.api.runs.exporting import kind_of, replacing, write_csv, write_parquet, write_tensorboard
from dnb.api.runs.history import History
from dnb.api.runs.run import Run
from dnb.errors import ArgumentError, SpaceError
from tests.fake_runs import FakeEvent, FakeHistory


def history(**columns) -> FakeHistory:
    found = FakeHistory(**{"loss": [0.5, math.nan, 0.125], **columns})
    found.set("val_loss", [0.25], steps=[3])
    return found


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def scalars(folder: Path, name: str) -> list:
    return accumulated(folder).Scalars(name)


def accumulated(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def text_of(folder: Path, name: str) -> str:
    event = accumulated(folder).Tensors(f"{name}/text_summary")[0]
    return event.tensor_proto.string_val[0].decode()


def test_csv_has_a_line_per_step_with_empty_cells_for_what_was_not_measured(tmp_path):
    path = write_csv(history(), tmp_path / "a.csv")
    assert rows(path) == [
        ["step", "loss", "val_loss"],
        ["1", "0.5", ""],
        ["2", "nan", ""],
        ["3", "0.125", "0.25"],
    ]


def test_csv_keeps_every_digit(tmp_path):
    value = 0.1 + 0.2
    assert float(rows(write_csv(FakeHistory(loss=[value]), tmp_path / "a.csv"))[1][1]) == value


def test_csv_keeps_a_name_with_commas_and_quotes(tmp_path):
    name = 'a,"b"\n'
    assert rows(write_csv(FakeHistory(**{name: [1.0]}), tmp_path / "a.csv"))[0] == ["step", name]


def test_pandas_reads_the_csv_as_it_has_the_history(tmp_path):
    import pandas as pd

    own = History()
    own.append("loss", [1, 2, 3], [0.5, 0.25, 0.125])
    own.append("val_loss", [2], [0.3])
    pd.testing.assert_frame_equal(pd.read_csv(own.to_csv(tmp_path / "a.csv"), index_col="step"), own.to_pandas())


def test_parquet_tells_what_was_not_measured_from_what_is_not_a_number(tmp_path):
    import pyarrow.parquet as pq

    table = pq.read_table(write_parquet(history(), tmp_path / "a.parquet"))
    losses, val = table["loss"].to_pylist(), table["val_loss"].to_pylist()
    assert (losses[0], math.isnan(losses[1]), val) == (0.5, True, [None, None, 0.25])


def test_parquet_counts_steps_as_integers(tmp_path):
    import pyarrow.parquet as pq

    table = pq.read_table(write_parquet(history(), tmp_path / "a.parquet"))
    assert (str(table.schema.field("step").type), table["step"].to_pylist()) == ("int64", [1, 2, 3])


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ArgumentError, match=r"pip install 'dnb\[export\]'"):
        write_parquet(history(), tmp_path / "a.parquet")


def test_tensorboard_reads_steps_values_and_times(tmp_path):
    columns = history(seconds=[1.0, 2.0, 4.0])
    found = scalars(write_tensorboard(columns, tmp_path / "tb", started=1_000_000.0), "loss")
    assert [(each.step, each.wall_time) for each in found] == [
        (1, 1_000_001.0),
        (2, 1_000_002.0),
        (3, 1_000_004.0),
    ]
    assert (found[0].value, math.isnan(found[1].value), found[2].value) == (0.5, True, 0.125)


def test_an_evaluation_is_at_the_time_of_its_step(tmp_path):
    columns = history(seconds=[1.0, 2.0, 4.0])
    (found,) = scalars(write_tensorboard(columns, tmp_path / "tb", started=1_000_000.0), "val_loss")
    assert (found.step, found.wall_time) == (3, 1_000_004.0)


def test_times_are_no_curve(tmp_path):
    columns = history(seconds=[1.0, 2.0, 4.0])
    folder = write_tensorboard(columns, tmp_path / "tb", started=1_000_000.0)
    assert accumulated(folder).Tags()["scalars"] == ["loss", "val_loss"]


def test_without_times_all_values_have_the_time_of_the_start(tmp_path):
    found = scalars(write_tensorboard(history(), tmp_path / "tb", started=1_000_000.0), "loss")
    assert {each.wall_time for each in found} == {1_000_000.0}


def test_events_are_texts_that_are_shown_and_not_run(tmp_path):
    died = FakeEvent(kind="died", text="engine 1 died: <b>**killed**</b>", step=2, time=1_000_003.0)
    folder = write_tensorboard(history(), tmp_path / "tb", started=1_000_000.0, events=[died])
    assert text_of(folder, "events/died") == "    engine 1 died: <b>**killed**</b>"


def test_a_second_export_takes_the_place_of_the_first(tmp_path):
    write_tensorboard(FakeHistory(loss=[0.5]), tmp_path / "tb", started=1.0)
    found = scalars(write_tensorboard(history(), tmp_path / "tb", started=1.0), "loss")
    assert ([each.step for each in found], len(list((tmp_path / "tb").iterdir()))) == ([1, 2, 3], 1)


def test_event_files_of_others_stay(tmp_path):
    (tmp_path / "tb").mkdir()
    other = tmp_path / "tb" / "events.out.tfevents.1.host.1.0"
    other.write_bytes(b"")
    write_tensorboard(history(), tmp_path / "tb", started=1.0)
    assert other.exists()


def test_nothing_is_left_beside_a_folder_of_events(tmp_path):
    write_tensorboard(history(), tmp_path / "tb", started=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["tb"]


def test_without_tensorboard_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'dnb\[tensorboard\]'"):
        write_tensorboard(history(), tmp_path / "tb", started=1.0)


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_an_empty_history_is_refused(tmp_path, write):
    with pytest.raises(ArgumentError, match="nothing was measured yet"):
        write(History(), tmp_path / "a")


def test_an_empty_history_is_refused_for_tensorboard_too(tmp_path):
    with pytest.raises(ArgumentError, match="nothing was measured yet"):
        write_tensorboard(History(), tmp_path / "tb", started=0.0)


@pytest.mark.parametrize("write", [write_csv, write_parquet, lambda *args: write_tensorboard(*args, started=0.0)])
def test_a_folder_that_is_not_there_is_refused(tmp_path, write):
    with pytest.raises(ArgumentError, match=r"there is no folder .*missing; make it"):
        write(history(), tmp_path / "missing" / "a.csv")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="is a folder"):
        write_csv(history(), tmp_path)


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")

    def fill_disk() -> None:
        with replacing(path) as aside:
            aside.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(SpaceError, match=r"a\.csv cannot be written: No space left on device"):
        fill_disk()
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])


def test_what_may_not_be_written_is_told(tmp_path):
    with (
        pytest.raises(ArgumentError, match=r"a\.csv cannot be written: Permission denied"),
        replacing(tmp_path / "a.csv"),
    ):
        raise PermissionError(13, "Permission denied")


def test_a_mistake_of_ours_is_not_hidden_as_a_fault_of_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.csv"):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("path", "kind"),
    [("a.csv", ".csv"), ("a.CSV", ".csv"), ("b/a.html", ".html"), ("tb", ""), ("v1.2/", ""), ("tb/digits", "")],
)
def test_the_ending_says_what_is_written(path, kind):
    assert kind_of(path, suffixes=[".csv", ".html"]) == kind


def test_a_folder_that_is_there_takes_event_files_whatever_its_name(tmp_path):
    (tmp_path / "v1.2").mkdir()
    assert kind_of(tmp_path / "v1.2", suffixes=[".csv"]) == ""


def test_an_unknown_ending_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"a\.xlsx: cannot write \.xlsx; known: \.csv, \.html, or a fo"):
        kind_of("a.xlsx", suffixes=[".csv", ".html"])


def test_a_long_history_is_whole_in_the_csv(tmp_path):
    losses = np.linspace(1, 0, 20_000).tolist()
    assert len(rows(write_csv(FakeHistory(loss=losses), tmp_path / "a.csv"))) == 20_001


def test_a_run_exports_by_ending(tmp_path):
    run = Run("digits", None, folder=tmp_path)
    run.history.append("loss", [1], [0.5])
    assert rows(run.export(tmp_path / "a.csv")) == [["step", "loss"], ["1", "0.5"]]


def test_a_run_exports_event_files_into_a_folder_with_the_run_in_words(tmp_path):
    run = Run("digits", None, folder=tmp_path)
    run.history.append("loss", [1], [0.5])
    assert "<dnb.Run 'digits'" in text_of(run.export(str(tmp_path / "tb")), "run")


def test_events_need_only_what_a_run_has(tmp_path):
    event = SimpleNamespace(kind="paused", text="by hand", step=1, time=2.0)
    folder = write_tensorboard(history(), tmp_path / "tb", started=1.0, events=[event])
    assert "by hand" in text_of(folder, "events/paused")
