"""One run in the hub: carries out what the coordinator decides, and keeps the run's history."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from dnb.errors import SpaceError
from dnb.hub.checkpoints.restore import rows_of
from dnb.hub.checkpoints.writer import Checkpointer, RunProgress
from dnb.hub.guarded_calls import UserCodeError
from dnb.hub.handover import RunHandover
from dnb.hub.history.engine_stats import EngineStats, account_of
from dnb.hub.history.run_folder import HistoryRow, RunSummary, read_timeline, summarize
from dnb.hub.history.step_timelines import EngineTrace, Timelines
from dnb.hub.history.usage import UsageMeter
from dnb.hub.message_checks import PeerError, Rules, check_message, check_parts
from dnb.hub.parameters.master import Contribution, NotFinite, StepResult, mean_of
from dnb.hub.parameters.scheduler_pacing import DecayWatch
from dnb.hub.run.execution.consistency import ConsistencyChecks
from dnb.hub.run.execution.gathered_batch import CannotGather, Gatherer
from dnb.hub.run.execution.pending_reports import Key, PendingReports, TaskReports, describe_mixed_sums, half_frozen
from dnb.hub.run.execution.rendezvous import Rendezvous, open_rendezvous
from dnb.hub.run.execution.sample_batches import Batches
from dnb.hub.run.initial_state import InitialState
from dnb.hub.scheduling import events as machine
from dnb.hub.scheduling.coordinator import Coordinator
from dnb.hub.scheduling.note_words import text_of
from dnb.hub.scheduling.teams import FIRST_TEAM, Teams
from dnb.planning.thawing import half_frozen_text, thawed_text
from dnb.protocol.base import Message
from dnb.protocol.client_messages import CheckpointState, GetRun, GradientRows, RunState
from dnb.protocol.engine_messages import (
    PEER_LOST,
    AddSlabs,
    Diagnose,
    Diagnosis,
    EngineMessage,
    Freeze,
    FunctionsReplaced,
    Load,
    Loaded,
    LoadFailed,
    NoSharedMemory,
    OutputPiece,
    Printed,
    RankAssignment,
    Shipped,
    Thaw,
    Unload,
    WireOffer,
    Work,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.measurements import RunEvent, StageTrace, WorkerTotals, WorkKind
from dnb.protocol.memory import Layout, PayloadRef
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import ENDED, Failure, RunSpec, RunStatus, TransportKind
from dnb.transport.pickling.module_states import LooseStates
from dnb.transport.segments import open_segment
from dnb.transport.sockets.wires import DATA_SLOT, JOB_SLOT, PARAMETERS_SLOT, Flat, Wire
from dnb.transport.system.failures import TRACEBACK_LENGTH, clean_text
from dnb.transport.system.processes import this_process
from dnb.units import amount
from dnb.user_code.return_values import EVALUATION_PREFIX, STEP_COLUMNS

log = logging.getLogger(__name__)

NO_BYTES = memoryview(b"")

# Of all engines together; each is told when it prints more than its own part of that.
MOST_OUTPUT_LINES = 2000
# After this time people are told what the end of a run waits for.
LATE_SECONDS = 2.0

Send = Callable[[int, Message, Sequence[Any]], None]
OfferWire = Callable[..., WireOffer]  # of `Connections.offer`


class ActiveRun:
    """Master copy, coordinator, batches and history of one run.

    Args:
        spec: the run's numbers.
        frames: spec, job, data and signature as the client signed them, for the engines.
        initial_state: the state that it begins with; closed if the run cannot begin.
        engines: those that take part from the start; of a run that was taken over, those that are to come back.
        send: sends a record with frames to an engine.
        offer_wire: lets an engine connect its wire.
        release: told of an engine that was asked to leave, when it owes the run nothing any more.
        evict: ends an engine that holds others up.
        replace: told how many engines are to take the place of those that the run's work has ended.
        generation: how many hubs the pool had before this one.
        departed: accounts of engines that are gone, of a run that was taken over.
        count_commit: told of every step and evaluation that counts from now on.
    """

    def __init__(
        self,
        spec: RunSpec,
        frames: Sequence[bytes],
        initial_state: InitialState,
        *,
        engines: Iterable[EngineFacts],
        send: Send,
        offer_wire: OfferWire,
        release: Callable[[int], None],
        evict: Callable[[int], None],
        replace: Callable[[int], None],
        generation: int = 0,
        departed: Iterable[WorkerTotals] = (),
        count_commit: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.spec = spec
        self._frames = frames
        self._send = send
        self._offer_wire = offer_wire
        self._release = release
        self._count_commit = count_commit
        self._departed: set[int] = set()  # whose slabs may still count in the task under way
        self._process = this_process()
        self._host = socket.gethostname()
        self._members: dict[int, _Member] = {}
        engines = list(engines)
        present = [] if initial_state.is_taken_over else engines
        self._evict, self._replace = evict, replace
        self._rendezvous: dict[int, Rendezvous] = {}  # where teams find themselves
        for facts in present:
            self._members[facts.engine] = self._member(facts)
        self._engine_stats = EngineStats(present)
        if initial_state.is_taken_over:
            former = {facts.engine: account_of(facts) for facts in engines}
            former |= {totals.engine: totals for totals in departed}
            self._engine_stats.restore(former.values(), initial_state.counts)
        self._initial_state = initial_state
        self.master = initial_state.master
        self.master.buffer_rules = spec.buffers
        self._columns = initial_state.columns
        self._first_step = initial_state.first_step
        self._folder = initial_state.files
        num_slabs = -(-spec.num_shards // max(len(engines), 1)) if spec.exact else 1
        try:
            for engine, member in self._members.items() if not spec.partitions else ():
                self.master.add_slabs(engine, num_slabs, kind=member.transport)
        except BaseException:
            if initial_state.is_taken_over:  # the next hub goes on from it
                self._folder.close()
            else:
                self.master.drop_slabs()
                self.master.close()
                self._folder.discard()
            raise
        self._batches = Batches(
            initial_state.order,
            num_steps=spec.num_steps,
            num_shards=spec.num_shards,
            num_val_samples=spec.num_val_samples,
            num_done=initial_state.step,
            steps_per_epoch=spec.steps_per_epoch,
            val_batch=_val_batch(spec),
            val_order=initial_state.val_order,
        )
        self._version = 0  # of the parameters
        self._gradients: dict[int, torch.Tensor] = {}  # by step: loss, norm, some elements
        self._evened_step = 0  # computed once more, as engines had frozen different parameters
        self._sampled_layout = self.master.gradient_layout  # of these elements
        self._started = initial_state.started
        self._ended = initial_state.started + initial_state.elapsed_seconds if initial_state.status in ENDED else None
        self._last_word: machine.Note | None = None  # how it has ended; said when its last checkpoint is whole
        self.is_over = initial_state.status in ENDED and not initial_state.is_ending  # ended, and that was said
        self._is_lateness_told = False
        self._last_commit = time.monotonic()
        self._pending = PendingReports(is_divided=bool(spec.partitions))
        self._deferred: deque[Callable[[], None]] = deque()  # what may wait until the engines are at work again
        self._verdict: _NonFiniteStep | None = None
        self._replaced_functions = initial_state.mended
        self._checks = ConsistencyChecks(
            self.master.parameter_layout, num_steps=spec.num_steps, precision=spec.precision, probe=spec.probe
        )
        self._decay = self._watch_decay()
        self._fault: Failure | None = None  # of user code, in a chore
        self._over_limit: set[int] = set()
        self._num_lines = 0  # that engines have told
        self._events = initial_state.events
        self._timelines = Timelines(read_timeline(self._folder.path) if initial_state.is_taken_over else None)
        self._meter = UsageMeter(
            self._folder.usage() if initial_state.is_taken_over else (), begin_seconds=self._seconds
        )
        self._held: tuple[Key, ...] = ()  # engines and shards of the last step
        self._rules = Rules(
            num_gradients=len(self.master.gradient_layout.slots),
            num_parameters=len(self.master.parameter_layout.slots),
            num_shards=spec.num_shards,
            num_stages=max((partition.num_stages for partition in spec.partitions), default=0),
        )
        # Where the loss looks at the whole batch; a team has all of it at hand.
        self._gatherer = Gatherer() if spec.loss_over == "batch" and not spec.partitions else None
        self._coordinator = self._make_coordinator(
            engines=[facts.engine for facts in present],
            returning=[facts.engine for facts in engines if initial_state.is_taken_over],
            generation=generation,
        )
        self._checkpoints = Checkpointer(
            spec,
            frames,
            self.master,
            self._columns,
            place=self._place,
            tell=self._tell_of_checkpoint,
            generation=generation,
        )
        if self._replaced_functions is not None:
            self._checkpoints.replace_functions(self._replaced_functions[0])

    def _make_coordinator(self, *, engines: list[int], returning: list[int], generation: int) -> Coordinator | Teams:
        spec, initial_state = self.spec, self._initial_state
        make = partial(
            Coordinator,
            num_steps=spec.num_steps,
            num_shards=spec.num_shards,
            evaluate_every=spec.steps_per_epoch if spec.num_val_samples else None,
            step=initial_state.step,
            evaluated=initial_state.evaluated,
            status=initial_state.status,
            error=initial_state.error,
            traceback=initial_state.traceback,
            generation=generation,
            name_samples=self._batches.name_samples,
            gathers=self._gatherer is not None,
        )
        if not spec.partitions:
            return make(engines=engines, returning=returning)
        return Teams(
            lambda teams: make(engines=teams),
            partitions={partition.num_engines: partition for partition in spec.partitions},
            size=spec.team_size,
            engines=engines,
            returning=returning,
            first=FIRST_TEAM * (generation + 1),
        )

    def _watch_decay(self) -> DecayWatch | None:
        spec = self.spec
        if self.master.scheduler is None or spec.scheduler_every != "step":
            return None
        largest = max(self._columns.by_step.get("lr", ()), default=0.0)
        return DecayWatch(steps_per_epoch=spec.steps_per_epoch, num_steps=spec.num_steps, largest=largest)

    @property
    def is_active(self) -> bool:
        """Whether the run may still change."""
        return self._coordinator.status not in ENDED

    @property
    def status(self) -> RunStatus:
        """As the user sees it; a run that has ended is running until its last checkpoint is whole."""
        status = self._coordinator.status
        if status in ENDED and not self.is_over:
            return "running"
        # To people a run that was taken over has not begun anew.
        return "running" if status == "starting" and self._initial_state.is_taken_over else status

    @property
    def step(self) -> int:
        """The last step that was committed."""
        return self._coordinator.step

    @property
    def has_advanced(self) -> bool:
        """Whether something was committed since the beginning, or will not be."""
        return self._version > 0 or self._coordinator.status not in ("starting", "running")

    def start(self) -> None:
        """Send the run to its engines; one that was taken over waits for those that come back."""
        if self._initial_state.is_taken_over:
            if not self.is_over:
                self._note(machine.Note("recovered", self._initial_state.note))
            if self._initial_state.is_ending:
                self._last_word = machine.Note(self._coordinator.status, self._coordinator.last_word)
                self._end()
            elif self._initial_state.is_given_up:
                self._note(machine.Note("failed", self._initial_state.error))
                self._write_summary()
                self.master.drop_slabs()
                _remove_payload(self.spec.data)
            return
        self._write_summary()
        for note in (*self.spec.notes, *self.master.notes):
            self._note(machine.Note("memory", note))
        for finding in self.spec.findings:
            self._note(machine.Note(finding.kind, finding.text))
        if self.spec.choice:
            self._note(machine.Note("planned", self.spec.choice))
        if self.spec.resumed is not None:
            self._folder.append_rows(rows_of(self._columns, time=self._started))
            for text in self.spec.resumed.notes:
                self._note(machine.Note("checkpoint", text))
        self._perform_all(self._coordinator.start())

    # what happens to the run

    def attach(self, engine: int, wire: Wire) -> None:
        """An engine has connected: send what it needs to load the run."""
        member = self._members.get(engine)
        if member is None or not self.is_active:
            wire.close()
            return
        member.wire, member.version, member.states_version = wire, self._version, 0
        if member.gradient_layout is not self.master.gradient_layout:  # it was to load the run before
            wire.queue(self._thaw_record())
        if frozen := self.master.freezing.on_engines:
            wire.queue(Freeze(run=self.spec.id, names=tuple(frozen)))
        slabs = self.master.slabs_of(self._coordinator.owner_of(engine))
        wire.queue(AddSlabs(run=self.spec.id, slabs=tuple(slab.ref for slab in slabs)))
        if member.transport == "socket":
            self._upload(wire)
            self._open_receive_buffers(engine, wire)
        if self._replaced_functions is not None:
            wire.queue(*self._replaced_frames())
        wire.flush()

    def take(  # noqa: C901 - the table of messages
        self, engine: int, message: EngineMessage, raw: memoryview = NO_BYTES
    ) -> None:
        """Take an engine's message about this run.

        Raises:
            PeerError: it makes no sense; nothing has changed.
        """
        member = self._members.get(engine)
        if member is None:
            return
        message = check_message(message, self._rules)
        match message:
            case NoSharedMemory(reason=reason):
                if not member.has_loaded:  # else what lies in its slabs may count already
                    self._change_to_socket(engine, reason)
            case Loaded(team=team):
                member.has_loaded = True
                assignment = self._coordinator.assignment_of(engine)
                if assignment is None or assignment[0] == team:  # else it had sat down before it got another seat
                    self._engine_stats.begin(engine)
                    self._dispatch(machine.EngineLoaded(engine))
            case LoadFailed(failure=Failure(kind=kind), team=team) if kind == PEER_LOST and team is not None:
                assignment = self._coordinator.assignment_of(engine)
                if assignment is not None and assignment[0] == team:
                    self._dispatch(machine.PeerWasLost(engine, None))
            case LoadFailed(failure=failure):
                self._dispatch(machine.UserCodeFailed(engine, 0, self._kept_whole(failure, 0, f"engine-{engine}")))
            case WorkReport():
                self._take_report(engine, message, raw)
            case OutputPiece(lease=lease):
                if self._gatherer is not None:
                    self._gatherer.add_piece(engine, lease, raw)
            case Printed(lines=lines, kind=kind):
                self._tell_output(engine, lines, kind=kind)
            case WorkFailed(lease=0):
                self._conclude_without(engine)
            case WorkFailed(failure=Failure(kind=kind), lease=lease) if kind == PEER_LOST and self.spec.partitions:
                self._dispatch(machine.PeerWasLost(engine, lease))
            case WorkFailed(step=step, failure=failure, lease=lease):
                member.is_written |= failure.kind == "ParameterWrittenError"
                failure = self._kept_whole(failure, step, f"engine-{engine}")
                self._dispatch(machine.UserCodeFailed(engine, step, failure, lease))
            case Diagnosis(step=step):
                if self._verdict is not None and (self._verdict.engine, self._verdict.step) == (engine, step):
                    self._conclude(message)

    def _kept_whole(self, failure: Failure, step: int, source: str) -> Failure:
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

    def _take_report(self, engine: int, message: WorkReport, raw: memoryview) -> None:
        num_samples = sum(part.num_samples for part in message.parts)
        done = machine.WorkDone(engine, message.lease, message.kind, message.step, message.shards, num_samples)
        if self._coordinator.expects(done):
            check_parts(
                message,
                num_slabs=self._pending.num_slabs(engine, message.shards),
                num_samples=self._batches.num_samples(message.kind, message.step),
                is_divided=bool(self.spec.partitions),
            )
            if message.thawed:
                self._check_thawed(message.thawed)
            states = self._read_states(message.states) if message.states else None
            if message.kind == "outputs" and self._gatherer is not None:
                sizes, _ = self._batches.samples_of("outputs", message.step, message.shards)
                self._gatherer.take(engine, message, raw, num_samples=sum(sizes))
            if message.telemetry is not None:
                self._engine_stats.add(engine, message.telemetry)
                self._look_at_memory(engine)
            self._pending.add(engine, message, states)
            if message.note:
                self._note(machine.Note("memory", message.note, engine))
            if message.digests:
                self.run_deferred()  # the hub's own hashes may be among them
            if self._checks.check(engine, message):
                self._members[engine].version = -1  # it gets all of them anew
        self._dispatch(done)

    def _read_states(self, packed: bytes) -> LooseStates:
        try:
            states = LooseStates.unpack(packed)
            self.master.states.check(states)
        except ValueError as error:
            raise PeerError(clean_text(str(error), length=TRACEBACK_LENGTH)) from error
        return states

    def _check_thawed(self, names: Sequence[str]) -> None:
        if self.spec.partitions:
            raise PeerError("an engine of a team tells of thawed parameters")
        try:
            self.master.freezing.check(names)
        except ValueError as error:
            raise PeerError(clean_text(str(error), length=TRACEBACK_LENGTH)) from error

    def _tell_output(self, engine: int, lines: Sequence[str], *, kind: str) -> None:
        """Keep what user code has printed as an event, up to a number of lines for the whole run."""
        self._num_lines += len(lines)
        if lines and self._num_lines - len(lines) < MOST_OUTPUT_LINES:
            self._note(machine.Note(kind, "\n".join(lines), engine))

    def _look_at_memory(self, engine: int) -> None:
        """Tell once of each engine that it needs more than was allowed; nothing is ended for it."""
        limit, grown = self.spec.memory_limit, self._engine_stats.grown_bytes(engine)
        if limit is None or grown is None or grown <= limit or engine in self._over_limit:
            return
        self._over_limit.add(engine)
        text = f"engine {engine} holds {amount(grown)} for this run, more than memory_limit={amount(limit)}"
        self._note(machine.Note("memory", text, engine))

    def add_engine(self, facts: EngineFacts) -> None:
        """An engine joined the pool."""
        self._members[facts.engine] = self._member(facts)
        self._engine_stats.open(facts)
        self._dispatch(machine.EngineJoined(facts.engine))

    def lose_engine(self, loss: machine.EngineLost) -> None:
        """An engine died."""
        self._forget_member(loss.engine, exit_state="dead")
        self._dispatch(loss)
        self._conclude_without(loss.engine)

    def expect_loss(self, engine: int) -> None:
        """An engine will be lost in a moment."""
        self._dispatch(machine.EngineEnding(engine))

    def silence_engine(self, engine: int, reason: str, *, is_asleep: bool = False) -> None:
        """An engine is not heard any more; one that is asleep was not stopped."""
        self._dispatch(machine.EngineSilent(engine, reason, is_asleep=is_asleep))
        self._conclude_without(engine)

    def miss_engine(self, engine: int) -> None:
        """An engine is not heard any more, but is at work."""
        self._dispatch(machine.EngineBusy(engine))

    def hear_engine(self, engine: int) -> None:
        """An engine that was not heard beats again."""
        self._dispatch(machine.EngineHeard(engine))

    def _conclude_without(self, engine: int) -> None:
        """Whoever was to find the place of a number that is not finite will not."""
        if self._verdict is not None and self._verdict.engine == engine:
            self._conclude(None)

    def retire_engine(self, engine: int) -> None:
        """Let an engine leave when it has reported what it computes; `release` is told."""
        if self.is_active and engine in self._members:
            self._dispatch(machine.RetireEngine(engine))
        else:
            self._release(engine)

    def make_spare(self, engine: int) -> None:
        """An engine becomes a spare: it loads the run and waits."""
        self._dispatch(machine.MakeSpare(engine))

    def activate_spare(self, engine: int) -> None:
        """A spare takes part, from the shards on that nobody holds."""
        self._dispatch(machine.ActivateSpare(engine))

    def tell(self, kind: str, text: str, engine: int | None = None) -> None:
        """Write something into the run's history that others did."""
        if self.is_active:
            self._note(machine.Note(kind, text, engine))

    def _forget_member(self, engine: int, *, exit_state: Literal["dead", "left"]) -> None:
        self._engine_stats.leave(engine, exit_state=exit_state)
        if self._members.pop(engine, None) is not None:
            self._departed.add(engine)

    def _let_go(self, engine: int) -> None:
        self._forget_member(engine, exit_state="left")
        self._release(engine)
        if self._verdict is not None and self._verdict.engine == engine:
            self._conclude(None)

    def _drop_slabs(self, departed: frozenset[int]) -> None:
        """Give back the memory of engines that are gone; one that came back and left again may still count."""
        for engine in departed - self._members.keys() - self._departed:
            self.master.drop_slabs_of(engine)

    def run_deferred(self) -> None:
        """Write what was put off while engines had to wait for it."""
        while self._deferred:
            try:
                self._deferred.popleft()()
            except UserCodeError as error:  # the state of the user's scheduler, say: the next step is not taken
                self._fault = self._fault or self._kept_whole(error.failure, self._coordinator.step + 1, "hub")

    def _prepare(self) -> None:
        self._batches.prepare()
        if note := self._batches.take_note():
            self.tell("data", note)

    @property
    def has_deferred(self) -> bool:
        """Whether `run_deferred` has something to do."""
        return bool(self._deferred)

    def ask(self, verb: Literal["pause", "resume", "stop"]) -> None:
        """Pause, resume or stop, between two steps."""
        self._dispatch(machine.Asked(verb))

    def set(self, options: Mapping[str, float | None]) -> None:
        """Change numbers of the optimizer or the clipping, from the next step on.

        Raises:
            ArgumentError: one of them cannot be changed, or not to this; none is.
        """
        self.master.set(options)
        if "clip_norm" in options:
            self.spec = msgspec.structs.replace(self.spec, clip_norm=options["clip_norm"])
            self._checkpoints.go_on_with(self.spec)
        text = ", ".join(f"{name}={value if value is None else format(value, 'g')}" for name, value in options.items())
        self._note(machine.Note("set", f"{text} from step {self._coordinator.step + 1}"))

    def replace_functions(self, pickled: bytes, signature: bytes) -> None:
        """Let all engines, and those that join later, go on with another step or loss function."""
        self._replaced_functions = pickled, signature
        self._checkpoints.replace_functions(pickled)
        for member in self._members.values():
            if member.wire is not None:
                member.wire.send(*self._replaced_frames())
        self._note(machine.Note("mended", f"another step or loss function from step {self._coordinator.step + 1}"))

    def _replaced_frames(self) -> tuple[FunctionsReplaced, bytes]:
        assert self._replaced_functions is not None
        pickled, signature = self._replaced_functions
        return FunctionsReplaced(run=self.spec.id, signature=signature), pickled

    @property
    def handover(self) -> RunHandover:
        """What the next hub needs to take the run over, should this one die."""
        return RunHandover(
            frames=tuple(self._frames),
            clip_norm=self.spec.clip_norm,
            mended=self._replaced_functions,
            journal=self.master.journal_ref,
        )

    @property
    def departed(self) -> tuple[WorkerTotals, ...]:
        """The accounts of engines that are gone."""
        return self._engine_stats.departed

    # checkpoints

    def take_checkpoint(self, path: Path | None) -> CheckpointState:
        """Let one be written: after the step under way, or now if none is."""
        state = self._checkpoints.ask(path)
        self.tick()
        return self._checkpoints.state_of(state.ticket)

    def checkpoint_state(self, ticket: int) -> CheckpointState:
        """How a checkpoint stands that was asked for."""
        return self._checkpoints.state_of(ticket)

    def catch_up(self) -> None:
        """Do what was put off, so that whoever asks now hears of it."""
        self.run_deferred()
        self.tick()

    def tick(self) -> None:
        """Several times a second: somebody may be late, or a checkpoint be due."""
        self._dispatch(machine.Tick())
        if self._fault is not None and self.is_active:
            self._dispatch(machine.CommitFailed(self._coordinator.step + 1, self._fault))
        self._checkpoints.tick(is_still=not self.is_active or self.status != "running")
        self._settle_end()
        self._tell_of_disk(self._folder.tick())

    def _place(self) -> RunProgress:
        return RunProgress(self._coordinator.step, self._coordinator.evaluated, self._seconds)

    @property
    def _seconds(self) -> float:
        """Since the run was submitted; stands still when it has ended."""
        return (self._ended or time.time()) - self._started

    def _tell_of_checkpoint(self, kind: str, text: str, step: int) -> None:
        self._note(machine.Note(kind, text), step=step)

    def _owes_evaluation(self, kind: WorkKind, step: int) -> bool:
        spec = self.spec
        is_due = step == spec.num_steps or step % spec.steps_per_epoch == 0
        return kind == "step" and spec.num_val_samples > 0 and is_due

    # what others may know

    def state(
        self, request: GetRun, *, heartbeats: Mapping[int, float], num_owed: int = 0
    ) -> tuple[RunState, list[bytes]]:
        """What a viewer does not have yet; changes nothing.

        Args:
            request: with what it has.
            heartbeats: seconds since each living engine was heard.
            num_owed: engines that the pool lacks.
        """
        columns, frames = self._columns.after(request.seen)
        state = RunState(
            status=self.status,
            step=self._coordinator.step,
            first_step=self._first_step,
            num_steps=self.spec.num_steps,
            steps_per_epoch=self.spec.steps_per_epoch,
            started=self._started,
            elapsed_seconds=self._seconds,
            error=self._coordinator.error,
            remote_traceback=self._coordinator.traceback,
            columns=columns,
            workers=self._workers(heartbeats),
            events=tuple(self._events[request.seen_events :]),
            timeline=self._timelines.newer_than(request.seen_timeline),
            prediction=self.spec.prediction,
            usage=tuple(self._meter.rows[request.seen_usage :]),
            batch_size=self.spec.batch_size,
            num_samples=self.spec.num_samples,
            num_shards=self.spec.num_shards,
            num_owed=num_owed,
            hub=self._process,
        )
        return state, frames

    def gradients(self) -> tuple[GradientRows, list[bytes]]:
        """What was seen of the gradients in the first steps."""
        names = tuple(slot.name for slot in self._sampled_layout.slots)
        rows = [row.numpy().tobytes() for row in self._gradients.values()]
        return GradientRows(steps=tuple(self._gradients), names=names), [b"".join(rows)]

    def _workers(self, heartbeats: Mapping[int, float]) -> tuple[WorkerTotals, ...]:
        held: dict[int, tuple[int, ...]] = {}
        for engine, shards in self._held:
            held[engine] = tuple(sorted({*held.get(engine, ()), *shards}))
        return tuple(
            msgspec.structs.replace(
                totals,
                heartbeat_age_seconds=heartbeats.get(totals.engine) if totals.engine in self._members else None,
                shards=held.get(totals.engine, ()) if self._held and totals.engine in self._members else None,
            )
            for totals in self._engine_stats.totals(working=self.working, resting=self._coordinator.resting)
        )

    @property
    def working(self) -> frozenset[int]:
        """Engines that compute right now."""
        return self._coordinator.working

    def close(self) -> None:
        """Let go of memory and files; the parameters can be asked for until then."""
        self.run_deferred()
        self._checkpoints.close()
        self._settle_end(is_closing=True)
        self.master.drop_slabs()
        _remove_payload(self.spec.data)
        _remove_payload(self.spec.job)
        self.master.close()
        self._folder.finish()
        self._folder.forget()
        self._folder.close()

    # carrying out

    def _dispatch(self, event: machine.Event) -> None:
        events: deque[machine.Event] = deque([event])
        while events:
            events.extend(self._perform_all(self._coordinator.handle(events.popleft(), time.monotonic())))

    def _perform_all(self, actions: Iterable[machine.Action]) -> list[machine.Event]:
        return [follow for action in actions if (follow := self._perform(action)) is not None]

    def _perform(self, action: machine.Action) -> machine.Event | None:  # noqa: C901 - the table of actions
        match action:
            case machine.LoadEngine(engine):
                return self._load(engine)
            case machine.Assign():
                return self._assign(action)
            case machine.Commit("outputs", step, reports):
                return self._gather(step, reports)
            case machine.Commit(kind, step, reports):
                return self._commit(kind, step, reports)
            case machine.Release(engine):
                self._let_go(engine)
            case machine.Note():
                self._note(action)
            case machine.Disband(team):
                self._rendezvous.pop(team, None)
            case machine.EvictEngine(engine):
                self._evict(engine)
            case machine.Replace(number):
                self._replace(number)
            case machine.End():
                self._end()
        return None

    def _load(self, engine: int) -> machine.Event | None:
        master, member = self.master, self._members[engine]
        member.has_loaded = False
        owner = self._coordinator.owner_of(engine)
        try:
            if not master.slabs_of(owner):
                master.add_slabs(owner, self._num_slabs(engine), kind=member.transport)
        except SpaceError as error:
            return machine.EngineLost(engine, f"cannot take part: {error}")
        member.gradient_layout = master.gradient_layout
        record = Load(
            run=self.spec.id,
            transport=member.transport,
            wire=self._offer_wire(engine, member.transport, is_near=member.is_near),
            parameters=master.parameters_ref,
            parameter_layout=master.parameter_layout,
            gradient_layout=master.gradient_layout,
            buffer_layout=master.buffer_layout,
            assignment=self._assignment(engine),
        )
        self._send(engine, record, self._frames)
        return None

    def _num_slabs(self, engine: int) -> int:
        """As many as engines may write at once."""
        assignment = self._coordinator.assignment_of(engine)
        if assignment is not None and assignment[2].kind == "synced":
            return assignment[2].num_engines
        return 2 if self.spec.ties else 1

    def _usual_slabs(self, engine: int) -> tuple[int, ...]:
        """Where an engine writes what it is given first."""
        assignment = self._coordinator.assignment_of(engine)
        if assignment is not None and assignment[2].kind == "synced":
            return (assignment[1],)
        return (0, 1) if self.spec.ties else (0,)

    def _assignment(self, engine: int) -> RankAssignment | None:
        assignment = self._coordinator.assignment_of(engine)
        if assignment is None:
            return None
        team, rank, partition = assignment
        if team not in self._rendezvous:
            self._rendezvous[team] = open_rendezvous()
        place = self._rendezvous[team]
        return RankAssignment(team=team, rank=rank, partition=partition, host=place.host, port=place.port)

    def _member(self, facts: EngineFacts) -> _Member:
        """How an engine is reached: as was wished, else by memory if it is on this host."""
        wishes = self.spec.transport
        is_near = facts.process.host == self._host
        wish = wishes.get(str(facts.engine), wishes.get(""))
        return _Member(wish or ("memory" if is_near else "socket"), is_near)

    def _change_to_socket(self, engine: int, reason: str) -> None:
        member = self._members.get(engine)
        if member is None or member.transport == "socket":
            return
        member.transport = "socket"
        self.master.drop_slabs_of(engine)
        self._note(machine.Note("memory", f"engine {engine} gets its data over a socket: {reason}", engine))
        self._perform(machine.LoadEngine(engine))

    def _upload(self, wire: Wire) -> None:
        """Everything that an engine without shared memory has to be sent before it can load the run."""
        for slot, payload in ((JOB_SLOT, self.spec.job), (DATA_SLOT, self.spec.data)):
            if payload.segment is not None:
                memory = open_segment(payload.segment).memory
                wire.queue_pieces(slot, Flat(memoryview(memory)), [(0, payload.segment.num_bytes)])
        num_bytes = self.master.parameter_layout.num_bytes
        wire.queue_pieces(PARAMETERS_SLOT, self.master.parameters_flat, [(0, num_bytes)])
        wire.queue(Shipped(run=self.spec.id))

    def _open_receive_buffers(self, engine: int, wire: Wire) -> None:
        wire.receive_buffers = dict(enumerate(slab.flat.memory for slab in self.master.slabs_of(engine)))

    def _assign(self, action: machine.Assign) -> machine.Event | None:
        member = self._members.get(action.engine)
        if member is None or member.wire is None:
            return None  # its loss is on the way
        wire = member.wire
        try:
            sizes, raw = self._batches.samples_of(action.kind, action.step, action.shards)
        except UserCodeError as error:  # of the sampler; all before this step is committed
            return machine.CommitFailed(action.step, self._kept_whole(error.failure, action.step, "hub"))
        if action.kind == "step":
            self._deferred.append(self._prepare)
        slabs = self._usual_slabs(action.engine)
        if (self.spec.exact or action.in_extra_slab) and action.kind == "step":
            try:
                slabs = self._slabs_for(action, member)
            except SpaceError as error:
                if action.in_extra_slab:
                    return machine.LeaseDeclined(action.engine, action.lease)
                return machine.EngineLost(action.engine, f"cannot take {len(action.shards)} shards: {error}")
        if member.transport == "socket" and (member.version != self._version or member.is_written):
            whole = [(0, self.master.parameter_layout.num_bytes)]
            ranges = whole if member.is_written else self.master.changing
            wire.queue_pieces(PARAMETERS_SLOT, self.master.parameters_flat, ranges)
            member.version, member.is_written = self._version, False
        states = b""
        if member.states_version != self.master.states.version:
            states, member.states_version = self.master.states.packed, self.master.states.version
        gathered = None
        if action.kind == "step" and self._gatherer is not None:
            gathered = self._gatherer.of(action.shards)
            raw = self._gatherer.memory + raw
        is_first = action.kind == ("step" if self._gatherer is None else "outputs")
        wire.queue(
            Work(
                run=self.spec.id,
                lease=action.lease,
                kind=action.kind,
                step=action.step,
                shards=action.shards,
                shard_sizes=sizes,
                slabs=slabs,
                batch_samples=self._batches.num_samples(action.kind, action.step),
                fresh=action.fresh,
                probe=is_first and self._wants_probe(action, member),
                check_copy=not self.spec.partitions and is_first and self._checks.is_digest_due(action.step - 1),
                trace=bool(self.spec.partitions)
                and self.spec.telemetry
                and action.kind == "step"
                and self._timelines.wants(action.step, time.monotonic()),
                gathered=gathered,
                states=states,
            ),
            raw,
        )
        wire.flush()
        owner = self._coordinator.owner_of(action.engine)
        self._pending.expect(action.engine, action.shards, owner=owner, slabs=slabs)
        return None

    def _slabs_for(self, action: machine.Assign, member: _Member) -> tuple[int, ...]:
        """A slab for each shard of an exact run, else one for all, besides those that the engine has filled already."""
        assert member.wire is not None
        if not self.spec.exact:
            first, last = 1, 2
        else:
            first = 0 if action.fresh and not action.in_extra_slab else member.num_filled
            last = member.num_filled = first + len(action.shards)
        added = self.master.add_slabs(action.engine, last, kind=member.transport)
        if added:
            member.wire.queue(AddSlabs(run=self.spec.id, slabs=tuple(slab.ref for slab in added)))
            if member.transport == "socket":
                self._open_receive_buffers(action.engine, member.wire)
        return tuple(range(first, last))

    def _commit(self, kind: WorkKind, step: int, reports: tuple[Key, ...]) -> machine.Event | None:
        self.run_deferred()
        taken = self._pending.take(reports)
        contributions = taken.contributions
        traces = self._placed(taken.traces)
        if (obstacle := self._obstacle(kind, step, taken)) is not None:
            return obstacle
        try:
            values, samples = self._apply(kind, step, contributions, [engine for engine, _ in reports], taken.states)
            if kind == "evaluation":
                self.master.commit_evaluation(step, values)
        except NotFinite as verdict:
            return self._diagnose(step, verdict, contributions)
        except UserCodeError as error:
            self._checkpoints.is_torn = True
            return machine.CommitFailed(step, self._kept_whole(error.failure, step, "hub"))
        self._count_commit(step)
        self._engine_stats.end_task({engine for engine, _ in reports})
        if kind == "step":
            self._held = reports
            if names := self.master.thawed_here:
                self._fault = self._thaw(names, step + 1)
        self._defer_after_commit(kind, step, values, samples, traces)
        return machine.Committed(kind, step)

    def _obstacle(self, kind: WorkKind, step: int, taken: TaskReports) -> machine.Event | None:
        """Why what engines have brought is not applied; mostly nothing."""
        if self._fault is not None:
            return machine.CommitFailed(step, self._fault)
        if self._checks.disagreement:
            failure = Failure(kind="PlanError", message=self._checks.disagreement, traceback="")
            return machine.CommitFailed(step, failure)
        if mixed := describe_mixed_sums(taken.contributions):
            return machine.CommitRefused(step, mixed)
        if reason := self._checks.take_copy_fault():
            return machine.CommitRefused(step, reason)
        if taken.thawed:
            fault = self._thaw(taken.thawed, step)
            return machine.CommitDeferred(step) if fault is None else machine.CommitFailed(step, fault)
        return self._follow_freezing(step, taken) if kind == "step" else None

    def _follow_freezing(self, step: int, taken: TaskReports) -> machine.Event | None:
        """Let what user code has frozen, or thawed again, on one engine be so on all, if they differ in a step."""
        before, slots = self.master.freezing.on_engines, self.master.gradient_layout.slots
        halves = {slots[index].name for index in half_frozen(taken)}
        if halves and self._evened_step == step:
            return machine.CommitRefused(step, half_frozen_text(min(halves)))
        frozen = ({slots[index].name for index in taken.frozen} - halves) | (halves - before)  # what is new counts
        if frozen == before and not halves:
            return None
        self.master.freeze_on_engines(frozen)
        for member in self._members.values():
            if member.wire is not None and (halves or not member.has_loaded):
                member.wire.send(Freeze(run=self.spec.id, names=tuple(sorted(frozen))))
        if not halves:
            return None
        self._evened_step = step
        return machine.CommitDeferred(step)

    def _thaw(self, names: Iterable[str], step: int) -> Failure | None:
        """Give parameters that user code has thawed a place in all slabs; why a step cannot be computed with them."""
        names = sorted(names)
        if self.spec.partitions:
            return Failure(kind="ModelChangedError", message=thawed_text(names[0]), traceback="")
        numbers = {engine: len(self.master.slabs_of(engine)) for engine in self._members}
        self.master.thaw(names)
        self._rules = replace(self._rules, num_gradients=len(self.master.gradient_layout.slots))
        shown = f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        text = f"parameter {shown} was thawed: trained from step {step} on"
        self._note(machine.Note("thawed", text), step=step - 1)
        try:
            for engine, member in self._members.items():
                self.master.add_slabs(engine, numbers[engine], kind=member.transport)
                self._tell_of_thaw(engine, member)
        except SpaceError as error:
            return Failure(kind="SpaceError", message=str(error), traceback="")
        return None

    def _tell_of_thaw(self, engine: int, member: _Member) -> None:
        member.num_filled = 0
        if member.wire is None:
            return  # it is told when it connects
        member.gradient_layout = self.master.gradient_layout
        refs = tuple(slab.ref for slab in self.master.slabs_of(engine))
        member.wire.queue(self._thaw_record())
        member.wire.queue(AddSlabs(run=self.spec.id, slabs=refs))
        if member.transport == "socket":
            self._open_receive_buffers(engine, member.wire)
        member.wire.flush()

    def _thaw_record(self) -> Thaw:
        master = self.master
        return Thaw(run=self.spec.id, gradient_layout=master.gradient_layout, buffer_layout=master.buffer_layout)

    def _gather(self, step: int, reports: tuple[Key, ...]) -> machine.Event:
        """Put together what the loss of a step is computed on."""
        assert self._gatherer is not None
        self._pending.go_on_with_step()
        sizes, indices = self._batches.samples_of("outputs", step, range(self.spec.num_shards))
        try:
            self._gatherer.gather(reports, sizes=sizes, indices=indices, exact=self.spec.exact)
        except CannotGather as verdict:
            return machine.CommitRefused(step, str(verdict))
        return machine.Committed("outputs", step)

    def _defer_after_commit(
        self,
        kind: WorkKind,
        step: int,
        values: dict[str, float],
        samples: dict[int, int],
        traces: Mapping[int, EngineTrace],
    ) -> None:
        """What is still to be done after a commit, once the engines are at work again."""
        if news := self.master.take_news():
            self._note(machine.Note("state", news), step=step)
        defer_after_commit = self._deferred.append
        defer_after_commit(self.master.finish_deferred)
        defer_after_commit(partial(self._record, kind, step, values, samples, time.time()))
        defer_after_commit(partial(self._keep_timeline, step, traces))
        if self._meter.is_due(self._seconds):
            defer_after_commit(self._keep_usage)
        if kind == "step" and self._checks.is_digest_due(step):
            defer_after_commit(partial(self._take_digest, step))
        if self._checkpoints.is_due(kind, step, values, owes_evaluation=self._owes_evaluation(kind, step)):
            defer_after_commit(self._checkpoints.take)  # until the next commit nothing changes what it copies
        if self._departed:
            defer_after_commit(partial(self._drop_slabs, frozenset(self._departed)))
            self._departed.clear()

    def _apply(
        self,
        kind: WorkKind,
        step: int,
        contributions: Sequence[Contribution],
        engines: Iterable[int],
        states: LooseStates | None,
    ) -> tuple[dict[str, float], dict[int, int]]:
        """What the history says, and who brought how many samples to a step."""
        if kind == "evaluation":
            loss, metrics = mean_of([c.sums for c in contributions])
            self._last_commit = time.monotonic()
            return {f"{EVALUATION_PREFIX}{name}": value for name, value in (metrics | {"loss": loss}).items()}, {}
        is_sampled = step <= self._first_step + self.spec.num_sampled
        is_sampled = is_sampled and self.master.gradient_layout is self._sampled_layout
        result = self.master.commit(contributions, describe=self._describe, sample=is_sampled, states=states)
        if result.sample is not None:
            self._gradients[step] = torch.cat(
                [torch.tensor([result.loss, result.grad_norm], dtype=torch.float64), result.sample]
            )
        self._version += 1
        self._engine_stats.count_step(dict.fromkeys(engines, 0) | result.samples)  # of a team one counts the samples
        return result.values, result.samples

    def _describe(self, result: StepResult) -> dict[str, float]:
        """What the history says of a step; it is in the journal before the step is applied."""
        now = time.monotonic()
        speed = result.num_samples / max(now - self._last_commit, 1e-9)
        self._last_commit = now
        numbers = (result.loss, result.lr, speed, self._seconds, result.grad_norm)
        own = dict(zip(STEP_COLUMNS, numbers, strict=True))
        return own | result.metrics | own if result.metrics else own  # no metric takes a column, whoever sent it

    def _record(
        self, kind: WorkKind, step: int, values: dict[str, float], samples: dict[int, int], when: float
    ) -> None:
        if kind == "step":
            self._columns.add_step(values)
        else:
            self._columns.add_evaluation(step, values)
        self._folder.append_row(HistoryRow(kind=kind, step=step, time=when, values=values, samples=samples))
        if kind == "step" and self._decay is not None and (text := self._decay.look(step, values["lr"])):
            self._note(machine.Note("state", text))

    def _tell_of_disk(self, news: Iterable[str]) -> None:
        for text in news:
            log.warning(text)
            self._note(machine.Note("disk", text))

    def _placed(self, traces: Mapping[int, StageTrace]) -> dict[int, EngineTrace]:
        """What all engines did in a step, and in which seats; empty if one of them has none."""
        placed: dict[int, EngineTrace] = {}
        for engine, trace in traces.items():
            assignment = self._coordinator.assignment_of(engine)
            if assignment is None:
                return {}
            placed[engine] = EngineTrace(trace, *assignment, self._engine_stats.grown_bytes(engine))
        return placed

    def _keep_timeline(self, step: int, parts: Mapping[int, EngineTrace]) -> None:
        if parts:
            self._folder.write_timeline(self._timelines.take(step, parts))

    def _keep_usage(self) -> None:
        row = self._meter.take(self._seconds, self._coordinator.step, self._engine_stats.totals(working=()))
        if row is not None:
            self._folder.append_usage(row)

    # NaN and infinity

    def _diagnose(self, step: int, verdict: NotFinite, contributions: Sequence[Contribution]) -> machine.Event | None:
        """Let the engine whose gradient it is find shard and parameter; the step is refused when it has."""
        is_whole = bool(self.spec.partitions) or self._gatherer is not None  # no shard has a loss of its own
        member = None if is_whole else self._members.get(verdict.engine)
        if member is None or member.wire is None:
            return machine.CommitRefused(step, str(verdict))
        shards = self._shards_behind(verdict, contributions)
        sizes, raw = self._batches.samples_of("step", step, shards)
        self._verdict = _NonFiniteStep(verdict.engine, step, str(verdict))
        request = Diagnose(
            run=self.spec.id,
            step=step,
            shards=shards,
            shard_sizes=sizes,
            slab=verdict.slab,
            batch_samples=self._batches.num_samples("step", step),
        )
        member.wire.send(request, raw)
        return None

    def _shards_behind(self, verdict: NotFinite, contributions: Sequence[Contribution]) -> tuple[int, ...]:
        """The shards whose gradients are in the slab."""
        if self.spec.exact:
            return tuple(c.shard for c in contributions if (c.engine, c.slab) == (verdict.engine, verdict.slab))
        return self._pending.shards_in(verdict.engine, verdict.slab)

    def _conclude(self, diagnosis: Diagnosis | None) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        where = f"engine {verdict.engine}"
        if diagnosis is not None and diagnosis.shard is not None:
            where += f", shard {diagnosis.shard}: the gradient of {diagnosis.parameter!r} is {diagnosis.kind}"
        self._dispatch(machine.CommitRefused(verdict.step, f"{verdict.text} ({where})"))

    # one model for all

    def _wants_probe(self, action: machine.Assign, member: _Member) -> bool:
        """Whether the engine has not been held against the notebook or others yet, if there are any."""
        if self.spec.partitions or member.is_probed:
            return False
        if len(self._members) < 2 and self.spec.probe is None:
            return False
        if action.step > self._first_step + 1:
            return False
        member.is_probed = True
        return True

    def _take_digest(self, step: int) -> None:
        whole, each = self.master.digests()
        self._checks.keep(step, each)
        values = {"digest": float(whole)}
        self._columns.add_evaluation(step, values)
        self._folder.append_row(HistoryRow(kind="evaluation", step=step, time=time.time(), values=values))

    def _note(self, note: machine.Note, *, step: int | None = None) -> None:
        if note.kind in ENDED and not self.is_over:
            self._last_word = note  # said when the last checkpoint is whole
            return
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
            self._meter.skip_to(self._seconds)
        if note.kind in ("paused", "resumed"):
            self._keep_usage()
        if note.kind in ("running", "resumed"):
            self._last_commit = time.monotonic()
            self._engine_stats.begin_task()
        if note.kind in ("running", "paused", "resumed"):
            self._write_summary()

    def _end(self) -> None:
        """No step will follow; the end is told once the last checkpoint is whole."""
        self.run_deferred()
        self._ended = self._ended or time.time()
        self._engine_stats.close()
        self._keep_usage()
        self._checkpoints.end()
        for engine in self._engine_stats.living:
            self._send(engine, Unload(run=self.spec.id), ())
        self.master.drop_slabs()
        self._settle_end()
        if not self.is_over:
            self._write_summary()  # a hub that takes the run over has its last checkpoint written

    def _settle_end(self, *, is_closing: bool = False) -> None:
        """Say that the run has ended, in events and folder, unless its last checkpoint is still to come."""
        if self.is_over or self.is_active:
            return
        if self._checkpoints.is_finishing and not is_closing:
            if not self._is_lateness_told and time.time() - (self._ended or 0.0) > LATE_SECONDS:
                self._is_lateness_told = True
                text = f"the last checkpoint, of step {self._coordinator.step}, is being written; then the run ends"
                self._note(machine.Note("checkpoint", text))
            return
        self.is_over = True
        if shortfall := self._checkpoints.shortfall:
            self._note(machine.Note("checkpoint", f"{shortfall}: the run ends without it, earlier checkpoints stay"))
        self._tell_of_disk(self._folder.finish())
        if self._last_word is not None:
            self._note(self._last_word)
        self._write_summary()
        _remove_payload(self.spec.data)  # what makes the model stays, for a hub that takes an ended run over

    def _write_summary(self) -> None:
        coordinator = self._coordinator
        is_ending = coordinator.status in ENDED and not self.is_over
        summary: RunSummary = summarize(
            self.spec,
            status="running" if is_ending else coordinator.status,
            ending=coordinator.status if is_ending else None,
            error=coordinator.error,
            remote_traceback=coordinator.traceback,
            started=self._started,
            elapsed_seconds=self._seconds,
            step=coordinator.step,
        )
        self._folder.write_summary(summary)


@dataclass(slots=True)
class _Member:
    """How an engine takes part."""

    transport: TransportKind
    is_near: bool  # on the hub's host
    wire: Wire | None = None
    version: int = 0  # of the parameters that it holds, if it holds its own
    num_filled: int = 0  # slabs of an exact step
    is_probed: bool = False
    has_loaded: bool = False
    is_written: bool = False  # user code has written into its own copy of the parameters
    states_version: int = 0  # of the loose states that it has
    gradient_layout: Layout | None = None  # of which it was told


@dataclass(frozen=True, slots=True)
class _NonFiniteStep:
    """A step that is not finite, while its engine looks for the place."""

    engine: int
    step: int
    text: str


def _val_batch(spec: RunSpec) -> int | None:
    """Samples of an evaluation that one engine must have together."""
    if spec.whole_metrics:
        return max(spec.num_val_samples, 1)
    return spec.val_batch_size or (spec.batch_size if spec.loss_over == "batch" else None)


def _remove_payload(payload: PayloadRef) -> None:
    if payload.segment is not None:
        Path(payload.segment.path).unlink(missing_ok=True)
