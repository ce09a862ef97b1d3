"""Verbs of `%dtrain` that need no pool."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dnb.errors import ArgumentError, PoolError
from dnb.hub.history import HistoryRow, RunFolder, summarize
from dnb.notebook.magics import DtrainMagics
from dnb.run import Run
from tests.unit.kept_runs import SPEC


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which a run of one step is kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dnb.training._pool", None)
    state = {"status": "finished", "error": "", "remote_traceback": "", "started": 100.0, "elapsed_seconds": 2.5}
    with RunFolder(tmp_path / ".dnb" / "runs" / "digits") as kept:
        kept.append_row(HistoryRow(kind="step", step=1, time=101.0, values={"loss": 0.5}))
        kept.write_summary(summarize(SPEC, step=1, **state))
    return tmp_path


def dtrain(line: str, **variables: object) -> object:
    return DtrainMagics(SimpleNamespace(user_ns=variables)).dtrain(line)


def test_export_writes_a_run_by_its_name(here, capsys):
    dtrain("export losses.csv --run digits")
    assert (here / "losses.csv").read_text() == "step,loss\n1,0.5\n"
    assert capsys.readouterr().out == "run 'digits' is written to losses.csv\n"


def test_export_writes_a_run_by_its_variable(here):
    dtrain("export losses.csv --run mine", mine=Run.open(here / ".dnb/runs/digits"))
    assert (here / "losses.csv").exists()


def test_export_takes_a_path_from_a_variable(here):
    dtrain("export target --run digits", target=here / "named.csv")
    assert (here / "named.csv").exists()


def test_export_refuses_an_ending_that_says_nothing(here):
    with pytest.raises(ArgumentError, match=r"the ending '\.xlsx' says nothing"):
        dtrain("export losses.xlsx --run digits")


def test_export_without_a_path_says_what_is_missing(here):
    with pytest.raises(ArgumentError, match="export needs path"):
        dtrain("export")


def test_export_of_the_last_run_needs_one(here):
    with pytest.raises(PoolError, match="no pool is running"):
        dtrain("export losses.csv")


def test_export_refuses_a_run_that_is_not_there(here):
    with pytest.raises(ArgumentError, match="is not the folder of a run"):
        dtrain("export losses.csv --run other")


def test_the_dashboard_of_an_earlier_run_is_shown_by_its_name(here, capsys):
    dtrain("dashboard digits")
    assert capsys.readouterr().out.startswith("digits: finished after 1 step")


def test_the_dashboard_of_a_variable_is_shown(here, capsys):
    dtrain("dashboard mine", mine=Run.open(here / ".dnb/runs/digits"))
    assert capsys.readouterr().out.startswith("digits: finished after 1 step")


def test_the_dashboard_takes_its_display_as_a_flag(here, capsys):
    dtrain("dashboard digits --display none")
    assert capsys.readouterr().out == ""


def test_the_dashboard_alone_is_that_of_the_last_run(here):
    with pytest.raises(PoolError, match="no pool is running"):
        dtrain("dashboard")
