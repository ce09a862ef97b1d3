"""A run as it stood at one moment: as its hub tells it, or as its folder keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dnb.api.runs.history import History
from dnb.api.runs.workers import EngineUsage, usage_of
from dnb.hub.checkpoints.reader import newest_step
from dnb.hub.history.run_files import (
    NOT_READ,
    RunSummary,
    explain_unreadable_run,
    read_events,
    read_history,
    read_summary,
    read_timeline,
    read_usage,
)
from dnb.planning.sample_order import samples_after
from dnb.planning.utilisation import Utilisation
from dnb.protocol.measurements import Prediction, RunEvent, StepTimeline, WorkerTotals
from dnb.protocol.pool import Process
from dnb.protocol.run import ENDED, RunStatus
from dnb.user_code.output_kinds import COUNTED, FIRST, REPEATED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSnapshot:
    """All that is known of a run at one moment, but for its columns of numbers.

    Args:
        status: of the run.
        error: what failed, or why it paused; "" if nothing did.
        remote_traceback: of the engine on which it failed.
        step: committed.
        first_step: committed by the run that this one continues; else 0.
        num_steps: in all.
        steps_per_epoch: of the training set.
        started: seconds since the epoch, less what the run took that this one continues.
        elapsed_seconds: since it was submitted; stands still when it has ended.
        batch_size: samples of the global batch; 0 before it is known.
        num_samples: of the training set, likewise.
        num_shards: of a batch, likewise.
        num_owed: engines that its work has ended, and that the pool still lacks.
        totals: every engine's account of the run so far.
        earlier: the same a few seconds ago, by engine.
        recent_steps_per_second: since then; None if it is not known.
        events: that happened to it.
        step_timeline: of one of the last steps, if the model is divided.
        prediction: of the plan that it follows.
        hub: the process that holds it.
    """

    status: RunStatus = "starting"
    error: str = ""
    remote_traceback: str = ""
    step: int = 0
    first_step: int = 0
    num_steps: int = 0
    steps_per_epoch: int = 0
    started: float = 0.0
    elapsed_seconds: float = 0.0
    batch_size: int = 0
    num_samples: int = 0
    num_shards: int = 0
    num_owed: int = 0
    totals: tuple[WorkerTotals, ...] = ()
    earlier: Mapping[int, WorkerTotals] = field(default_factory=dict)
    recent_steps_per_second: float | None = None
    events: tuple[RunEvent, ...] = ()
    step_timeline: StepTimeline | None = None
    prediction: Prediction | None = None
    hub: Process | None = None

    @property
    def is_active(self) -> bool:
        """True until the run has ended."""
        return self.status not in ENDED

    @property
    def is_settled(self) -> bool:
        """True when the run has ended or paused."""
        return self.status in ENDED or self.status == "paused"

    @property
    def steps_per_second(self) -> float | None:
        """Steps over the last seconds, by second; over the whole run when it has ended."""
        if self.is_active:
            return self.recent_steps_per_second
        return self.step / self.elapsed_seconds if self.elapsed_seconds else None

    @property
    def samples_per_second(self) -> float | None:
        """Samples over the last seconds, by second; over the whole run when it has ended."""
        steps_per_second = self.steps_per_second
        samples = sum(totals.samples for totals in self.totals) or self._num_seen
        steps = self.step - self.first_step
        return None if steps_per_second is None or not steps or not samples else steps_per_second * samples / steps

    @property
    def _num_seen(self) -> int:
        """Samples of all steps so far, where no engine's account is kept, as in a run's folder."""
        if self.is_active or not self.num_samples or not self.batch_size or not self.steps_per_epoch:
            return 0
        ends = samples_after(
            np.array([self.first_step, self.step]),
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
        )
        return int(ends[1] - ends[0])

    @property
    def seconds_left(self) -> float | None:
        """At the recent speed; None when it is not known."""
        steps_per_second = self.steps_per_second
        if self.status != "running" or not steps_per_second:
            return None
        return (self.num_steps - self.step) / steps_per_second

    @property
    def workers(self) -> list[EngineUsage]:
        """Every engine's part since the run began."""
        return [usage_of(totals, None) for totals in self.totals]

    @property
    def recent_workers(self) -> list[EngineUsage]:
        """Every engine's part in the last seconds; in the whole run when it has ended."""
        earlier = self.earlier if self.is_active else {}
        return [usage_of(totals, earlier.get(totals.engine)) for totals in self.totals]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRun:
    """All that is known of a run: how it stands, and its columns of numbers, which only grow."""

    name: str
    snapshot: RunSnapshot = field(default_factory=RunSnapshot)
    history: History = field(default_factory=History)
    utilisation: Utilisation = field(default_factory=Utilisation)


def read_run(folder: Path) -> KnownRun:
    """Read a run from its folder, as it was last written.

    Raises:
        ArgumentError: the folder holds no run, or one of another version of dnb.
    """
    try:
        summary = read_summary(folder)
        rows, events, usage = read_history(folder), read_events(folder), read_usage(folder)
        batch_size, num_samples, num_shards = (
            int(summary.options[name]) for name in ("batch_size", "num_samples", "num_shards")
        )
    except NOT_READ as fault:
        raise explain_unreadable_run(folder, fault) from fault
    history = History()
    for row in rows:
        for name, value in row.values.items():
            history.append(name, [row.step], [value])
    status, error = _ending(summary, folder)
    snapshot = RunSnapshot(
        status=status,
        error=error,
        remote_traceback=summary.remote_traceback,
        step=summary.step,
        num_steps=summary.num_steps,
        steps_per_epoch=summary.steps_per_epoch,
        started=summary.started,
        elapsed_seconds=summary.elapsed_seconds,
        batch_size=batch_size,
        num_samples=num_samples,
        num_shards=num_shards,
        events=tuple(events),
        step_timeline=read_timeline(folder),
        prediction=summary.prediction,
    )
    return KnownRun(name=summary.name, snapshot=snapshot, history=history, utilisation=Utilisation(usage))


def _ending(summary: RunSummary, folder: Path) -> tuple[RunStatus, str]:
    """Return the status in which a run was left, and its error; one whose hub has died has failed."""
    if summary.status in ENDED:
        return summary.status, summary.error
    was = summary.status if summary.ending is None else f"{summary.ending}, and its last checkpoint not whole"
    return "failed", f"the hub ended while the run was {was}; {way_back(folder)}"


def printed(events: Iterable[RunEvent]) -> list[str]:
    """Return the lines that user code has printed, each with its engine or "hub", and how many more there were."""
    lines = []
    for event in events:
        if event.kind in (FIRST, REPEATED):
            who = "hub" if event.engine is None else f"engine {event.engine}"
            lines += [f"{who}: {line}" for line in event.text.split("\n")]
        elif event.kind == COUNTED:
            lines += [f"({line})" for line in event.text.split("\n")]
    return lines


def way_back(folder: Path) -> str:
    """Tell people how a run goes on whose hub is gone."""
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
