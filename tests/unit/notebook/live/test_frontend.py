from types import SimpleNamespace

import pytest

from dnb.errors import ArgumentError
from dnb.notebook.live.frontend import can_import, choose_display


def shell(*, allows_stdin: bool = True, **user_ns: object) -> SimpleNamespace:
    return SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=allows_stdin), user_ns=user_ns)


def choose(*, environ=None, modules=(), shell=None, missing=()):
    return choose_display(
        environ=environ or {}, modules=modules, shell=shell, has_package=lambda name: name not in missing
    )


def test_outside_of_ipython_nothing_is_shown():
    assert choose() == "none"


def test_ipython_in_a_terminal_shows_text():
    assert choose(shell=SimpleNamespace(user_ns={})) == "text"


def test_a_kernel_that_nobody_looks_at_shows_text():
    assert choose(shell=shell(allows_stdin=False)) == "text"


def test_a_session_of_a_jupyter_server_shows_widgets():
    assert choose(environ={"JPY_SESSION_NAME": "/home/a.ipynb"}, shell=shell()) == "widget"


def test_nbclient_inside_a_session_of_a_jupyter_server_shows_text():
    environ = {"JPY_SESSION_NAME": "/home/a.ipynb"}
    assert choose(environ=environ, shell=shell(allows_stdin=False)) == "text"


def test_vs_code_shows_widgets_by_its_variable():
    assert choose(shell=shell(__vsc_ipynb_file__="a.ipynb")) == "widget"


def test_vs_code_shows_widgets_by_its_environment():
    assert choose(environ={"VSCODE_PID": "1"}, shell=shell()) == "widget"


def test_colab_shows_widgets():
    assert choose(modules={"google.colab"}, shell=shell()) == "widget"


def test_voila_shows_widgets():
    environ = {"SERVER_SOFTWARE": "voila/0.5.10"}
    assert choose(environ=environ, shell=shell(allows_stdin=False)) == "widget"


@pytest.mark.parametrize("package", ["ipywidgets", "anywidget"])
def test_where_a_package_for_widgets_is_missing_a_display_is_replaced(package):
    environ = {"JPY_SESSION_NAME": "/home/a.ipynb"}
    assert choose(environ=environ, shell=shell(), missing={package}) == "display"


def test_where_nobody_looks_a_missing_package_changes_nothing():
    assert choose(shell=shell(allows_stdin=False), missing={"ipywidgets"}) == "text"


def test_a_package_is_found_without_being_imported():
    assert (can_import("anywidget"), can_import("no_such_package_at_all")) == (True, False)


@pytest.mark.parametrize("wish", ["widget", "display", "text", "none"])
def test_a_wish_in_the_environment_wins(wish):
    environ = {"DNB_DISPLAY": wish, "JPY_SESSION_NAME": "/home/a.ipynb"}
    assert choose(environ=environ, shell=shell()) == wish


def test_an_unknown_wish_is_refused_with_the_choices():
    with pytest.raises(ArgumentError, match="DNB_DISPLAY='widgets' is no display; did you mean 'widget'"):
        choose(environ={"DNB_DISPLAY": "widgets"})
