"""A run in words: one line while it goes on, a few at its end, and what prints them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dnb.notebook.formatting import counted, duration, inert, number, one_line, time_left
from dnb.notebook.magic_words import worded
from dnb.notebook.text.diagnosis import findings
from dnb.notebook.text.engine_heat import MOST_ROWS, crowd_lines
from dnb.notebook.text.engine_text import hung_engines
from dnb.notebook.text.engine_text import worker_words as worker_line
from dnb.notebook.text.metric_names import metric_names
from dnb.notebook.text.output_words import output_lines
from dnb.notebook.text.pipeline_text import timeline_lines
from dnb.notebook.text.run_events import MEMBERSHIP, news_of
from dnb.notebook.views import SET_APART, EventView, RunView, has_ended, shown_workers
from dnb.user_code.output_kinds import OUTPUT_EVENTS

__all__ = [
    "MEMBERSHIP", "TextReporter", "duration", "inert", "last_value", "number", "one_line", "pace", "progress_line",
    "rate", "run_name", "status_sentence", "summary", "time_left", "worker_line",
]  # fmt: skip

# As many of the last events are listed in a summary.
MAX_EVENTS = 5
_NAMES = {"lr": "learning rate", "grad_norm": "gradient norm"}
# As many metrics stand in one line.
MAX_METRICS = 3


class Stream(Protocol):
    """A text stream, as far as a reporter needs it."""

    def write(self, text: str, /) -> object:
        """Write some text."""

    def flush(self) -> None:
        """Flush what was written, so that it is seen."""


def last_value(run: RunView, key: str) -> float | None:
    """Return the newest value under `key`, or None if there is none."""
    _, values = run.history.column(key)
    return float(values[-1]) if len(values) else None


def rate(run: RunView) -> float | None:
    """Return samples per second: recent while the run goes on, of the whole run when it has ended."""
    total = sum(worker.samples for worker in run.workers)
    if has_ended(run) and total and run.elapsed_seconds > 0:
        return total / run.elapsed_seconds
    return run.samples_per_second


def status_sentence(run: RunView) -> str:
    """Describe the state of a run in one sentence of plain text (not yet escaped for HTML)."""
    if run.status in {"failed", "paused"}:
        return _reason(run)
    if run.status == "finished":
        return f"finished after {counted(run.step, 'step')} in {duration(run.elapsed_seconds)}"
    if run.status == "stopped":
        return f"stopped at step {run.step:,} of {run.num_steps:,} after {duration(run.elapsed_seconds)}"
    return _going_on(run)


def progress_line(run: RunView) -> str:
    """Describe the run on one line, for logs and for front ends without widgets."""
    if run.status not in {"starting", "running"}:
        return f"{run_name(run)}: {status_sentence(run)}"
    idle = [f"bubble {run.timeline.bubble:.0%}"] if run.timeline else []
    return f"{run_name(run)}: " + " · ".join([*place_in_run(run), *latest_values(run), *idle, *pace(run)])


def place_in_run(run: RunView) -> list[str]:
    """Write epoch and step that the run has come to; no epoch where there is one alone."""
    step = f"step {run.step:,} of {run.num_steps:,}"
    if not run.steps_per_epoch or run.num_steps <= run.steps_per_epoch:
        return [step]
    num_epochs = -(-run.num_steps // run.steps_per_epoch)
    epoch = min(run.step // run.steps_per_epoch + 1, num_epochs)
    return [f"epoch {epoch:,} of {num_epochs:,}", step]


def latest_values(run: RunView) -> list[str]:
    """Write the newest losses and metrics; of metrics that are measured twice those of validation."""
    names = metric_names(run.history)
    measured = [f"val_{name}" if last_value(run, f"val_{name}") is not None else name for name in names]
    keys = ["loss", "val_loss", *measured[:MAX_METRICS]]
    values = [(key, last_value(run, key)) for key in keys]
    return [f"{one_line(key, limit=40)} {number(value)}" for key, value in values if value is not None]


def pace(run: RunView) -> list[str]:
    """Write samples per second and time left, as far as they are known."""
    per_second = rate(run)
    known = [] if per_second is None else [f"{per_second:,.0f} samples/s"]
    if run.seconds_left is not None and run.status == "running":
        known.append(time_left(run.seconds_left))
    return known


def run_name(run: RunView) -> str:
    """Return the run's name on one line; not yet escaped for HTML."""
    return one_line(run.name, limit=60)


def summary(run: RunView) -> str:
    """Describe all that a chart of the run shows in words: they are stored beside it, and read out."""
    lines = [f"{run_name(run)}: {status_sentence(run)}"]
    lines += [finding.text for finding in findings(run)]
    values = [text for key in _keys_to_tell(run) if (text := _column_in_words(run, key))]
    lines += values or ["no step was committed" if has_ended(run) else "no step yet"]
    if digest := hash_in_words(run):
        lines.append(digest)
    per_second = rate(run)
    if per_second is not None:
        lines.append(f"{per_second:,.0f} samples/s{' on average' if has_ended(run) else ''}")
    lines += [one_line(line) for line in timeline_lines(run)]
    return "\n".join(lines + _engines_in_words(run) + output_lines(run.events) + _events_in_words(run.events))


def _engines_in_words(run: RunView) -> list[str]:
    """Describe each engine on a line, as its row does; engines that share a heat map only by its figures."""
    workers, hung = shown_workers(run), hung_engines(run)
    if len(workers) > MOST_ROWS:
        return crowd_lines(workers, hung=hung)
    return [worker_line(worker, hung=hung, num_shards=run.num_shards, is_over=has_ended(run)) for worker in workers]


def _events_in_words(events: Sequence[EventView]) -> list[str]:
    events = [event for event in events if event.kind not in OUTPUT_EVENTS]  # `output_lines` has them
    lines = [f"step {event.step:,}: {one_line(event.text) or one_line(event.kind)}" for event in events[-MAX_EVENTS:]]
    more = len(events) - len(lines)
    return [f"last {counted(len(lines), 'event')} of {more + len(lines):,}:", *lines] if more else lines


def hash_in_words(run: RunView) -> str:
    """Return the newest hash of the parameters, to which every engine's copy was compared; "" before the first."""
    steps, values = run.history.column("digest")
    if not len(values):
        return ""
    return f"all engines have the same parameters at step {steps[-1]:,} (hash {int(values[-1]):08x})"


class TextReporter:
    """A wait hook that writes a progress line now and then, and the summary at the end.

    Args:
        run: the run to report.
        interval_seconds: the least time between two lines; a line that says nothing new is left out.
        stream: where to write; standard output if None, looked up at each line (ipykernel may replace it).
        clock: seconds from any origin.
    """

    def __init__(
        self,
        run: RunView,
        *,
        interval_seconds: float = 5.0,
        stream: Stream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._interval = interval_seconds
        self._stream = stream
        self._clock = clock
        self._due = clock()
        self._last_line = ""
        self._is_over = False

    def __call__(self, run: RunView) -> None:
        """Write a line if one is due; called many times a second."""
        if has_ended(run):
            self.finish()
        elif run.status == "paused" or self._clock() >= self._due:
            self._due = self._clock() + self._interval
            self._write(progress_line(run))

    def finish(self) -> None:
        """Write the summary, the first time only."""
        if not self._is_over:
            self._is_over = True
            self._write(summary(self._run))

    def _write(self, line: str) -> None:
        if line == self._last_line:
            return
        self._last_line = line
        stream: Stream = self._stream or sys.stdout
        stream.write(line + "\n")
        stream.flush()


def _reason(run: RunView) -> str:
    """Say why the run failed or paused; the error names the step, if it knows it, or the status and step do."""
    error = one_line(worded(run.error or "", run))
    if not error:
        return f"{run.status} at step {run.step:,}"
    if error.startswith(run.status):
        return error
    if error.startswith("step "):
        return f"{run.status} at {error}"
    return f"{run.status} at step {run.step:,}: {error}"


def _going_on(run: RunView) -> str:
    num_spares = sum(worker.state == "spare" for worker in run.workers)
    num_working = sum(worker.state not in SET_APART for worker in run.workers)
    where = f" on {counted(num_working, 'engine')}" if num_working else ""
    if num_spares:
        where += f" and {counted(num_spares, 'standby engine')}"
    verb = "starting" if run.status == "starting" else "training"
    # engines that join before the first step are what was asked for
    changes = [event for event in news_of(run.events) if event.kind in MEMBERSHIP and event.step > 0]
    if not changes:
        return f"{verb}{where}"
    step = changes[-1].step
    last = [event for event in changes if event.step == step]
    told = [event for event in last if event.kind != "reassigned"] or last  # whose shards go to others, is known
    text = ", ".join(one_line(event.text) for event in told)
    return f"{verb}{where}; after step {step:,}: {one_line(text)}"


def _keys_to_tell(run: RunView) -> list[str]:
    metrics = [key for name in sorted(metric_names(run.history)) for key in (name, f"val_{name}")]
    return ["loss", "val_loss", *metrics, "lr", "grad_norm"]


def _column_in_words(run: RunView, key: str) -> str | None:
    """Describe the last value, and the best of a loss, the range of a metric (its good end is not known)."""
    steps, values = run.history.column(key)
    if not len(values):
        return None
    name = _NAMES.get(key) or one_line(key, limit=60)
    last = f"{name} {number(float(values[-1]))} at step {steps[-1]:,}"
    finite = np.isfinite(values)
    if key in ("loss", "lr") or not finite.any() or len(values) == 1:
        return last
    lowest = int(np.where(finite, values, np.inf).argmin())
    highest = int(np.where(finite, values, -np.inf).argmax())
    low = f"{number(float(values[lowest]))} at step {steps[lowest]:,}"
    if key == "val_loss":
        return f"{last}, best {low}"
    return f"{last}, lowest {low}, highest {number(float(values[highest]))} at step {steps[highest]:,}"
