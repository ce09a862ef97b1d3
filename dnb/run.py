"""A run as the user holds it: a viewer and remote control of what lives in the hub."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from dnb import errors
from dnb.errors import USER_ERRORS, ArgumentError, DnbError, HubError, RunError
from dnb.exporting import kind_of, write_csv, write_parquet, write_tensorboard
from dnb.homecoming import NotebookObjects
from dnb.hub.checkpoints import newest_step
from dnb.hub.history import (
    NOT_READ,
    explain_unreadable_run,
    read_events,
    read_history,
    read_summary,
    read_timeline,
    read_usage,
)
from dnb.input_checks import check_positive
from dnb.input_losses import read_loss
from dnb.planning.bubbles import Timeline
from dnb.planning.gradient_samples import USUAL_STEPS
from dnb.planning.sample_order import samples_after
from dnb.planning.utilisation import Utilisation
from dnb.progress import long_work
from dnb.proofs import Proof
from dnb.proving import Gradients, Submission, prove
from dnb.records import (
    ENDED,
    CheckpointState,
    Control,
    Done,
    GetCheckpoint,
    GetGradients,
    GetRun,
    GradientRows,
    Mend,
    Prediction,
    Process,
    RunEvent,
    RunState,
    RunStatus,
    SetOptions,
    StepTimeline,
    TakeCheckpoint,
    WorkerState,
    WorkerTotals,
)
from dnb.run_pages import write_page
from dnb.transport.channels import HubClient, HubRestartedError
from dnb.transport.lives import is_alive
from dnb.transport.own_code import dumps
from dnb.transport.parcels import explain_unpicklable, sign

log = logging.getLogger(__name__)

# How often the hub is asked what is new; the dashboard paints no faster.
REFRESH_SECONDS = 0.25
# The span over which recent shares and speed are taken.
RECENT_SECONDS = 5.0
# How often a waiting thread looks up, so that hooks can write and an interrupt is heard.
WAIT_SECONDS = 0.2
# How long a hub may take to end when its guardian is gone.
HUB_END_SECONDS = 10.0
# How often the hub is asked whether a checkpoint is durable.
CHECKPOINT_LOOK_SECONDS = 0.02

Listener = Callable[["Run"], None]


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's part in a run; shares are of its time and sum to 1, or are all 0 before it did anything."""

    engine: int
    host: str
    pid: int
    state: WorkerState
    compute: float
    wait: float
    data: float
    idle: float
    cpu_percent: float | None
    rss_bytes: int | None
    samples: int
    steps: int
    start_rss_bytes: int | None = None  # resident before it loaded the run
    peak_rss_bytes: int | None = None  # the most since then, pages of shared memory that it used included
    peak_private_bytes: int | None = None  # the most of what no other process had
    device: str | None = None
    cores: int | None = None  # threads given to torch
    memory_bytes: int | None = None  # physical memory of its host
    heartbeat_age_seconds: float | None = None  # since the hub last heard it; None once it is gone
    shards: tuple[int, ...] | None = None  # of the batch, that it holds now


class History(Mapping[str, list[float]]):
    """What was measured, by name.

    "loss", "lr", "samples_per_second", metrics, and "seconds" since the run was submitted: one value per step;
    "val_loss" and "val_<metric>": one value per evaluation; "grad_norm", the 2-norm of the gradient of all
    parameters before it is clipped: one value now and then, so that it costs at most a hundredth of the time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # an array that is being read cannot grow
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}

    def __getitem__(self, name: str) -> list[float]:
        if name not in self._values:
            raise KeyError(f"{name!r} was not measured; there is: {', '.join(self._values) or 'nothing yet'}")
        with self._lock:
            return self._values[name].tolist()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(values)}" for name, values in self._values.items())
        return f"<dnb.History {sizes or 'empty'}>"

    def column(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps (from 1) and values of one column; empty if there is none yet."""
        if name not in self._values:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        with self._lock:  # whole buffers are copied, not number by number: a chart asks several times a second
            steps = np.frombuffer(self._steps[name] or b"", dtype=np.int64).copy()
            return steps, np.frombuffer(self._values[name] or b"", dtype=np.float64).copy()

    def to_pandas(self) -> Any:
        """One row per step, indexed by it; what was not measured at a step is NaN.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas as pd

        columns = {name: pd.Series(values, index=steps) for name in self for steps, values in [self.column(name)]}
        frame = pd.DataFrame(columns)
        frame.index.name = "step"
        return frame

    def to_csv(self, path: str | Path) -> Path:
        """Write one line per step; a cell is empty where nothing was measured, and "nan" where that was measured.

        Raises:
            ArgumentError: there is nothing to write, or the file cannot be written.
        """
        return write_csv(self, path)

    def to_parquet(self, path: str | Path) -> Path:
        """Write one row per step; null is what was not measured, NaN what was measured so.

        Raises:
            ArgumentError: pyarrow is not installed, there is nothing to write, or the file cannot be written.
        """
        return write_parquet(self, path)

    def append(self, name: str, steps: Iterable[int], values: Iterable[float]) -> None:
        """Add what is new to one column."""
        with self._lock:
            self._steps.setdefault(name, array("q")).extend(steps)
            self._values.setdefault(name, array("d")).extend(values)

    def num_rows(self, name: str) -> int:
        """Values of one column so far."""
        return len(self._values.get(name, ()))


class Run:
    """One training; made by `dnb.fit`. It goes on whether or not anybody looks.

    Args:
        name: of the run.
        hub: where it lives; None if it has ended and is read from its folder.
        folder: of run.json, history and events.
        own: the notebook's objects, which get the trained state.
        key: the cluster's, which signs functions that are mended.
    """

    def __init__(
        self,
        name: str,
        hub: HubClient | None,
        *,
        folder: Path,
        own: NotebookObjects | None = None,
        key: bytes = b"",
    ) -> None:
        self.name = name
        self._key = key
        self.folder = folder
        self.history = History()
        self.events: list[RunEvent] = []
        self._num_shown = 0  # of them, whose output was printed
        self.num_steps = 0
        self.steps_per_epoch = 0
        self.step = 0
        self.first_step = 0  # committed by the run that this one continues
        self.started = 0.0  # seconds since the epoch; less what the run took that this one continues
        self.batch_size = 0
        self.num_samples = 0  # of the training set
        self.num_shards = 0  # of a batch
        self.num_owed = 0  # engines that its work has ended, and that the pool still lacks
        self.utilisation = Utilisation()
        self._hub = hub
        self._own = own or NotebookObjects()
        self._status: RunStatus = "starting"
        self._error = ""
        self._remote_traceback = ""
        self._elapsed_seconds = 0.0
        self._totals: tuple[WorkerTotals, ...] = ()
        self._step_timeline: StepTimeline | None = None
        self._prediction: Prediction | None = None
        self._past: deque[tuple[float, int, dict[int, WorkerTotals]]] = deque()
        self._listeners: list[Listener] = []
        self._hooks: list[Listener] = []
        self._changed = threading.Condition()
        self._refreshing = threading.Lock()
        self._wake = threading.Event()
        self._brought_home: tuple[str, int] | None = None
        self.submission: Submission | None = None  # what it began with, if this kernel called fit
        self._proof: Proof | None = None
        self._hub_process: Process | None = None
        self._watcher = threading.Thread(target=self._watch, name=f"dnb-run-{name}", daemon=True)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read a run from its folder, as it was last written.

        Raises:
            ArgumentError: the folder holds no run, or one of another version of dnb.
        """
        try:
            summary = read_summary(folder)
            rows, events, usage = read_history(folder), read_events(folder), read_usage(folder)
            numbers = [int(summary.options[name]) for name in ("batch_size", "num_samples", "num_shards")]
        except NOT_READ as error:
            raise explain_unreadable_run(folder, error) from error
        run = cls(summary.name, None, folder=folder)
        for row in rows:
            for name, value in row.values.items():
                run.history.append(name, [row.step], [value])
        run.events = events
        run._step_timeline, run._prediction = read_timeline(folder), summary.prediction
        run.num_steps, run.steps_per_epoch, run.step = (
            summary.num_steps,
            summary.steps_per_epoch,
            summary.step,
        )
        run.started = summary.started
        run.batch_size, run.num_samples, run.num_shards = numbers
        run.utilisation.extend(usage)
        run._elapsed_seconds = summary.elapsed_seconds
        run._error, run._remote_traceback = summary.error, summary.remote_traceback
        run._status = summary.status if summary.status in ENDED else "failed"
        if run._status != summary.status:
            was = summary.status if summary.ending is None else f"{summary.ending}, and its last checkpoint not whole"
            run._error = f"the hub ended while the run was {was}; {way_back(folder)}"
        return run

    def watch(self) -> Self:
        """Start to follow the hub."""
        self._watcher.start()
        return self

    # what is known

    @property
    def status(self) -> RunStatus:
        """One of "starting", "running", "paused", "failed", "stopped", "finished"."""
        return self._status

    @property
    def model(self) -> torch.nn.Module | None:
        """The notebook's model, which gets the trained state; the one that `dnb.resume` read, if it was given none."""
        return self._own.model

    @property
    def is_active(self) -> bool:
        """Whether the run has not ended."""
        return self._status not in ENDED

    @property
    def error(self) -> str | None:
        """What failed, or why it paused."""
        return self._error or None

    @property
    def elapsed_seconds(self) -> float:
        """Since it was submitted; stands still when it has ended."""
        return self._elapsed_seconds

    @property
    def samples_per_second(self) -> float | None:
        """Over the last seconds; over the whole run when it has ended."""
        steps_per_second = self._steps_per_second()
        samples = sum(worker.samples for worker in self._totals)
        steps = self.step - self.first_step
        return None if steps_per_second is None or not steps or not samples else steps_per_second * samples / steps

    @property
    def seconds_left(self) -> float | None:
        """At the recent speed; None when it is not known."""
        steps_per_second = self._steps_per_second()
        if self._status != "running" or not steps_per_second:
            return None
        return (self.num_steps - self.step) / steps_per_second

    @property
    def workers(self) -> list[Worker]:
        """Every engine's part since the run began."""
        return [_worker(totals, None) for totals in self._totals]

    @property
    def recent_workers(self) -> list[Worker]:
        """Every engine's part in the last seconds; in the whole run when it has ended."""
        past = self._past[0][2] if self._past and self.is_active else {}
        return [_worker(totals, past.get(totals.engine)) for totals in self._totals]

    @property
    def timeline(self) -> Timeline:
        """What each engine did when in one of the last steps, in seconds; empty unless the model is divided."""
        return Timeline(self._step_timeline)

    def samples_at(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples were seen after each of these steps, if batches are all of one size but an epoch's last."""
        return samples_after(
            steps, num_samples=self.num_samples, batch_size=self.batch_size, steps_per_epoch=self.steps_per_epoch
        )

    @property
    def prediction(self) -> Prediction | None:
        """What the plan that this run follows says it takes; None if it follows none."""
        return self._prediction

    # what can be done

    def wait(self, timeout_seconds: float | None = None) -> Self:
        """Block until the run has ended, has paused, or the time is up; an interrupt ends only the waiting.

        Raises:
            RunError: it failed, or paused because of a fault; with the engine's traceback.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        try:
            while not self._is_settled() and (deadline is None or time.monotonic() < deadline):
                with self._changed:
                    self._changed.wait(WAIT_SECONDS)
                self._call(self._hooks)
                self._show_output()
        except KeyboardInterrupt:
            log.warning("run %r goes on; %%dtrain stop ends it, %%dtrain wait waits again", self.name)
            return self
        self._call(self._hooks)
        self._show_output()
        if self._is_settled() and self._error:
            raise RunError(f"run {self.name!r}: {self._error}", remote_traceback=self._remote_traceback)
        return self

    @property
    def output(self) -> list[str]:
        """The lines that user code has printed on engines, each with its engine; `wait` prints them, too."""
        return [line for event in self.events for line in _printed(event)]

    def _show_output(self) -> None:
        """Print what engines have printed, in the cell that waits for them."""
        new = self.events[self._num_shown :]
        self._num_shown += len(new)
        for line in (line for event in new for line in _printed(event)):
            sys.stdout.write(f"{line}\n")

    def pause(self) -> None:
        """Stand still after the step under way."""
        self._control("pause")

    def resume(self, step: Callable[..., Any] | None = None, loss: str | Callable[..., Any] | None = None) -> None:
        """Go on with the next step, or try the one again that was refused or failed.

        Args:
            step: replaces the step function, or the loss, from this step on; as of `fit`.
            loss: replaces the loss, or the step function, likewise.

        Raises:
            ArgumentError: the run is not paused, or step or loss are none.
            ShippingError: the function cannot be pickled.
        """
        if step is not None or loss is not None:
            self._mend(step=step, loss=read_loss(loss, step=step))
        self._control("resume")

    def stop(self) -> None:
        """End the run after the step under way; the notebook's model keeps what was trained."""
        self._control("stop")

    def set(self, **options: float | None) -> None:
        """Change numbers from the next step on, for all engines; an event says from which.

        Args:
            options: lr, clip_norm (None does not clip), or another number of the optimizer's parameter groups, such as
                weight_decay or momentum; for all groups. A scheduler goes on from the new lr.

        Raises:
            ArgumentError: an unknown name, not a fitting number, or the run has ended; nothing was changed.
        """
        if not options:
            raise ArgumentError("set what? run.set(lr=1e-4), run.set(clip_norm=1.0)")
        for name, value in options.items():
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise ArgumentError(f"{name} must be a number, not {value!r}: run.set({name}=1e-3)")
        numbers = {name: None if value is None else float(value) for name, value in options.items()}
        self._require_hub().ask(SetOptions(run=self.name, options=numbers), Done)

    def checkpoint(self, path: str | Path | None = None, *, timeout_seconds: float = 300.0) -> Path:
        """Write a checkpoint after the step under way; returns its folder once it is durable.

        Args:
            path: a new folder on the hub's host, or one with a checkpoint that is replaced;
                .dnb/runs/<name>/checkpoints/step-<step> if left out. It stays until the user removes it.
            timeout_seconds: how long that may take.

        Raises:
            ArgumentError: the folder holds something else, or cannot be written.
            SpaceError: the disk is full.
            HubError: the hub does not hold the run any more, or the time is up.
        """
        hub = self._require_hub()
        target = None if path is None else str(Path(path).expanduser().absolute())
        deadline = time.monotonic() + timeout_seconds
        state, _ = hub.ask(TakeCheckpoint(run=self.name, path=target), CheckpointState)
        with long_work(f"checkpoint of run {self.name!r}") as report:
            while state.state in ("waiting", "writing"):
                report("waiting for the step under way" if state.state == "waiting" else "writing")
                if time.monotonic() > deadline:
                    raise HubError(
                        f"the checkpoint of run {self.name!r} is not durable after {timeout_seconds:g} s (it is "
                        f"{state.state}); it may still become so: run.events says when"
                    )
                threading.Event().wait(CHECKPOINT_LOOK_SECONDS)
                try:
                    state, _ = hub.ask(GetCheckpoint(run=self.name, ticket=state.ticket), CheckpointState)
                except ArgumentError as error:  # the hub that was asked has died
                    log.info("the checkpoint is asked for again: %s", error)
                    state, _ = hub.ask(TakeCheckpoint(run=self.name, path=target), CheckpointState)
        if state.state == "failed":
            kind: type[DnbError] = getattr(errors, state.error, HubError)
            raise kind(state.message)
        self._wake.set()
        return Path(state.path)

    def prove(self, steps: int = USUAL_STEPS) -> Proof:
        """Compute the run's first steps in this process, too, and show losses and gradients side by side.

        It waits until the run has done them. Of every gradient some elements are compared, of a small one all, and the
        norm of the whole; those of the first 20 steps are there for every run, of more with `fit(prove=...)`.

        Args:
            steps: so many first steps.

        Raises:
            ArgumentError: this kernel did not start the run, or the pool does not hold it any more.
        """
        number = check_positive(steps, name="steps")
        if self._proof is not None and len(self._proof.steps) >= number:
            return dataclasses.replace(self._proof, steps=self._proof.steps[:number])
        submission = self.submission
        if submission is None:
            raise ArgumentError(
                f"run {self.name!r} cannot be proved from here, as only the kernel that called fit has what it began "
                "with: prove it there, or train it anew with fit(prove=20)"
            )
        number = min(number, submission.spec.num_steps)
        with long_work(f"waiting until run {self.name!r} has done {number} steps"):
            while self.step < number and not self._is_settled():
                with self._changed:
                    self._changed.wait(WAIT_SECONDS)
        try:
            gradients, notes = self._seen_gradients(number)
        except HubError as error:
            raise submission.given_up from error
        self._proof = prove(submission, gradients, notes=notes)
        return self._proof

    def _seen_gradients(self, number: int) -> tuple[Gradients, list[str]]:
        """Of the first steps, and sentences on those that are not there or not comparable."""
        reply, frames = self._require_hub().ask(GetGradients(run=self.name), GradientRows)
        rows = np.frombuffer(frames[0], dtype=np.float64).reshape(len(reply.steps), -1)
        changes = [event for event in self.events if event.kind in ("set", "mended", "thawed")]
        last = min([number, *(event.step for event in changes)])
        notes = []
        if last < number:
            first = next(event for event in changes if event.step == last)
            notes.append(f"only up to step {last}, after which the run was changed ({first.text})")
        seen = {step: row for step, row in zip(reply.steps, rows, strict=True) if step <= last}
        if len(seen) < last:
            notes.append(
                f"{len(seen)} of these steps were looked at; fit(prove={number}) looks at as many as are asked for"
            )
        if not seen:
            raise ArgumentError(f"no step of run {self.name!r} can be proved: it has done none that was looked at")
        return Gradients(reply.names, seen), notes

    # what can be kept

    def export(self, path: str | Path) -> Path:
        """Write what is known now: .csv, .parquet, a report as .html, or TensorBoard's event files into a folder.

        Args:
            path: its ending says what is written; without one, or with / at its end, it is a folder.

        Raises:
            ArgumentError: the ending says nothing, there is nothing to write, or it cannot be written.
        """
        writers = {
            ".csv": self.history.to_csv,
            ".parquet": self.history.to_parquet,
            ".html": self.report,
            "": self.to_tensorboard,
        }
        return writers[kind_of(path, suffixes=[suffix for suffix in writers if suffix])](path)

    def to_tensorboard(self, folder: str | Path) -> Path:
        """Write an event file into a folder, in the place of one of an earlier export: all columns, events as texts.

        Raises:
            ArgumentError: tensorboard is not installed, there is nothing to write, or the folder cannot be written.
        """
        told = {"run": f"{self!r}"}
        return write_tensorboard(self.history, folder, started=self.started, events=self.events, texts=told)

    def report(self, path: str | Path) -> Path:
        """Write a page of HTML that needs nothing else: charts, events, engines, options and versions.

        Raises:
            ArgumentError: the file cannot be written.
        """
        return write_page(self, path)

    def add_listener(self, callback: Listener) -> None:
        """Call back from the watching thread when something changed, and once more at the end."""
        self._listeners.append(callback)

    def remove_listener(self, callback: Listener) -> None:
        """Call back no more."""
        if callback in self._listeners:
            self._listeners.remove(callback)

    def add_wait_hook(self, callback: Listener) -> None:
        """Call back from the thread that waits, several times a second and once at the end."""
        self._hooks.append(callback)

    def __repr__(self) -> str:
        last = self.history.column("loss")[1][-1:]
        loss = f", loss {last[0]:.4g}" if len(last) else ""
        error = f": {self._error}" if self._error else ""
        return f"<dnb.Run {self.name!r}: {self._status}, step {self.step} of {self.num_steps}{loss}{error}>"

    # following the hub

    def _watch(self) -> None:
        while self.is_active:
            try:
                with self._refreshing:
                    self._refresh()
            except DnbError as error:
                self._give_up(f"the hub was lost at step {self.step}: {error}{self._way_back()}")
            except Exception as error:  # a watcher that ended in silence would leave `wait` waiting
                log.exception("run %r cannot be followed", self.name)
                self._give_up(f"the run cannot be followed further: {type(error).__name__}: {error}")
            self._call(self._listeners)
            with self._changed:
                self._changed.notify_all()
            if self.is_active:
                self._wake.wait(REFRESH_SECONDS)
                self._wake.clear()

    def _refresh(self) -> None:
        seen = {name: self.history.num_rows(name) for name in self.history}
        seen_timeline = 0 if self._step_timeline is None else self._step_timeline.step
        request = GetRun(
            run=self.name,
            seen=seen,
            seen_events=len(self.events),
            seen_timeline=seen_timeline,
            seen_usage=len(self.utilisation),
        )
        state, frames = self._require_hub().ask(request, RunState)
        self._take_columns(state, frames)
        self._totals = state.workers
        self._hub_process = state.hub or self._hub_process
        self._step_timeline = state.timeline or self._step_timeline
        self._prediction = state.prediction
        self._elapsed_seconds = state.elapsed_seconds
        self.utilisation.extend(state.usage)
        self.started, self.batch_size = state.started, state.batch_size
        self.num_samples, self.num_shards, self.num_owed = state.num_samples, state.num_shards, state.num_owed
        self.first_step, self.num_steps, self.steps_per_epoch = state.first_step, state.num_steps, state.steps_per_epoch
        self.step = state.step  # who sees a step finds what is known of it in place, and who sees an event the step
        self.events.extend(state.events)
        self._remember(state)
        trouble = ""
        if state.status in ENDED or state.status == "paused":
            trouble = self._try_to_bring_home(state.status, state.step)
        self._remote_traceback = state.remote_traceback
        self._error = state.error or trouble
        self._status = state.status  # last: who sees it ended finds the rest in place

    def _take_columns(self, state: RunState, frames: list[bytes]) -> None:
        for column, frame in zip(state.columns, frames, strict=True):
            values = np.frombuffer(frame, dtype=np.float64)
            if column.by == "step":
                first = self.history.num_rows(column.name) + 1
                self.history.append(column.name, range(first, first + len(values)), values.tolist())
            else:
                pairs = values.reshape(-1, 2)
                self.history.append(column.name, pairs[:, 0].astype(np.int64).tolist(), pairs[:, 1].tolist())

    def _remember(self, state: RunState) -> None:
        now = time.monotonic()
        self._past.append((now, state.step, {totals.engine: totals for totals in state.workers}))
        while now - self._past[0][0] > RECENT_SECONDS:
            self._past.popleft()

    def _try_to_bring_home(self, status: str, step: int) -> str:
        """Bring the trained state home; why not, if that fails: a model that was changed meanwhile, say."""
        try:
            self._bring_home(status, step)
        except (DnbError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"the trained state could not be copied into the notebook's model: {type(error).__name__}: {error}"
        return ""

    def _bring_home(self, status: str, step: int) -> None:
        """Copy the trained state into the notebook's own objects, once per end or pause."""
        if self._own.model is None or self._brought_home == (status, step):
            return
        self._brought_home = (status, step)
        self._own.bring_home(self._require_hub(), self.name, step)

    def _way_back(self) -> str:
        """How to go on with a run whose pool is gone; "" if it may still be there."""
        if self._hub is not None and self._hub.is_alive:
            return ""
        # A hub that has lost its guardian ends the pool, and may be writing a checkpoint.
        deadline = time.monotonic() + HUB_END_SECONDS
        while self._hub_process is not None and is_alive(self._hub_process) and time.monotonic() < deadline:
            threading.Event().wait(CHECKPOINT_LOOK_SECONDS)
        return f"; {way_back(self.folder)}"

    def _give_up(self, error: str) -> None:
        self._error = error
        self._status = "failed"

    def _control(self, verb: Literal["pause", "resume", "stop"]) -> None:
        if not self.is_active:
            if verb == "stop":
                return
            raise ArgumentError(f"run {self.name!r} is {self._status}: there is nothing to {verb}")
        with self._refreshing:  # else a refresh under way could bring back what was before
            self._insist(verb)
            if verb == "resume" or self._status == "paused":  # it has not settled any more
                self._error, self._status, self._brought_home = "", "running", None
        self._wake.set()

    def _insist(self, verb: Literal["pause", "resume", "stop"]) -> None:
        """Ask the hub; if it dies meanwhile, ask the next one, unless that was done."""
        hub, request = self._require_hub(), Control(run=self.name, verb=verb)
        try:
            hub.ask(request, Done)
        except HubRestartedError as error:
            log.info("%s is asked for again: %s", verb, error)
            state, _ = hub.ask(GetRun(run=self.name, seen={}, seen_events=0), RunState)
            is_done = {"pause": state.status == "paused", "resume": state.status == "running"}
            if state.status not in ENDED and not is_done.get(verb, False):
                hub.ask(request, Done)

    def _mend(self, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> None:
        functions = {"step": step, "loss": loss}
        try:
            pickled = dumps(functions)
        except KeyboardInterrupt:
            raise
        except USER_ERRORS as error:
            raise explain_unpicklable(functions, name="what is mended") or error from error
        self._require_hub().ask(Mend(run=self.name), Done, frames=[pickled, sign(self._key, [pickled])])

    def _require_hub(self) -> HubClient:
        if self._hub is None:
            raise HubError(f"run {self.name!r} has ended and its hub is gone")
        return self._hub

    def _is_settled(self) -> bool:
        return self._status in ENDED or self._status == "paused"

    def _steps_per_second(self) -> float | None:
        if not self.is_active:
            return self.step / self._elapsed_seconds if self._elapsed_seconds else None
        if len(self._past) < 2:
            return None
        (begin, first, _), (end, last, _) = self._past[0], self._past[-1]
        return (last - first) / (end - begin) if end > begin else None

    def _call(self, callbacks: list[Listener]) -> None:
        for callback in list(callbacks):
            try:
                callback(self)
            except USER_ERRORS as error:  # a callback of the user's may raise anything
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise
                log.exception("a viewer of run %r failed", self.name)


def way_back(folder: Path) -> str:
    """For people: how a run goes on whose hub is gone."""
    step = newest_step(folder)
    if step is None:
        return (
            "it has no checkpoint to resume from: fit(..., checkpoint_every=N), or %dtrain fit --checkpoint-every N, "
            "keeps some"
        )
    here = Path.cwd()
    place = folder.relative_to(here) if folder.is_relative_to(here) else folder
    is_known = place == Path(".dnb") / "runs" / folder.name
    return (
        f"its last checkpoint is of step {step}: dnb.resume({str(place)!r}), or %dtrain resume "
        f"{folder.name if is_known else place}, goes on from there in a new pool"
    )


def _printed(event: RunEvent) -> list[str]:
    if event.kind != "output":
        return []
    return [f"engine {event.engine}: {line}" for line in event.text.split("\n")]


def _worker(now: WorkerTotals, past: WorkerTotals | None) -> Worker:
    def grown(name: str) -> float:
        return float(getattr(now, name)) - (float(getattr(past, name)) if past is not None else 0.0)

    busy = {name: max(grown(f"{name}_seconds"), 0.0) for name in ("compute", "wait", "data")}
    total = max(grown("alive_seconds"), sum(busy.values()))
    shares = {name: seconds / total if total > 0 else 0.0 for name, seconds in busy.items()}
    idle = max(1.0 - sum(shares.values()), 0.0) if total > 0 else 0.0
    return Worker(
        engine=now.engine,
        host=now.host,
        pid=now.pid,
        state=now.state,
        idle=idle,
        cpu_percent=now.cpu_percent,
        rss_bytes=now.rss_bytes,
        samples=now.samples,
        steps=now.steps,
        start_rss_bytes=now.start_rss_bytes,
        peak_rss_bytes=now.peak_rss_bytes,
        peak_private_bytes=now.peak_private_bytes,
        device=now.device,
        cores=now.cores,
        memory_bytes=now.memory_bytes,
        heartbeat_age_seconds=now.heartbeat_age_seconds,
        shards=now.shards,
        **shares,
    )
