"""What the real completer of IPython answers, with jedi and without."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from torch.utils.data import Dataset
from traitlets.config import Config

from dnb.notebook.commands.verbs import load_verbs
from dnb.notebook.completion.matchers import register_matchers


@pytest.fixture(scope="module", params=[True, False], ids=["jedi", "no jedi"])
def shell(request):
    made = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    made.Completer.use_jedi = request.param
    register_matchers(made)
    return made


@pytest.fixture
def complete(shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ask for the completions of a cell at its end, with these variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dnb.api.pools._pool", None)

    def answer(cell: str, **variables: object) -> list[str]:
        with provisionalcompleter(), monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setitem(shell.user_ns, name, value)
            return [each.text for each in shell.Completer.completions(cell, len(cell))]

    return answer


def usual() -> dict[str, object]:
    x, y = torch.zeros(6, 2), torch.zeros(6).long()
    return {"model": torch.nn.Linear(2, 2), "train": (x, y), "x": x, "number": 3, "rate": 0.1, "word": "a"}


def test_behind_the_magic_stand_all_verbs_and_nothing_else(complete):
    assert complete("%dtrain ") == [*load_verbs(), "--help"]


@pytest.mark.parametrize("cell", ["%dtrain fi", "run = %dtrain fi", "import torch\n%dtrain fi", "%%dtrain fi"])
def test_a_verb_is_completed(complete, cell):
    assert complete(cell) == ["fit"]


def test_flags_are_those_of_the_verb(complete):
    assert complete("%dtrain fit model train --l", **usual()) == ["--loss", "--lr", "--loss-over"]
    assert complete("%dtrain wait --") == ["--timeout", "--help"]


def test_flags_that_are_given_are_not_offered_again(complete):
    assert complete("%dtrain fit model train --loss mse_loss --lr=1 --l") == ["--loss-over"]
    assert "--timeout" not in complete("%dtrain wait 10 ")


def test_a_flag_that_is_on_is_offered_with_no(complete):
    assert complete("%dtrain fit model train --no") == ["--no-shuffle", "--no-telemetry"]


def test_a_flag_of_one_letter_has_one_dash(complete):
    assert complete("%dtrain start -n") == ["-n"]


def test_where_a_model_is_wanted_modules_are_offered(complete):
    assert complete("%dtrain fit ", **usual())[:2] == ["model", "--val"]


def test_where_data_are_wanted_data_sets_are_offered(complete):
    assert complete("%dtrain fit model ", **usual())[:2] == ["train", "--val"]
    assert complete("%dtrain fit model train --val ", **usual()) == ["train"]


def test_in_brackets_of_data_tensors_and_arrays_are_offered(complete):
    names = usual() | {"y": np.zeros(6)}
    assert complete("%dtrain fit model (x, ", **names) == ["x", "y"]
    assert complete("%dtrain fit model train --val {(", **names) == ["x", "y"]


def test_losses_are_offered_by_name_and_by_variable(complete):
    def careful(output, target):
        return output.sum()

    found = complete("%dtrain fit model train --loss ", careful=careful, **usual())
    assert found[:3] == ["careful", "cross_entropy", "mse_loss"]
    assert complete("%dtrain fit model train --loss=ca", careful=careful, **usual()) == ["careful"]


def test_optimizers_are_offered_by_name_and_those_on_the_model(complete):
    names = usual()
    names["mine"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    names["other"] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert complete("%dtrain fit model train --optimizer ", **names)[:3] == ["mine", "adamw", "sgd"]
    assert "other" not in complete("%dtrain fit model train --optimizer ", **names)


def test_metrics_strategies_transports_and_displays_are_offered(complete):
    assert complete("%dtrain fit model train --metrics ") == ["accuracy"]
    assert complete("%dtrain fit model train --strategy ") == ["auto", "data", "hybrid", "pipeline", "tensor"]
    assert complete("%dtrain fit model train --transport ") == ["memory", "socket"]
    assert complete("%dtrain dashboard --display ") == ["widget", "display", "text", "none"]
    assert complete("%dtrain compare a --x ") == ["step", "samples", "time"]


def test_where_a_number_is_wanted_numbers_are_offered(complete):
    assert complete("%dtrain fit model train --epochs ", **usual()) == ["number"]
    assert complete("%dtrain fit model train --lr ", **usual()) == ["number", "rate"]


def test_a_dollar_stands_before_variables_only(complete):
    assert complete("%dtrain fit model train --epochs $", **usual()) == ["$number"]


def test_paths_are_offered_where_one_is_taken(complete, tmp_path):
    (tmp_path / "losses.csv").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "last.csv").touch()
    (tmp_path / ".hidden").touch()
    assert complete("%dtrain export ")[:2] == ["losses.csv", "results/"]
    assert complete("%dtrain checkpoint results/l") == ["results/last.csv"]


def test_runs_of_the_working_folder_are_offered_by_name(complete, tmp_path):
    (tmp_path / ".dnb" / "runs" / "digits").mkdir(parents=True)
    assert complete("%dtrain compare d") == ["digits"]
    assert complete("%dtrain dashboard d") == ["digits"]
    assert complete("%dtrain attach --name ") == ["digits"]
    assert "digits" in complete("%dtrain resume ")


def test_engines_are_those_that_the_client_has_heard_of(complete, monkeypatch):
    pool = SimpleNamespace(is_open=True, client=SimpleNamespace(ids=[0, 2, 3]))  # nothing else may be asked
    monkeypatch.setattr("dnb.api.pools._pool", pool)
    assert complete("%dtrain remove ") == ["0", "2", "3", "--force", "--help"]
    assert complete("%dtrain remove 2,") == ["0", "3"]
    assert complete("%dtrain chaos kill ")[:3] == ["0", "2", "3"]
    assert complete("%%dtrain --on ") == ["all", "0", "2", "3"]


def test_words_of_chaos_and_names_of_settings_are_offered(complete):
    assert complete("%dtrain chaos ") == ["kill", "stop", "slow", "hub", "--help"]
    assert complete("%dtrain set lr=1 c") == ["clip_norm="]


def test_a_cell_over_several_lines_is_completed(complete):
    assert complete("%%dtrain fit\n  model\n  --ep", **usual()) == ["--epochs"]


@pytest.mark.parametrize("cell", ["%dtrain fit model i", "%dtrain nothing ", "%dtrain fit model train --epochs pri"])
def test_nothing_of_pythons_is_offered_where_nothing_fits(complete, cell):
    assert complete(cell) in ([], [cell.rpartition(" ")[2]])


def test_a_cell_for_engines_is_completed_as_python(complete):
    assert "import" in complete("%%dtrain --on 0\nimpor")


class Stubborn(Dataset):
    def __getitem__(self, index):
        raise RuntimeError("no")

    def __len__(self):
        raise SystemExit(3)


class Silent(torch.nn.Module):
    def parameters(self, recurse=True):
        raise RuntimeError("no")


def test_objects_that_raise_when_they_are_looked_at_are_left_out(complete, capsys):
    names = usual() | {"stubborn": Stubborn(), "silent": Silent()}
    assert complete("%dtrain fit ", **names)[0] == "model"
    assert complete("%dtrain fit model ", **names)[:2] == ["train", "--val"]
    assert capsys.readouterr().err == ""


def test_a_shell_without_a_completer_is_left_alone():
    shell = SimpleNamespace()
    register_matchers(shell)
    assert vars(shell) == {}


def test_matchers_that_are_registered_again_take_the_place_of_the_first(shell):
    register_matchers(shell)
    register_matchers(shell)
    assert len(shell.Completer.custom_matchers) == 2
