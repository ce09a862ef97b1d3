"""A run followed: a thread asks the hub what is new, and swaps what is known of the run."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dnb.api.runs.run_snapshot import KnownRun, RunSnapshot, way_back
from dnb.api.runs.write_back import NotebookObjects
from dnb.errors import ArgumentError, DnbError, HubError
from dnb.protocol.client_messages import Control, Done, GetRun, RunState
from dnb.protocol.measurements import WorkerTotals
from dnb.protocol.run import ENDED
from dnb.transport.sockets.channels import HubClient, HubRestartedError
from dnb.transport.system.processes import is_alive

log = logging.getLogger(__name__)

# How often the hub is asked what is new; the dashboard paints no faster.
REFRESH_SECONDS = 0.25
# The span over which recent shares and speed are taken.
RECENT_SECONDS = 5.0
# How long a hub may take to end when its supervisor is gone, and how often is looked.
HUB_END_SECONDS = 10.0
HUB_LOOK_SECONDS = 0.02

Verb = Literal["pause", "resume", "stop"]


class RunFollower:
    """The thread that follows one run; what it knows is swapped whole, so that readers need no lock.

    Args:
        known: of the run so far; to its columns new values are added.
        hub: that holds it; None if it has ended and is read from its folder.
        folder: of the run.
        own: the notebook's objects, which get the trained state.
        notify: called from the thread when something may have changed, and once more at the end.
    """

    def __init__(
        self,
        known: KnownRun,
        hub: HubClient | None,
        *,
        folder: Path,
        own: NotebookObjects,
        notify: Callable[[], None],
    ) -> None:
        self.snapshot = known.snapshot
        self._history = known.history
        self._utilisation = known.utilisation
        self._name = known.name
        self.own = own
        self._hub = hub
        self._folder = folder
        self._notify = notify
        self._past: deque[tuple[float, int, dict[int, WorkerTotals]]] = deque()
        self._brought_home: tuple[str, int] | None = None
        self._changed = threading.Condition()
        self._refreshing = threading.Lock()  # held by whoever swaps the snapshot
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"dnb-run-{known.name}", daemon=True)

    @property
    def hub(self) -> HubClient:
        """The hub that holds the run.

        Raises:
            HubError: there is none any more.
        """
        if self._hub is None:
            raise HubError(f"run {self._name!r} has ended and its hub is gone")
        return self._hub

    @property
    def hub_or_none(self) -> HubClient | None:
        """The hub that holds the run; None if it is read from its folder."""
        return self._hub

    def start(self) -> None:
        """Follow the hub from now on, until the run has ended."""
        self._thread.start()

    def hurry(self) -> None:
        """Ask the hub at once what is new."""
        self._wake.set()

    def wait_for_change(self, limit_seconds: float) -> None:
        """Return when the hub has been asked once more, or after the time is up."""
        with self._changed:
            self._changed.wait(limit_seconds)

    def wait_for_step(self, step: int) -> None:
        """Return when the run has done this step, or has ended or paused before it."""
        while self.snapshot.step < step and not self.snapshot.is_settled:
            self.wait_for_change(REFRESH_SECONDS)

    def control(self, verb: Verb) -> None:
        """Let the hub pause, resume or stop the run.

        Raises:
            ArgumentError: it has ended, so that there is nothing to pause or resume.
        """
        if not self.snapshot.is_active:
            if verb == "stop":
                return
            raise ArgumentError(f"run {self._name!r} is {self.snapshot.status}: there is nothing to {verb}")
        with self._refreshing:  # else a refresh under way could bring back what was before
            self._insist(verb)
            if verb == "resume" or self.snapshot.status == "paused":  # it has not settled any more
                self._brought_home = None
                self.snapshot = replace(self.snapshot, error="", status="running")
        self.hurry()

    def _insist(self, verb: Verb) -> None:
        """Ask the hub; if it dies meanwhile, ask the next one, unless that was done."""
        request = Control(run=self._name, verb=verb)
        try:
            self.hub.ask(request, Done)
        except HubRestartedError as error:
            log.info("%s is asked for again: %s", verb, error)
            state, _ = self.hub.ask(GetRun(run=self._name, seen={}, seen_events=0), RunState)
            is_done = {"pause": state.status == "paused", "resume": state.status == "running"}
            if state.status not in ENDED and not is_done.get(verb, False):
                self.hub.ask(request, Done)

    def _follow(self) -> None:
        while self.snapshot.is_active:
            try:
                with self._refreshing:
                    self._refresh()
            except DnbError as error:
                self._give_up(f"the hub was lost at step {self.snapshot.step}: {error}{self._way_back()}")
            except Exception as error:  # a thread that ended in silence would leave `wait` waiting
                log.exception("run %r cannot be followed", self._name)
                self._give_up(f"the run cannot be followed further: {type(error).__name__}: {error}")
            self._notify()
            with self._changed:
                self._changed.notify_all()
            if self.snapshot.is_active:
                self._wake.wait(REFRESH_SECONDS)
                self._wake.clear()

    def _refresh(self) -> None:
        before = self.snapshot
        request = GetRun(
            run=self._name,
            seen={name: self._history.num_rows(name) for name in self._history},
            seen_events=len(before.events),
            seen_timeline=0 if before.step_timeline is None else before.step_timeline.step,
            seen_usage=len(self._utilisation),
        )
        state, frames = self.hub.ask(request, RunState)
        self._take_columns(state, frames)  # who sees a step finds its numbers in place
        self._utilisation.extend(state.usage)
        known = self._advanced(before, state)
        trouble = ""
        if state.status in ENDED or state.status == "paused":
            self.snapshot = known  # but not yet that it has ended: who sees that finds the trained state at home
            trouble = self._try_to_bring_home(state.status, state.step)
        self.snapshot = replace(
            known, status=state.status, error=state.error or trouble, remote_traceback=state.remote_traceback
        )

    def _take_columns(self, state: RunState, frames: list[bytes]) -> None:
        for column, frame in zip(state.columns, frames, strict=True):
            values = np.frombuffer(frame, dtype=np.float64)
            if column.by == "step":
                first = self._history.num_rows(column.name) + 1
                self._history.append(column.name, range(first, first + len(values)), values.tolist())
            else:
                pairs = values.reshape(-1, 2)
                self._history.append(column.name, pairs[:, 0].astype(np.int64).tolist(), pairs[:, 1].tolist())

    def _advanced(self, before: RunSnapshot, state: RunState) -> RunSnapshot:
        """Return the state of the run now, except for its status."""
        earlier, steps_per_second = self._remember(state)
        return replace(
            before,
            step=state.step,
            first_step=state.first_step,
            num_steps=state.num_steps,
            steps_per_epoch=state.steps_per_epoch,
            started=state.started,
            elapsed_seconds=state.elapsed_seconds,
            batch_size=state.batch_size,
            num_samples=state.num_samples,
            num_shards=state.num_shards,
            num_owed=state.num_owed,
            totals=state.workers,
            earlier=earlier,
            recent_steps_per_second=steps_per_second,
            events=(*before.events, *state.events) if state.events else before.events,
            step_timeline=state.timeline or before.step_timeline,
            prediction=state.prediction,
            hub=state.hub or before.hub,
        )

    def _remember(self, state: RunState) -> tuple[dict[int, WorkerTotals], float | None]:
        """Remember the engines' counts; return those of a few seconds ago, and the speed since then."""
        now = time.monotonic()
        self._past.append((now, state.step, {totals.engine: totals for totals in state.workers}))
        while now - self._past[0][0] > RECENT_SECONDS:
            self._past.popleft()
        begin, first, earlier = self._past[0]
        return earlier, (state.step - first) / (now - begin) if now > begin else None

    def _try_to_bring_home(self, status: str, step: int) -> str:
        """Bring the trained state home, once per end or pause; say why not, if that fails."""
        if self.own.model is None or self._brought_home == (status, step):
            return ""
        self._brought_home = (status, step)
        try:
            self.own.bring_home(self.hub, self._name, step)
        except (DnbError, KeyError, RuntimeError, TypeError, ValueError) as error:  # a model that was changed, say
            return f"the trained state could not be copied into the notebook's model: {type(error).__name__}: {error}"
        return ""

    def _way_back(self) -> str:
        """Say how to go on with a run whose pool is gone; "" if it may still be there."""
        if self._hub is not None and self._hub.is_alive:
            return ""
        # A hub that has lost its supervisor ends the pool, and may be writing a checkpoint.
        process, deadline = self.snapshot.hub, time.monotonic() + HUB_END_SECONDS
        while process is not None and is_alive(process) and time.monotonic() < deadline:
            threading.Event().wait(HUB_LOOK_SECONDS)
        return f"; {way_back(self._folder)}"

    def _give_up(self, error: str) -> None:
        with self._refreshing:
            self.snapshot = replace(self.snapshot, error=error, status="failed")
