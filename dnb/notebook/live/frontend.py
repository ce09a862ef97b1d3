"""The choice of a view that fits the front end of this kernel."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal, cast, get_args

from dnb.errors import ArgumentError, nearest

Display = Literal["widget", "display", "text", "none"]
_CHOICES: tuple[str, ...] = get_args(Display)
# What live widgets need in the kernel. What the page has, a kernel cannot know: it asks for a widget's code, or nothing
# comes, and the user says so by DNB_DISPLAY=display or --display display.
WIDGET_PACKAGES = ("ipywidgets", "anywidget")


def can_import(name: str) -> bool:
    """Return True if a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def choose_display(
    *,
    environ: Mapping[str, str] = os.environ,
    modules: Container[str] = sys.modules,
    shell: Any = None,
    has_package: Callable[[str], bool] = can_import,
) -> Display:
    """Pick live widgets, a display that is replaced, lines of text, or nothing.

    Args:
        environ: the kernel's environment; `DNB_DISPLAY` there overrules every other sign.
        modules: what is imported.
        shell: IPython's shell, or None outside of IPython.
        has_package: whether a package can be imported.

    Raises:
        ArgumentError: `DNB_DISPLAY` holds another word.
    """
    word = environ.get("DNB_DISPLAY")
    if word:
        return checked_display(word, source="DNB_DISPLAY")
    if getattr(shell, "kernel", None) is None:
        return "none" if shell is None else "text"
    if not _is_looked_at(environ=environ, modules=modules, shell=shell):
        return "text"
    return "widget" if all(has_package(name) for name in WIDGET_PACKAGES) else "display"


def checked_display(word: str, *, source: str) -> Display:
    """Return `word` itself, if it names a display."""
    if word not in _CHOICES:
        raise ArgumentError(f"{source}={word!r} is no display; {nearest(word, _CHOICES)}")
    return cast("Display", word)


def _is_looked_at(*, environ: Mapping[str, str], modules: Container[str], shell: Any) -> bool:
    if "google.colab" in modules or environ.get("SERVER_SOFTWARE", "").startswith("voila/"):
        return True
    if "VSCODE_PID" in environ or "__vsc_ipynb_file__" in getattr(shell, "user_ns", {}):
        return True
    # jupyter_server sets JPY_SESSION_NAME in the kernel of each session; nbclient, nbval and papermill do not, but a
    # kernel that they start from inside a session inherits it: there nobody is asked for input.
    return "JPY_SESSION_NAME" in environ and getattr(shell.kernel, "_allow_stdin", True)
