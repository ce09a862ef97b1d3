"""The command `dnb`: subcommands that start no pool."""

from pathlib import Path

import pytest
from nbval.plugin import get_sanitize_patterns

from dnb.cli import main, quickstart_path


def test_the_quickstart_of_a_checkout_is_the_one_beside_the_package():
    assert quickstart_path() == Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def test_doctor_prints_its_report_and_fails_only_for_a_problem(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["doctor"])
    report = capsys.readouterr().out
    assert report.startswith("system ")
    assert code == int("problem: " in report)


def test_nbval_sanitize_prints_the_path_of_rules_that_nbval_can_read(capsys):
    assert main(["nbval-sanitize"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert len(get_sanitize_patterns(path.read_text())) > 10


def test_a_subcommand_that_is_not_there_is_refused_with_those_that_are(capsys):
    with pytest.raises(SystemExit):
        main(["doktor"])
    assert "doctor" in capsys.readouterr().err
