"""Kernels that a test may kill: child processes that start a pool and say where they are, one line at a time."""

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tests.engines.pools import PATIENCE_SECONDS

PREAMBLE = """
import sys
import torch
from dnb.api import pools
from tests.models import digits, mlp

torch.set_default_dtype(torch.float64)  # as in the test that looks at what this kernel trained

def say(*words):
    print(*words, flush=True)

def hold():
    say("ready")
    sys.stdin.read()
"""


class Kernel:
    """A process that runs `code` until it holds; ended by `kill`, or by closing its standard input.

    Args:
        code: after which it holds; it may `say` words, which are returned by `start`.
        folder: where it runs.
        prefix: a command that runs the kernel, as in a namespace of its own.
    """

    def __init__(self, code: str, *, folder: Path, prefix: Sequence[str] = ()) -> None:
        script = PREAMBLE + textwrap.dedent(code) + "\nhold()\n"
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", script],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment(),
        )

    @staticmethod
    def _environment() -> dict[str, str]:
        import os

        return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def wait_until_ready(self) -> list[str]:
        """The lines it said before it held; fails if it ended instead."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            if line.strip() == "ready":
                return lines
            lines.append(line.strip())
        self._reap()
        raise AssertionError(f"the kernel ended with {self.process.returncode} after saying {lines}")

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reap()

    def _reap(self) -> None:
        self.process.wait(PATIENCE_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
