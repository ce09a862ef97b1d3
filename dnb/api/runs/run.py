"""A run as the user holds it: a viewer and remote control of the run in the hub."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dnb.api.arguments.checks import check_positive
from dnb.api.arguments.losses import read_loss
from dnb.api.hub_requests import read_options, replace_functions, take_checkpoint
from dnb.api.proof.comparison import Proof
from dnb.api.proof.proving import Submission
from dnb.api.runs.exporting import export_run, write_tensorboard
from dnb.api.runs.history import History
from dnb.api.runs.observed_run import ObservedRun
from dnb.api.runs.page_writer import write_page
from dnb.api.runs.proofs import prove_run
from dnb.api.runs.run_follower import RunFollower
from dnb.api.runs.run_snapshot import KnownRun, RunSnapshot, printed, read_run
from dnb.api.runs.run_views import plot_run, show_run
from dnb.api.runs.weights import model_of, state_dict_of
from dnb.api.runs.workers import EngineUsage
from dnb.api.runs.write_back import NotebookObjects
from dnb.errors import RunError
from dnb.planning.sample_order import samples_after
from dnb.planning.step_timeline import Timeline
from dnb.planning.utilisation import Utilisation
from dnb.protocol.client_messages import Done, SetOptions
from dnb.protocol.measurements import Prediction, RunEvent
from dnb.protocol.run import RunStatus
from dnb.transport.sockets.channels import HubClient
from dnb.user_code.gradient_samples import USUAL_STEPS

log = logging.getLogger(__name__)
WAIT_SECONDS = 0.2  # between two looks of a waiting thread, so that hooks can write and an interrupt is heard


class Run(ObservedRun):
    """One training; made by `dnb.fit`. It goes on whether or not anybody looks.

    Args:
        name: of the run.
        hub: that holds it; None if it has ended and is read from its folder.
        folder: of run.json, history and events.
        own: the notebook's objects, which get the trained state.
        key: the cluster's, which signs functions that replace others.
        known: of it so far; nothing if left out.
        submission: what it began with, if this kernel called fit.
    """

    def __init__(
        self,
        name: str,
        hub: HubClient | None,
        *,
        folder: Path,
        own: NotebookObjects | None = None,
        key: bytes = b"",
        known: KnownRun | None = None,
        submission: Submission | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.folder = folder
        known = known or KnownRun(name=name)
        self.history: History = known.history
        self.utilisation: Utilisation = known.utilisation
        self.submission = submission
        self._key = key
        self._own = own or NotebookObjects()
        self._is_unreadable = False  # what fit has sent, in this kernel
        self._num_shown = 0  # events whose output was printed
        self._proof: Proof | None = None
        self._follower = RunFollower(known, hub, folder=folder, own=self._own, notify=self._tell_listeners)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read a run from its folder, as it was last written.

        Raises:
            ArgumentError: the folder holds no run, or one of another version of dnb.
        """
        known = read_run(folder)
        return cls(known.name, None, folder=folder, known=known)

    def watch(self) -> Self:
        """Start to follow the hub."""
        self._follower.start()
        return self

    # what is known

    @property
    def _known(self) -> RunSnapshot:
        return self._follower.snapshot

    @property
    def status(self) -> RunStatus:
        """One of "starting", "running", "paused", "failed", "stopped", "finished"."""
        return self._known.status

    @property
    def is_active(self) -> bool:
        """True until the run has ended."""
        return self._known.is_active

    @property
    def error(self) -> str | None:
        """The failure, or the reason for a pause."""
        return self._known.error or None

    @property
    def error_traceback(self) -> str:
        """The traceback of the failure where it happened: on an engine, or in the hub; "" if there is none."""
        return self._known.remote_traceback

    @property
    def step(self) -> int:
        """The last committed step."""
        return self._known.step

    @property
    def first_step(self) -> int:
        """The last step of the run that this one continues; 0 if it continues none."""
        return self._known.first_step

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return self._known.num_steps

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training set."""
        return self._known.steps_per_epoch

    @property
    def started(self) -> float:
        """Seconds since the epoch at its submission, less what the run took that this one continues."""
        return self._known.started

    @property
    def elapsed_seconds(self) -> float:
        """Since it was submitted; stands still when it has ended."""
        return self._known.elapsed_seconds

    @property
    def batch_size(self) -> int:
        """Samples of the global batch; 0 before it is known."""
        return self._known.batch_size

    @property
    def num_samples(self) -> int:
        """Samples of the training set; 0 before it is known."""
        return self._known.num_samples

    @property
    def num_shards(self) -> int:
        """Logical shards of a batch; 0 before it is known."""
        return self._known.num_shards

    @property
    def num_owed(self) -> int:
        """Engines that its work has ended, and that the pool still lacks."""
        return self._known.num_owed

    @property
    def events(self) -> list[RunEvent]:
        """Happenings so far, in order."""
        return list(self._known.events)

    @property
    def samples_per_second(self) -> float | None:
        """Over the last seconds; over the whole run when it has ended."""
        return self._known.samples_per_second

    @property
    def seconds_left(self) -> float | None:
        """At the recent speed; None when it is not known."""
        return self._known.seconds_left

    @property
    def workers(self) -> list[EngineUsage]:
        """Every engine's part since the run began."""
        return self._known.workers

    @property
    def recent_workers(self) -> list[EngineUsage]:
        """Every engine's part in the last seconds; in the whole run when it has ended."""
        return self._known.recent_workers

    @property
    def prediction(self) -> Prediction | None:
        """The figures of the plan that this run follows; None if it follows none."""
        return self._known.prediction

    @property
    def model(self) -> torch.nn.Module | None:
        """The notebook's model, which gets the trained state; the one that `dnb.resume` read, if it was given none.

        After `dnb.attach` without one it is made of what `fit` had sent, with the weights of the step that is done:
        None if that cannot be read here, as a class of it cannot be imported, or if the pool is gone.
        """
        hub = self._follower.hub_or_none
        if self._own.model is None and hub is not None and not self._is_unreadable:
            model = model_of(self.name, hub, self._key)
            self._is_unreadable = model is None  # all of it would be sent again at each look
            self._own = self._follower.own = NotebookObjects.of(model)
        return self._own.model

    @property
    def timeline(self) -> Timeline:
        """Every engine's work in one of the last steps, in seconds; empty unless the model is divided."""
        return Timeline(self._known.step_timeline)

    @property
    def output(self) -> list[str]:
        """The lines that user code has printed, each with its engine or "hub"; `wait` prints them, too."""
        return printed(self._known.events)

    def samples_at(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many samples were seen after each step, if batches are all of one size but an epoch's last."""
        known = self._known
        return samples_after(
            steps, num_samples=known.num_samples, batch_size=known.batch_size, steps_per_epoch=known.steps_per_epoch
        )

    # what can be done

    def wait(self, timeout_seconds: float | None = None) -> Self:
        """Block until the run has ended, has paused, or the time is up; an interrupt ends only the waiting.

        Raises:
            RunError: it failed, or paused because of a fault; with the engine's traceback.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        try:
            while not self._known.is_settled and (deadline is None or time.monotonic() < deadline):
                self._follower.wait_for_change(WAIT_SECONDS)
                self._call_hooks()
                self._show_output()
        except KeyboardInterrupt:
            log.warning("run %r goes on; %%dtrain stop ends it, %%dtrain wait waits again", self.name)
            return self
        self._call_hooks()
        self._show_output()
        known = self._known
        if known.is_settled and known.error:
            raise RunError(f"run {self.name!r}: {known.error}", remote_traceback=known.remote_traceback)
        return self

    def pause(self) -> None:
        """Pause the run after the step under way."""
        self._follower.control("pause")

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
            loss_function = read_loss(loss, step=step)
            replace_functions(self._follower.hub, self.name, step=step, loss=loss_function, key=self._key)
        self._follower.control("resume")

    def stop(self) -> None:
        """End the run after the step under way; the notebook's model keeps what was trained."""
        self._follower.control("stop")

    def set(self, **options: float | None) -> None:
        """Change numbers from the next step on, for all engines; an event says from which.

        Args:
            options: lr, clip_norm (None does not clip), or another number of the optimizer's parameter groups, such as
                weight_decay or momentum; for all groups. A scheduler goes on from the new lr.

        Raises:
            ArgumentError: an unknown name, not a fitting number, or the run has ended; nothing was changed.
        """
        self._follower.hub.ask(SetOptions(run=self.name, options=read_options(options)), Done)

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
        written = take_checkpoint(self._follower.hub, self.name, path, timeout_seconds=timeout_seconds)
        self._follower.hurry()
        return written

    def state_dict(self) -> dict[str, Any]:
        """Return the trained parameters and buffers by name, as `model.state_dict()` would, on the CPU.

        They are copies, of the last step that is done; if the pool is gone, of the run's last checkpoint.

        Raises:
            ArgumentError: the pool is gone, and the run has no checkpoint.
        """
        return state_dict_of(self.name, self._follower.hub_or_none, self.folder)

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
        if self._proof is None or len(self._proof.steps) < number:
            self._proof = prove_run(self.name, number, self.submission, self._follower)
        return dataclasses.replace(self._proof, steps=self._proof.steps[:number])

    def show(self, *, display: str | None = None) -> None:
        """Show the run in the current cell until it ends, as `display` of `fit` says; in a script, tell it in words."""
        show_run(self, display=display)

    def plot(self, *, x: str = "step", loss_scale: str = "linear") -> Any:
        """Return a plotly figure of the run; x counts "step", "samples" or "time", the loss is "linear" or "log"."""
        return plot_run(self, x=x, loss_scale=loss_scale)

    # what can be kept

    def export(self, path: str | Path) -> Path:
        """Write what is known now: .csv, .parquet, a report as .html, or TensorBoard's event files into a folder.

        Args:
            path: its ending says what is written; without one, or with / at its end, it is a folder.

        Raises:
            ArgumentError: the ending says nothing, there is nothing to write, or it cannot be written.
        """
        return export_run(self, path)

    def to_tensorboard(self, folder: str | Path) -> Path:
        """Write an event file into a folder, in the place of one of an earlier export: all columns, events as texts.

        Raises:
            ArgumentError: tensorboard is not installed, there is nothing to write, or the folder cannot be written.
        """
        texts = {"run": repr(self)}
        return write_tensorboard(self.history, folder, started=self.started, events=self.events, texts=texts)

    def report(self, path: str | Path) -> Path:
        """Write a page of HTML that needs nothing else: charts, events, engines, options and versions.

        Raises:
            ArgumentError: the file cannot be written.
        """
        return write_page(self, path)

    def __repr__(self) -> str:
        known, last = self._known, self.history.column("loss")[1][-1:]
        loss = f", loss {last[0]:.4g}" if len(last) else ""
        end = f"{loss}: {known.error}" if known.error else loss
        return f"<dnb.Run {self.name!r}: {known.status}, step {known.step} of {known.num_steps}{end}>"

    def _show_output(self) -> None:
        """Print what engines have printed, in the cell that waits for them."""
        new = self._known.events[self._num_shown :]
        self._num_shown += len(new)
        for line in printed(new):
            sys.stdout.write(f"{line}\n")
