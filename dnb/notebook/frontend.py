"""Which kind of view fits whoever looks at this kernel."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Mapping
from typing import Any, Literal, cast, get_args

from dnb.errors import ArgumentError, nearest

Display = Literal["widget", "text", "none"]
_CHOICES: tuple[str, ...] = get_args(Display)


def choose_display(
    *,
    environ: Mapping[str, str] = os.environ,
    modules: Container[str] = sys.modules,
    shell: Any = None,
) -> Display:
    """Pick live widgets, lines of text, or nothing.

    Args:
        environ: the kernel's environment; `DNB_DISPLAY` there overrules every other sign.
        modules: what is imported.
        shell: IPython's shell, or None outside of IPython.

    Raises:
        ArgumentError: `DNB_DISPLAY` holds another word.
    """
    wish = environ.get("DNB_DISPLAY")
    if wish:
        return checked_display(wish, source="DNB_DISPLAY")
    if getattr(shell, "kernel", None) is None:
        return "none"
    return "widget" if _has_widgets(environ=environ, modules=modules, shell=shell) else "text"


def checked_display(word: str, *, source: str) -> Display:
    """`word` itself, if it names a display."""
    if word not in _CHOICES:
        raise ArgumentError(f"{source}={word!r} is no display; {nearest(word, _CHOICES)}")
    return cast("Display", word)


def _has_widgets(*, environ: Mapping[str, str], modules: Container[str], shell: Any) -> bool:
    if "google.colab" in modules:
        return True
    if "VOILA_REQUEST_URL" in environ:
        return True
    if "VSCODE_PID" in environ or "__vsc_ipynb_file__" in getattr(shell, "user_ns", {}):
        return True
    # jupyter_server sets JPY_SESSION_NAME in the kernel of each session; nbclient, nbval and papermill do not, but a
    # kernel that they start from inside a session inherits it: there nobody is asked for input.
    return "JPY_SESSION_NAME" in environ and getattr(shell.kernel, "_allow_stdin", True)
