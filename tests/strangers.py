"""Processes of another user, for tests of what strangers can do; only root can start one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

NOBODY = 65534
REQUIRE_VARIABLE = "DNB_REQUIRE_ROOT"  # in CI a missing root fails, so that these tests are never skipped unnoticed


def need_another_user() -> None:
    """Skip the calling test where it cannot start processes of another user."""
    if sys.platform == "linux" and os.geteuid() == 0 and shutil.which("setpriv") is not None:
        return
    lack = "only root on Linux, with setpriv, can start processes of another user"
    if os.environ.get(REQUIRE_VARIABLE):
        pytest.fail(lack)
    pytest.skip(lack)


def start_stranger(code: str, *arguments: str, **options) -> subprocess.Popen[str]:
    """A process of user 65534 that runs Python code of the standard library; it may open as many files as it wants."""
    return subprocess.Popen(
        [
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *(_PYTHON, "-I", "-c", code, *arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        **options,
    )


def ask_stranger(code: str, *arguments: str, timeout_seconds: float = 60) -> str:
    """What such a process prints, once it has ended."""
    with start_stranger(code, *arguments) as stranger:
        output, _ = stranger.communicate(timeout=timeout_seconds)
    assert stranger.returncode == 0, output
    return output


# One that another user may run: a virtual environment may lie where he does not get in.
_PYTHON = next(filter(os.path.exists, ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable)))
