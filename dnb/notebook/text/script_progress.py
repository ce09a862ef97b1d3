"""The progress of a run in a script and a terminal: a bar while it is waited for, and a line for each epoch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dnb.notebook.text.summary import latest_values, pace, place_in_run, run_name, status_sentence
from dnb.notebook.views import RunView, has_ended

if TYPE_CHECKING:
    from dnb.notebook.text.summary import Stream


class ScriptProgress:
    """A wait hook: called many times a second by whoever waits, and once at the end.

    Args:
        run: that is waited for.
        stream: gets the lines; standard output if None, looked up at each line.
        bar: gets the bar; standard error if None. There is a bar only in a terminal.
    """

    def __init__(self, run: RunView, *, stream: Stream | None = None, bar: Any = None) -> None:
        self._stream, self._bar_stream = stream, bar
        self._bar: Any = None
        self._num_epochs_told = run.step // run.steps_per_epoch if run.steps_per_epoch else 0
        self._is_over = False

    def __call__(self, run: RunView) -> None:
        """Write what is new."""
        if self._is_over:
            return
        if run.steps_per_epoch and (ended := run.step // run.steps_per_epoch) > self._num_epochs_told:
            self._num_epochs_told = ended
            self._write(" · ".join([f"{run_name(run)}: {_epoch(run, ended)}", *latest_values(run), *pace(run)]))
        self._move_bar(run)
        if has_ended(run) or run.status == "paused":
            self._close_bar()
        if has_ended(run):
            self._is_over = True
            self._write(f"{run_name(run)}: {status_sentence(run)}")

    def _move_bar(self, run: RunView) -> None:
        stream = self._bar_stream or sys.stderr
        if self._bar is None and stream.isatty() and run.num_steps:
            from tqdm import tqdm  # not before there is a terminal

            self._bar = tqdm(
                total=run.num_steps, initial=run.step, file=stream, desc=run_name(run), unit="step", leave=False
            )
        if self._bar is not None and run.step > self._bar.n:
            self._bar.set_postfix_str(" · ".join([*place_in_run(run)[:-1], *latest_values(run)]), refresh=False)
            self._bar.update(run.step - self._bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        stream = self._stream or sys.stdout
        stream.write(line + "\n")
        stream.flush()


def _epoch(run: RunView, ended: int) -> str:
    return f"epoch {ended:,} of {-(-run.num_steps // run.steps_per_epoch):,}"
