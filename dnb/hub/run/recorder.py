"""The record of a run: its folder, its history in memory, and the state that viewers get."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping, Sequence

import msgspec

from dnb.hub.checkpoints.restore import rows_of
from dnb.hub.history.engine_stats import EngineStats, account_of
from dnb.hub.history.run_files import HistoryRow, read_timeline, summarize
from dnb.hub.history.step_timelines import EngineTrace, Timelines
from dnb.hub.history.usage import UsageMeter
from dnb.hub.parameters.master import StepResult
from dnb.hub.parameters.scheduler_pacing import DecayWatch
from dnb.hub.run.execution.gradient_samples import GradientSamples
from dnb.hub.run.execution.pending_reports import Key
from dnb.hub.run.execution.run_coordinator import RunCoordinator
from dnb.hub.run.initial_state import InitialState
from dnb.hub.run.output_recorder import OutputRecorder
from dnb.hub.run.run_clock import RunClock
from dnb.hub.scheduling.events import Note
from dnb.hub.scheduling.note_words import text_of
from dnb.protocol.client_messages import GetRun, RunState
from dnb.protocol.measurements import RunEvent, StageTrace, WorkerTotals, WorkKind
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import ENDED, Failure, RunSpec, RunStatus
from dnb.transport.system.failures import TRACEBACK_LENGTH, clean_text
from dnb.transport.system.processes import this_process
from dnb.units import amount
from dnb.user_code.captured_output import CapturedOutput
from dnb.user_code.return_values import STEP_COLUMNS

log = logging.getLogger(__name__)


class RunRecorder:
    """Writer of a run's folder, and holder of the state that viewers ask for.

    Args:
        spec: the run's numbers.
        initial_state: how far it has come, and its folder.
        coordinator: says how the run stands.
        engines: those that take part from the start; of a run that was taken over, those that are to come back.
        departed: accounts of engines that are gone, of a run that was taken over.
        output: takes what user code prints in the hub.
    """

    def __init__(
        self,
        spec: RunSpec,
        initial_state: InitialState,
        coordinator: RunCoordinator,
        *,
        engines: Sequence[EngineFacts],
        departed: Iterable[WorkerTotals],
        output: CapturedOutput | None = None,
    ) -> None:
        is_over = initial_state.status in ENDED
        self._process = this_process()
        self._spec = spec
        self._coordinator = coordinator
        self._folder = initial_state.files
        self.first_step = initial_state.first_step
        self.columns = initial_state.columns
        self._events = initial_state.events
        self.stats = _stats_of(initial_state, engines, departed)
        self.clock = RunClock(
            started=initial_state.started,
            ended=initial_state.started + initial_state.elapsed_seconds if is_over else None,
        )
        self.is_over = is_over and not initial_state.is_ending  # ended, and that was said
        self._timelines = Timelines(read_timeline(self._folder.path) if initial_state.is_taken_over else None)
        self._meter = UsageMeter(
            self._folder.usage() if initial_state.is_taken_over else (), begin_seconds=self.clock.seconds
        )
        self._decay = _watch_decay(spec, initial_state)
        self.gradients = GradientSamples(
            initial_state.master.gradient_layout, last_step=self.first_step + spec.num_sampled
        )
        self.output = OutputRecorder(
            self._folder.output,
            add_event=self.add_event,
            step=lambda: self._coordinator.step,
            events=self._events,
            own=output,
        )

    def go_on_with(self, spec: RunSpec) -> None:
        """Write other numbers of the run from now on."""
        self._spec = spec

    # what has happened

    def add_event(self, note: Note, *, step: int | None = None) -> None:
        """Write an event for people; begin, pause and resumption open and close spans of time."""
        if note.kind == "paused":
            self.output.tell_counts()
        event = RunEvent(
            kind=note.kind,
            text=clean_text(text_of(note), length=TRACEBACK_LENGTH),
            step=self._coordinator.step if step is None else step,
            time=time.time(),
            engine=note.engine,
        )
        self._events.append(event)
        self._folder.append_event(event)
        if note.kind == "running":
            self._meter.skip_to(self.clock.seconds)
        if note.kind in ("paused", "resumed"):
            self.add_usage()
        if note.kind in ("running", "resumed"):
            self.clock.begin_task()
            self.stats.begin_task()
        if note.kind in ("running", "paused", "resumed"):
            self.write_summary()

    def add_checkpoint_event(self, kind: str, text: str, step: int) -> None:
        """Write an event on the result of a checkpoint."""
        self.add_event(Note(kind, text), step=step)

    def check_memory(self, engine: int) -> None:
        """Report, once for each engine, that it needs more than was allowed; nothing is ended for it."""
        limit = self._spec.memory_limit
        grown = None if limit is None else self.stats.take_excess(engine, limit)
        if limit is not None and grown is not None:
            text = f"engine {engine} holds {amount(grown)} for this run, more than memory_limit={amount(limit)}"
            self.add_event(Note("memory", text, engine))

    def keep_whole(self, failure: Failure, step: int, source: str) -> Failure:
        """Put a text that was cut into a file of the run's folder, and name that in what people read."""
        if not failure.whole:
            return failure
        path = self._folder.write_error(f"step-{step:06d}-{source}", failure.whole)
        if path is None:
            return msgspec.structs.replace(failure, whole="")
        where = f"the whole text is in {path}"
        return msgspec.structs.replace(
            failure,
            place=f"{failure.place}; {where}" if failure.place else where,
            traceback=f"{failure.traceback}\n[This is cut: {where}]\n",
            whole="",
        )

    # what was committed

    def describe(self, result: StepResult) -> dict[str, float]:
        """Return what the history says of a step; it is in the journal before the step is applied."""
        speed = result.num_samples / max(self.clock.take_lap(), 1e-9)
        numbers = (result.loss, result.lr, speed, self.clock.seconds, result.grad_norm)
        own = dict(zip(STEP_COLUMNS, numbers, strict=True))
        return own | result.metrics | own if result.metrics else own  # no metric takes a column, whoever sent it

    def count_step(self, step: int, result: StepResult, engines: Iterable[int]) -> None:
        """Count a step that was applied, and keep what is seen of its gradients."""
        self.gradients.add(step, result)
        self.stats.count_step(dict.fromkeys(engines, 0) | result.samples)  # of a team one counts the samples

    def end_task(self, kind: WorkKind, reports: tuple[Key, ...]) -> None:
        """Count a task that was committed, and remember who held which shards of a step."""
        self.stats.end_task({engine for engine, _ in reports})
        if kind == "step":
            self.stats.hold(reports)

    def record(self, kind: WorkKind, step: int, values: dict[str, float], samples: dict[int, int], when: float) -> None:
        """Write a step or an evaluation into the history."""
        if kind == "step":
            self.columns.add_step(values)
        else:
            self.columns.add_evaluation(step, values)
        self._folder.append_row(HistoryRow(kind=kind, step=step, time=when, values=values, samples=samples))
        self.output.add_own()
        if kind == "step" and self._decay is not None and (text := self._decay.check(step, values["lr"])):
            self.add_event(Note("state", text))

    def record_digest(self, step: int, digest: float) -> None:
        """Write the hash of all parameters after a step into the history."""
        values = {"digest": digest}
        self.columns.add_evaluation(step, values)
        self._folder.append_row(HistoryRow(kind="evaluation", step=step, time=time.time(), values=values))

    def append_resumed_history(self) -> None:
        """Write the history of the run that this one continues into its folder."""
        self._folder.append_rows(rows_of(self.columns, time=self.clock.started))

    # how engines spend their time

    def wants_timeline(self, step: int) -> bool:
        """Return whether engines shall report what they do in this step."""
        return self._timelines.wants(step, time.monotonic())

    def place_traces(self, traces: Mapping[int, StageTrace]) -> dict[int, EngineTrace]:
        """Return the actions of all engines in a step, by team and rank; empty if one of them has none."""
        placed: dict[int, EngineTrace] = {}
        for engine, trace in traces.items():
            assignment = self._coordinator.assignment_of(engine)
            if assignment is None:
                return {}
            placed[engine] = EngineTrace(trace, *assignment, self.stats.grown_bytes(engine))
        return placed

    def add_timeline(self, step: int, parts: Mapping[int, EngineTrace]) -> None:
        """Keep the timeline of a step, if there is one."""
        if parts:
            self._folder.write_timeline(self._timelines.build(step, parts))

    @property
    def is_usage_due(self) -> bool:
        """True if the open span of usage has lasted long enough."""
        return self._meter.is_due(self.clock.seconds)

    def add_usage(self) -> None:
        """Close the open span of usage."""
        row = self._meter.close_span(self.clock.seconds, self._coordinator.step, self.stats.totals(working=()))
        if row is not None:
            self._folder.append_usage(row)

    # what is on disk

    def write_summary(self) -> None:
        """Write the run's status; until its end was reported, the status with which it is to end."""
        coordinator = self._coordinator
        is_ending = coordinator.status in ENDED and not self.is_over
        summary = summarize(
            self._spec,
            status="running" if is_ending else coordinator.status,
            ending=coordinator.status if is_ending else None,
            error=coordinator.error,
            remote_traceback=coordinator.traceback,
            started=self.clock.started,
            elapsed_seconds=self.clock.seconds,
            step=coordinator.step,
        )
        self._folder.write_summary(summary)

    def tick(self) -> None:
        """Let the disk take what it has not taken before."""
        self.output.add_own()
        self._tell_of_disk(self._folder.tick())

    def finish(self) -> None:
        """Write all that waits for the disk, as far as it takes it."""
        self._tell_of_disk(self._folder.finish())

    def close(self) -> None:
        """Close the folder; nothing of the run is left for another hub."""
        self.output.close()
        self._folder.finish()
        self._folder.forget()
        self._folder.close()

    def _tell_of_disk(self, news: Iterable[str]) -> None:
        for text in news:
            log.warning(text)
            self.add_event(Note("disk", text))

    # what others may know

    def state(
        self,
        request: GetRun,
        *,
        status: RunStatus,
        present: Container[int],
        heartbeats: Mapping[int, float],
        num_owed: int = 0,
    ) -> tuple[RunState, list[bytes]]:
        """Return what a viewer does not have yet.

        Args:
            request: with what it has.
            status: as the user sees it.
            present: engines that take part.
            heartbeats: seconds since each living engine was heard.
            num_owed: engines that the pool lacks.
        """
        columns, frames = self.columns.after(request.seen)
        state = RunState(
            status=status,
            step=self._coordinator.step,
            first_step=self.first_step,
            num_steps=self._spec.num_steps,
            steps_per_epoch=self._spec.steps_per_epoch,
            started=self.clock.started,
            elapsed_seconds=self.clock.seconds,
            error=self._coordinator.error,
            remote_traceback=self._coordinator.traceback,
            columns=columns,
            workers=self._workers(heartbeats, present),
            events=tuple(self._events[request.seen_events :]),
            timeline=self._timelines.newer_than(request.seen_timeline),
            prediction=self._spec.prediction,
            usage=tuple(self._meter.rows[request.seen_usage :]),
            batch_size=self._spec.batch_size,
            num_samples=self._spec.num_samples,
            num_shards=self._spec.num_shards,
            num_owed=num_owed,
            hub=self._process,
        )
        return state, frames

    def _workers(self, heartbeats: Mapping[int, float], present: Container[int]) -> tuple[WorkerTotals, ...]:
        coordinator, held = self._coordinator, self.stats.shards
        return tuple(
            msgspec.structs.replace(
                totals,
                heartbeat_age_seconds=heartbeats.get(totals.engine) if totals.engine in present else None,
                shards=None if held is None or totals.engine not in present else held.get(totals.engine, ()),
            )
            for totals in self.stats.totals(working=coordinator.working, spares=coordinator.spares)
        )


def _stats_of(
    initial_state: InitialState, engines: Sequence[EngineFacts], departed: Iterable[WorkerTotals]
) -> EngineStats:
    if not initial_state.is_taken_over:
        return EngineStats(engines)
    stats = EngineStats(())
    former = {facts.engine: account_of(facts) for facts in engines}
    former |= {totals.engine: totals for totals in departed}
    stats.restore(former.values(), initial_state.counts)
    return stats


def _watch_decay(spec: RunSpec, initial_state: InitialState) -> DecayWatch | None:
    if initial_state.master.scheduler is None or spec.scheduler_every != "step":
        return None
    largest = max(initial_state.columns.by_step.get("lr", ()), default=0.0)
    return DecayWatch(steps_per_epoch=spec.steps_per_epoch, num_steps=spec.num_steps, largest=largest)
