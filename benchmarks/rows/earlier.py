"""The training step of this checkout, against that of an earlier commit: what a change costs where nothing fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from benchmarks.models import CASES
from benchmarks.pairs import alternate, compare
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from benchmarks.workspace import ROOT

NAMES = ("tiny", "cnn", "mlp-4m", "mlp-17m")
NUM_ENGINES = 2
REACH = 1.01
ROUNDS_FACTOR = 3  # 1 % is below the noise of one turn
END_SECONDS = 60.0


def rows(settings: Settings) -> Iterator[Row]:
    """A row per model.

    Raises:
        ValueError: it was not said against which commit.
    """
    if not settings.against:
        raise ValueError("against which commit? python -m benchmarks earlier --against COMMIT")
    with ExitStack() as stack:
        earlier = stack.enter_context(_worktree(settings.against))
        ours, theirs = (stack.enter_context(_open_side(root)) for root in (ROOT, earlier))
        for name in NAMES:
            probe_seconds = theirs.step_seconds(name, CASES[name].probe_steps + 10)
            steps = settings.steps_for(probe_seconds, at_least=20)
            turns = alternate(
                {"ours": partial(ours.step_seconds, name, steps), "theirs": partial(theirs.step_seconds, name, steps)},
                rounds=ROUNDS_FACTOR * settings.pairs,
            )
            yield compared_row(
                f"step {name} N={NUM_ENGINES}, against {settings.against[:10]}",
                compare(turns["ours"], turns["theirs"]),
                unit="ms",
                scale=1e3,
                reach=REACH,
                details={"case": CASES[name].text, "steps_per_turn": steps},
            )


class _Side:
    """A process that trains with one checkout."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def step_seconds(self, name: str, steps: int) -> float:
        """Mean step time of one turn."""
        print(name, steps, file=_open(self._process.stdin), flush=True)
        return float(self.answer())

    def answer(self) -> str:
        """The next line of it.

        Raises:
            RuntimeError: it has ended.
        """
        line = _open(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"the side with pid {self._process.pid} has ended: its output says why")
        return line


@contextmanager
def _open_side(root: Path) -> Iterator[_Side]:
    folder = Path(f"side-{root.name}").absolute()
    (folder / "ipython").mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "rivals" / "checkout.py"), str(NUM_ENGINES)],
        env={**os.environ, "PYTHONPATH": str(root), "IPYTHONDIR": str(folder / "ipython")},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    side = _Side(process)
    try:
        side.answer()
        yield side
    finally:
        _open(process.stdin).close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder of the workspace."""
    folder = Path("earlier").absolute()
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
