"""One run in the hub: carries out what the coordinator decides, and keeps the run's history."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from dnb.errors import SpaceError
from dnb.hub import coordinator as machine
from dnb.hub.accounts import Accounts, Columns
from dnb.hub.history import HistoryRow, RunFolder, RunSummary, summarize
from dnb.hub.reducer import Contribution, Master, NotFinite, mean_of
from dnb.planning.sample_order import iterate_batches
from dnb.planning.shards import shard_bounds
from dnb.records import (
    ENDED,
    EngineFacts,
    Failure,
    GetRun,
    Load,
    Loaded,
    LoadFailed,
    Message,
    RunEvent,
    RunSpec,
    RunState,
    RunStatus,
    Unload,
    Work,
    WorkFailed,
    WorkKind,
    WorkReport,
)
from dnb.transport.job import Job

log = logging.getLogger(__name__)

Send = Callable[[int, Message, Sequence[Any]], None]


class ActiveRun:
    """Master copy, coordinator, batches and history of one run.

    Args:
        spec: the run's numbers.
        frames: spec, job, data and signature as the client signed them, for the engines.
        job: as unpacked.
        engines: those that take part from the start.
        folders: where segments may lie.
        send: sends a record with frames to an engine.
    """

    def __init__(
        self,
        spec: RunSpec,
        frames: Sequence[bytes],
        job: Job,
        *,
        engines: Iterable[EngineFacts],
        folders: Sequence[Path],
        send: Send,
    ) -> None:
        self.spec = spec
        self._frames = frames
        self._send = send
        self._accounts = Accounts(engines)
        self.master = Master(job, folders=folders, prefix=spec.name, clip_norm=spec.clip_norm)
        try:
            for engine in self._accounts:
                self.master.add_slab(engine)
            self._folder = RunFolder(Path(spec.folder))
        except BaseException:
            self.master.drop_slabs()
            self.master.close()
            raise
        self._batches = islice(iterate_batches(job.order), spec.num_steps)
        self._batch = torch.empty(0, dtype=torch.int64)
        self._batch_step = 0
        self._started = time.time()
        self._ended: float | None = None
        self._last_commit = time.monotonic()
        self._remote_traceback = ""
        self._reports: dict[tuple[int, tuple[int, ...]], WorkReport] = {}
        self._columns = Columns()
        self._events: list[RunEvent] = []
        self._coordinator = machine.Coordinator(
            num_steps=spec.num_steps,
            num_shards=spec.num_shards,
            evaluate_every=spec.steps_per_epoch if spec.num_val_samples else None,
            engines=self._accounts,
        )

    @property
    def is_active(self) -> bool:
        """Whether the run may still change."""
        return self._coordinator.status not in ENDED

    @property
    def status(self) -> RunStatus:
        """As the user sees it."""
        return self._coordinator.status

    def start(self) -> None:
        """Send the run to its engines."""
        self._write_summary()
        for note in (*self.spec.notes, *self.master.notes):
            self._note(machine.Note("memory", note))
        self._perform_all(self._coordinator.start())

    # what happens to the run

    def take(self, engine: int, message: Loaded | LoadFailed | WorkReport | WorkFailed) -> None:
        """Take an engine's message about this run."""
        match message:
            case Loaded():
                self._accounts.begin(engine)
                self._dispatch(machine.EngineLoaded(engine))
            case LoadFailed(failure=failure):
                self._dispatch(machine.UserCodeFailed(engine, 0, failure))
            case WorkReport(kind=kind, step=step, shards=shards):
                done = machine.WorkDone(engine, kind, step, shards)
                if self._coordinator.expects(done):
                    self._accounts.add(engine, message.telemetry)
                    self._reports[engine, shards] = message
                self._dispatch(done)
            case WorkFailed(step=step, failure=failure):
                self._dispatch(machine.UserCodeFailed(engine, step, failure))

    def add_engine(self, facts: EngineFacts) -> None:
        """An engine joined the pool."""
        self._accounts.open(facts)
        self._dispatch(machine.EngineJoined(facts.engine))

    def lose_engine(self, engine: int, reason: str) -> None:
        """An engine died or left."""
        self._accounts.leave(engine)
        self._dispatch(machine.EngineLost(engine, reason))

    def ask(self, verb: Literal["pause", "resume", "stop"]) -> None:
        """Pause, resume or stop, between two steps."""
        self._dispatch(machine.Asked(verb))

    def set_lr(self, lr: float) -> None:
        """Change the learning rate of every parameter group from the next step on."""
        for group in self.master.optimizer.param_groups:
            group["lr"] = lr
        step = self._coordinator.step + 1
        self._note(machine.Note("set", f"lr={lr:g} from step {step}"))

    # what others may know

    def state(self, request: GetRun) -> tuple[RunState, list[bytes]]:
        """What a viewer does not have yet."""
        columns, frames = self._columns.after(request.seen)
        state = RunState(
            status=self._coordinator.status,
            step=self._coordinator.step,
            num_steps=self.spec.num_steps,
            steps_per_epoch=self.spec.steps_per_epoch,
            started=self._started,
            elapsed_seconds=(self._ended or time.time()) - self._started,
            error=self._coordinator.error,
            remote_traceback=self._remote_traceback,
            columns=columns,
            workers=self._accounts.totals(working=self.working),
            events=tuple(self._events[request.seen_events :]),
        )
        return state, frames

    @property
    def working(self) -> frozenset[int]:
        """Engines that compute right now."""
        return self._coordinator.working

    def close(self) -> None:
        """Let go of memory and files; the parameters can be asked for until then."""
        self._free_work_memory()
        self.master.close()
        self._folder.close()

    def _free_work_memory(self) -> None:
        self.master.drop_slabs()
        for parcel in (self.spec.job, self.spec.data):
            if parcel.segment is not None:
                Path(parcel.segment.path).unlink(missing_ok=True)

    # carrying out

    def _dispatch(self, event: machine.Event) -> None:
        events: deque[machine.Event] = deque([event])
        while events:
            events.extend(self._perform_all(self._coordinator.handle(events.popleft())))

    def _perform_all(self, actions: Iterable[machine.Action]) -> list[machine.Event]:
        return [follow for action in actions if (follow := self._perform(action)) is not None]

    def _perform(self, action: machine.Action) -> machine.Event | None:
        match action:
            case machine.LoadEngine(engine):
                return self._load(engine)
            case machine.Assign():
                self._assign(action)
            case machine.Commit(kind, step, reports):
                return self._commit(kind, step, reports)
            case machine.Note():
                self._note(action)
            case machine.End(_, _, remote_traceback):
                self._end(remote_traceback)
        return None

    def _load(self, engine: int) -> machine.Event | None:
        master = self.master
        try:
            slab = master.add_slab(engine)
        except SpaceError as error:
            return machine.EngineLost(engine, f"cannot take part: {error}")
        record = Load(
            run=self.spec.name,
            parameters=master.parameters_ref,
            parameter_layout=master.parameter_layout,
            slab=slab,
            gradient_layout=master.gradient_layout,
            buffer_layout=master.buffer_layout,
        )
        self._send(engine, record, self._frames)
        return None

    def _assign(self, action: machine.Assign) -> None:
        indices = self._indices(action.kind, action.step)
        bounds = shard_bounds(len(indices), num_shards=self.spec.num_shards)
        parts = [indices[bounds[shard][0] : bounds[shard][1]] for shard in action.shards]
        record = Work(
            run=self.spec.name,
            kind=action.kind,
            step=action.step,
            shards=action.shards,
            shard_sizes=tuple(len(part) for part in parts),
            batch_samples=len(indices),
            fresh=action.fresh,
        )
        self._send(action.engine, record, [torch.cat(parts).numpy()])

    def _indices(self, kind: WorkKind, step: int) -> torch.Tensor:
        if kind == "evaluation":
            return torch.arange(self.spec.num_val_samples)
        if step != self._batch_step:  # a step that is tried again keeps its batch
            self._batch, self._batch_step = next(self._batches), step
        return self._batch

    def _commit(self, kind: WorkKind, step: int, reports: tuple[tuple[int, tuple[int, ...]], ...]) -> machine.Event:
        counted = [self._reports[report] for report in reports]
        contributions = [
            Contribution(engine, report.sums, report.is_sum)
            for (engine, _), report in zip(reports, counted, strict=True)
        ]
        self._reports.clear()
        try:
            values = self._apply(kind, contributions)
        except NotFinite as verdict:
            return machine.CommitRefused(step, str(verdict))
        except Exception as error:  # noqa: BLE001 - a user's optimizer may raise anything; the run fails with it
            return machine.CommitFailed(step, _failure(error))
        self._record(kind, step, values)
        self._accounts.end_task({engine for engine, _ in reports})
        return machine.Committed(kind, step)

    def _apply(self, kind: WorkKind, contributions: Sequence[Contribution]) -> dict[str, float]:
        if kind == "evaluation":
            loss, metrics = mean_of([c.sums for c in contributions])
            return {"val_loss": loss, **{f"val_{name}": value for name, value in metrics.items()}}
        result = self.master.commit(contributions)
        samples: dict[int, int] = {}
        for part in contributions:
            samples[part.engine] = samples.get(part.engine, 0) + part.sums.num_samples
        self._accounts.count_step(samples)
        now = time.monotonic()
        speed = result.num_samples / max(now - self._last_commit, 1e-9)
        self._last_commit = now
        return {"loss": result.loss, "lr": result.lr, "samples_per_second": speed, **result.metrics}

    def _record(self, kind: WorkKind, step: int, values: dict[str, float]) -> None:
        if kind == "step":
            self._columns.add_step(values)
        else:
            self._columns.add_evaluation(step, values)
            self._last_commit = time.monotonic()
        self._folder.append_row(HistoryRow(kind=kind, step=step, time=time.time(), values=values))
        if fault := self._folder.take_fault():
            self._note(machine.Note("disk", fault))

    def _note(self, note: machine.Note) -> None:
        event = RunEvent(
            kind=note.kind,
            text=note.text,
            step=self._coordinator.step,
            time=time.time(),
            engine=note.engine,
        )
        self._events.append(event)
        self._folder.append_event(event)
        if note.kind in ("running", "resumed"):
            self._last_commit = time.monotonic()
            self._accounts.begin_task()
        if note.kind in ("running", "paused", "resumed"):
            self._write_summary()

    def _end(self, remote_traceback: str) -> None:
        self._remote_traceback = remote_traceback
        self._ended = time.time()
        self._accounts.close()
        self._write_summary()
        for engine in self._accounts.living:
            self._send(engine, Unload(run=self.spec.name), ())
        self._free_work_memory()

    def _write_summary(self) -> None:
        coordinator = self._coordinator
        summary: RunSummary = summarize(
            self.spec,
            status=coordinator.status,
            error=coordinator.error,
            remote_traceback=self._remote_traceback,
            started=self._started,
            elapsed_seconds=(self._ended or time.time()) - self._started,
            step=coordinator.step,
        )
        self._folder.write_summary(summary)


def _failure(error: BaseException) -> Failure:
    return Failure(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )
