import io

import pytest

from dnb.notebook.text.script_progress import ScriptProgress
from tests.fake_runs import FakeHistory, FakeRun


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run() -> FakeRun:
    return FakeRun(num_steps=48, history=FakeHistory(loss=[0.5]))


def reached(run: FakeRun, step: int, *, status: str = "running") -> FakeRun:
    run.step, run.status = step, status
    return run


def test_each_epoch_has_a_line(run):
    lines = io.StringIO()
    progress = ScriptProgress(run, stream=lines, bar=io.StringIO())
    for step in (1, 15, 16, 17, 40):
        progress(reached(run, step))
    assert lines.getvalue() == "digits: epoch 1 of 3 · loss 0.5000\ndigits: epoch 2 of 3 · loss 0.5000\n"


def test_the_end_is_told_once(run):
    lines = io.StringIO()
    progress = ScriptProgress(run, stream=lines, bar=io.StringIO())
    run.elapsed_seconds = 2.0
    for _ in range(2):
        progress(reached(run, 48, status="finished"))
    assert lines.getvalue().splitlines()[-1] == "digits: finished after 48 steps in 2.0 s"
    assert lines.getvalue().count("finished") == 1


def test_a_run_that_goes_on_from_a_checkpoint_tells_the_epochs_from_there(run):
    lines = io.StringIO()
    progress = ScriptProgress(reached(run, 20), stream=lines, bar=io.StringIO())
    progress(reached(run, 31))
    assert lines.getvalue() == ""
    progress(reached(run, 32))
    assert lines.getvalue().startswith("digits: epoch 2 of 3")


def test_a_terminal_has_a_bar_with_the_latest_values(run):
    terminal = Terminal()
    progress = ScriptProgress(run, stream=io.StringIO(), bar=terminal)
    progress(reached(run, 1))
    progress(reached(run, 24))
    progress(reached(run, 24, status="paused"))
    assert "digits" in terminal.getvalue()
    assert "/48" in terminal.getvalue()


def test_what_is_no_terminal_has_no_bar(run):
    stream = io.StringIO()
    progress = ScriptProgress(run, stream=io.StringIO(), bar=stream)
    progress(reached(run, 24))
    assert stream.getvalue() == ""
