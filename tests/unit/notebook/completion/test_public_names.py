"""Names behind a dot, as the real completer of IPython offers them, with jedi and without."""

from pathlib import Path

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import dnb
from dnb.api.launching import Pool
from dnb.api.runs.history import History
from dnb.api.runs.run import Run
from dnb.notebook.completion.matchers import register_matchers
from dnb.notebook.completion.public_names import _INTERNAL
from tests.unit.test_public_names import OF_POOL, OF_RUN

PUBLIC = sorted(dnb.__all__, key=str.lower)


@pytest.fixture(scope="module", params=[True, False], ids=["jedi", "no jedi"])
def shell(request):
    made = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    made.Completer.use_jedi = request.param
    register_matchers(made)
    return made


@pytest.fixture
def complete(shell, monkeypatch: pytest.MonkeyPatch):
    """Ask for the completions of a cell at its end, with these variables."""

    def answer(cell: str, **variables: object) -> list[str]:
        with provisionalcompleter(), monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setitem(shell.user_ns, name, value)
            return [each.text for each in shell.Completer.completions(cell, len(cell))]

    return answer


@pytest.mark.parametrize("cell", ["dnb.", "x = 1\nx = dnb.", "f(dnb.", "import dnb\ndnb.", "from dnb import "])
def test_the_package_has_its_public_names_and_no_others(complete, cell):
    assert complete(cell, dnb=dnb) == PUBLIC


def test_an_import_in_the_same_cell_counts(complete):
    assert complete("import dnb\ndnb.") == PUBLIC


def test_a_name_is_completed(complete):
    assert complete("dnb.sta", dnb=dnb) == ["start"]
    assert complete("from dnb import fit, sta") == ["start"]


def test_a_variable_of_that_name_is_what_it_is(complete):
    assert not set(PUBLIC) & {each.removeprefix(".") for each in complete("dnb.", dnb="text")}


@pytest.fixture
def run() -> Run:
    return Run("digits", None, folder=Path("nowhere"))


@pytest.mark.parametrize("cell", ["run.", "print(run.", "run = 5\nrun."])
def test_a_run_has_what_is_for_users(complete, run, cell):
    assert complete(cell, run=run) == OF_RUN


def test_a_pool_has_what_is_for_users(complete):
    pool = Pool.__new__(Pool)
    pool.chaos = pool.client = None  # what it holds itself
    assert complete("pool.", pool=pool) == OF_POOL


def test_attributes_that_a_run_holds_are_followed(complete, run):
    assert complete("run.history.to", run=run) == ["to_csv", "to_pandas", "to_parquet"]


def test_no_property_is_called(complete):
    called = []

    class Watched(Run):
        @property
        def events(self):
            called.append(1)
            return []

    complete("run.", run=Watched("digits", None, folder=Path("nowhere")))
    assert called == []


@pytest.mark.parametrize("kind", [Run, Pool, History])
def test_what_is_called_internal_is_there(kind):
    internal = {name for each in kind.__mro__ for name in _INTERNAL.get(each.__name__, ())}
    assert {name for name in internal if not hasattr(kind, name)} <= {"hub", "key", "cluster_id", "submission"}
