"""Verbs of `%dtrain` that need no pool."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.oinspect import getdoc

from dnb.api.runs.run import Run
from dnb.errors import ArgumentError, PoolError
from dnb.hub.history.run_files import HistoryRow, summarize
from dnb.hub.history.run_folder import RunFolder
from dnb.notebook.commands.magics import DtrainMagics, ask_for_help
from dnb.notebook.commands.verbs import load_verbs
from tests.unit.kept_runs import SPEC

VERBS = load_verbs()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which a run of one step is kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dnb.api.pools._pool", None)
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


def test_export_refuses_an_ending_that_it_cannot_write(here):
    with pytest.raises(ArgumentError, match=r"losses\.xlsx: cannot write \.xlsx; known: \.csv"):
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


VERBS_TODAY = [
    "start", "status", "shutdown", "add", "remove", "spares", "chaos", "plan", "fit", "wait", "pause", "resume", "stop",
    "doctor", "set", "prove", "checkpoint", "attach", "dashboard", "compare", "export", "panel", "help",
]  # fmt: skip


def test_the_table_holds_these_verbs():
    assert sorted(VERBS) == sorted(VERBS_TODAY)


@pytest.mark.parametrize("entry", VERBS.values(), ids=VERBS)
def test_every_verb_of_the_table_has_one_sentence(entry):
    assert entry.sentence.endswith(".")
    assert entry.sentence.count(". ") == 0


def test_flags_of_a_verb_are_those_of_its_function_and_its_own():
    assert list(VERBS["spares"].flags) == ["n", "timeout_seconds"]
    assert list(VERBS["fit"].flags)[:3] == ["model", "train", "val"]
    assert list(VERBS["fit"].flags)[-1] == "display"
    assert "pool" not in VERBS["fit"].flags
    assert list(VERBS["plan"].flags)[-1] == "dry_run"


def test_a_paused_run_has_flags_of_its_own_to_resume():
    assert list(VERBS["resume"].alone.flags) == ["step", "loss"]
    with pytest.raises(ArgumentError, match="%dtrain resume has no flag '--lr'"):
        dtrain("resume --lr 1e-3")


def test_an_unknown_verb_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match="%dtrain has no verb 'fti': did you mean %dtrain fit model train"):
        dtrain("fti model train")


@pytest.mark.parametrize("line", ["add 2", "remove 1 --force", "spares 1", "chaos kill 1", "pause", "prove 5", "stop"])
def test_verbs_of_a_pool_need_one(here, line):
    with pytest.raises(PoolError, match="no pool is running: %dtrain start -n 2"):
        dtrain(line)


def test_a_cell_on_engines_needs_a_pool(here):
    with pytest.raises(PoolError, match="no pool is running"):
        DtrainMagics(SimpleNamespace(user_ns={})).dtrain("--on 0", "print(1)")


def test_a_cell_on_engines_has_its_own_flags(here):
    with pytest.raises(ArgumentError, match=r"%dtrain \(cell\) has no flag '--cell'"):
        DtrainMagics(SimpleNamespace(user_ns={})).dtrain("--cell 1", "print(1)")


@pytest.mark.parametrize("line", ["", "  ", "help", "--help", "-h", "?"])
def test_help_lists_the_verbs(line, capsys):
    dtrain(line)
    assert "  fit         Train a model" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["help wait", "wait --help", "wait -h", "wait --timeout 3 --help", "wait?", "wait ??"])
def test_help_on_a_verb_tells_its_flags(line, capsys):
    dtrain(line)
    assert capsys.readouterr().out.startswith("usage: %dtrain wait [TIMEOUT]\n")


def test_help_on_two_verbs_is_refused():
    with pytest.raises(ArgumentError, match="one verb at a time: %dtrain help fit"):
        dtrain("help fit wait")


def test_help_on_what_is_no_verb_is_refused():
    with pytest.raises(ArgumentError, match="%dtrain has no verb 'fti': did you mean %dtrain fit --help"):
        dtrain("fti --help")


def test_the_docstring_that_ipython_shows_is_the_table():
    told = getdoc(DtrainMagics(SimpleNamespace(user_ns={})).dtrain)
    assert "  fit         Train a model" in told


@pytest.mark.parametrize("line", ["%dtrain wait?", "%dtrain  wait ??\n"])
def test_a_question_on_a_verb_asks_for_its_help(line):
    assert ask_for_help([line]) == ["%dtrain help wait"]


@pytest.mark.parametrize("line", ["%dtrain?", "wait?", "print('%dtrain wait?')", "%dtrain fit model train"])
def test_other_questions_are_left_to_ipython(line):
    assert ask_for_help([line]) == [line]


def test_a_cell_whose_line_begins_with_a_verb_is_its_line(here, capsys):
    shell = SimpleNamespace(user_ns={})
    DtrainMagics(shell).dtrain("export", "losses.csv   # a table\n--run digits\n")
    assert capsys.readouterr().out == "run 'digits' is written to losses.csv\n"


def test_an_error_that_tells_of_python_tells_of_magics_here(here):
    with pytest.raises(PoolError, match=r"nothing to attach to: .*%dtrain attach NAME reads one that has ended"):
        dtrain("attach")
