"""Modules that are loaded when their functions are called, and not before."""

import sys

import pytest

from dnb.notebook.live.deferred_modules import deferred


@pytest.fixture
def grammar(tmp_path, monkeypatch) -> str:
    """A module that can be imported, and is not yet."""
    (tmp_path / "slow_grammar.py").write_text("def check(text, *, rule): return f'{rule}: {text}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "slow_grammar"
    sys.modules.pop("slow_grammar", None)


def test_a_function_that_was_imported_meanwhile_loads_its_module_when_it_is_called(grammar):
    with deferred(grammar, functions=("check",)):
        from slow_grammar import check
    assert grammar not in sys.modules
    assert check("a", rule="iri") == "iri: a"
    assert grammar in sys.modules


def test_afterwards_the_module_itself_is_imported(grammar):
    with deferred(grammar, functions=("check",)):
        pass
    import slow_grammar

    assert slow_grammar.__file__.endswith("slow_grammar.py")


def test_a_module_that_is_there_already_stays(grammar):
    import slow_grammar

    with deferred(grammar, functions=("check",)):
        from slow_grammar import check
    assert check is slow_grammar.check


def test_a_module_that_is_not_installed_stays_missing():
    with deferred("no_such_grammar", functions=("check",)), pytest.raises(ImportError):
        import no_such_grammar  # noqa: F401
