"""One run in the hub: carries out what the coordinator decides, and does what the pool asks of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from dnb.hub.checkpoints.state_copy import RunProgress
from dnb.hub.checkpoints.writer import Checkpointer
from dnb.hub.handover import RunHandover
from dnb.hub.run.engine_links import EngineLinks
from dnb.hub.run.execution.deferred_work import DeferredWork
from dnb.hub.run.execution.dispatcher import Dispatcher
from dnb.hub.run.execution.run_coordinator import make_coordinator
from dnb.hub.run.execution.sample_batches import batches_of
from dnb.hub.run.execution.task_executor import TaskExecutor
from dnb.hub.run.initial_state import InitialState
from dnb.hub.run.message_handler import MessageHandler
from dnb.hub.run.pool_links import PoolLinks
from dnb.hub.run.recorder import RunRecorder
from dnb.hub.run.run_end import RunEnd, remove_payload
from dnb.hub.scheduling import events as machine
from dnb.protocol.client_messages import CheckpointState, GetRun, GradientRows, RunState
from dnb.protocol.engine_messages import EngineMessage
from dnb.protocol.measurements import WorkerTotals
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import ENDED, Failure, RunSpec, RunStatus
from dnb.transport.sockets.wires import Wire
from dnb.user_code.captured_output import CapturedOutput

NO_BYTES = memoryview(b"")


class ActiveRun:
    """A run that the hub holds: its coordinator, and those that carry out what it decides.

    Args:
        spec: the run's numbers.
        frames: spec, job, data and signature as the client signed them, for the engines.
        initial_state: the state that it begins with; closed if the run cannot begin.
        engines: those that take part from the start; of a run that was taken over, those that are to come back.
        pool: the functions by which it reaches the pool.
        generation: how many hubs the pool had before this one.
        departed: accounts of engines that are gone, of a run that was taken over.
        output: takes what user code prints in the hub.
    """

    def __init__(
        self,
        spec: RunSpec,
        frames: Sequence[bytes],
        initial_state: InitialState,
        *,
        engines: Iterable[EngineFacts],
        pool: PoolLinks,
        generation: int = 0,
        departed: Iterable[WorkerTotals] = (),
        output: CapturedOutput | None = None,
    ) -> None:
        engines = list(engines)
        self.spec = spec
        self.master = initial_state.master
        self.master.buffer_rules = spec.buffers
        self.frames = frames
        self._initial_state = initial_state
        self._pool = pool
        batches = batches_of(spec, initial_state.order, num_done=initial_state.step, val_order=initial_state.val_order)
        self._coordinator = make_coordinator(
            spec, initial_state, engines=engines, generation=generation, name_samples=batches.name_samples
        )
        self._links = EngineLinks(
            spec,
            frames,
            self.master,
            self._coordinator,
            pool,
            engines=() if initial_state.is_taken_over else engines,
            functions=initial_state.mended,
        )
        self._make_slabs(len(engines))
        self._recorder = RunRecorder(
            spec, initial_state, self._coordinator, engines=engines, departed=departed, output=output
        )
        self._checkpoints = self._open_checkpoints(generation)
        self._deferred = DeferredWork(self._keep_whole)
        self._ending = RunEnd(
            spec,
            self.master,
            self._coordinator,
            links=self._links,
            recorder=self._recorder,
            checkpoints=self._checkpoints,
            deferred=self._deferred,
        )
        tasks = TaskExecutor(
            spec,
            self.master,
            self._coordinator,
            batches=batches,
            links=self._links,
            recorder=self._recorder,
            checkpoints=self._checkpoints,
            deferred=self._deferred,
            count_commit=pool.count_commit,
        )
        self._dispatcher = Dispatcher(
            self._coordinator, pool, tasks=tasks, links=self._links, recorder=self._recorder, ending=self._ending
        )
        self._messages = MessageHandler(
            spec,
            self.master,
            self._coordinator,
            dispatcher=self._dispatcher,
            tasks=tasks,
            links=self._links,
            recorder=self._recorder,
        )

    def _make_slabs(self, num_engines: int) -> None:
        """Make the slabs of those that take part from the start; without room for them the run does not begin."""
        spec = self.spec
        num_slabs = -(-spec.num_shards // max(num_engines, 1)) if spec.exact else 1
        try:
            if not spec.partitions:
                self._links.add_slabs(num_slabs)
        except BaseException:
            if self._initial_state.is_taken_over:  # the next hub goes on from it
                self._initial_state.files.close()
            else:
                self.master.drop_slabs()
                self.master.close()
                self._initial_state.files.discard()
            raise

    def _open_checkpoints(self, generation: int) -> Checkpointer:
        checkpoints = Checkpointer(
            self.spec,
            self.frames,
            self.master,
            self._recorder.columns,
            place=self._place,
            tell=self._recorder.add_checkpoint_event,
            generation=generation,
        )
        if self._initial_state.mended is not None:
            checkpoints.replace_functions(self._initial_state.mended[0])
        return checkpoints

    @property
    def is_active(self) -> bool:
        """True while the run may still change."""
        return self._coordinator.status not in ENDED

    @property
    def is_over(self) -> bool:
        """True if the run has ended, and that was reported."""
        return self._recorder.is_over

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
        """True if something was committed since the beginning, or will not be."""
        return self._links.version > 0 or self._coordinator.status not in ("starting", "running")

    def start(self) -> None:
        """Send the run to its engines; one that was taken over waits for those that come back."""
        if self._initial_state.is_taken_over:
            self._start_again()
            return
        spec, add_event = self.spec, self._recorder.add_event
        self._recorder.write_summary()
        for note in (*spec.notes, *self.master.notes):
            add_event(machine.Note("memory", note))
        for finding in spec.findings:
            add_event(machine.Note(finding.kind, finding.text))
        if spec.choice:
            add_event(machine.Note("planned", spec.choice))
        if spec.resumed is not None:
            self._recorder.append_resumed_history()
            for text in spec.resumed.notes:
                add_event(machine.Note("checkpoint", text))
        self._dispatcher.start()

    def _start_again(self) -> None:
        if not self.is_over:
            self._recorder.add_event(machine.Note("recovered", self._initial_state.note))
        if self._initial_state.is_ending:
            self._ending.add_event(machine.Note(self._coordinator.status, self._coordinator.last_word))
            self._ending.begin()
        elif self._initial_state.is_given_up:
            self._recorder.add_event(machine.Note("failed", self._initial_state.error))
            self._recorder.write_summary()
            self.master.drop_slabs()
            remove_payload(self.spec.data)

    # engines speak

    def attach(self, engine: int, wire: Wire) -> None:
        """Send an engine that has connected all that it needs to load the run."""
        if engine in self._links and self.is_active:
            self._links.attach(engine, wire)
        else:
            wire.close()

    def take(self, engine: int, message: EngineMessage, raw: memoryview = NO_BYTES) -> None:
        """Handle an engine's message about this run.

        Raises:
            PeerError: it makes no sense; nothing has changed.
        """
        self._messages.take(engine, message, raw)

    # what happens to engines

    def add_engine(self, facts: EngineFacts) -> None:
        """Let an engine that joined the pool take part."""
        self._links.add(facts)
        self._recorder.stats.open(facts)
        self._dispatcher.dispatch(machine.EngineJoined(facts.engine))

    def lose_engine(self, loss: machine.EngineLost) -> None:
        """Go on without an engine that died."""
        self._dispatcher.forget_engine(loss.engine, exit_state="dead")
        self._dispatcher.dispatch(loss)
        self._dispatcher.end_search(loss.engine)

    def expect_loss(self, engine: int) -> None:
        """Give no more work to an engine that will be lost in a moment."""
        self._dispatcher.dispatch(machine.EngineEnding(engine))

    def silence_engine(self, engine: int, reason: str, *, is_asleep: bool = False) -> None:
        """Note that an engine is not heard any more; one that is asleep was not stopped."""
        self._dispatcher.dispatch(machine.EngineSilent(engine, reason, is_asleep=is_asleep))
        self._dispatcher.end_search(engine)

    def miss_engine(self, engine: int) -> None:
        """Note that an engine is not heard any more, but is at work."""
        self._dispatcher.dispatch(machine.EngineBusy(engine))

    def hear_engine(self, engine: int) -> None:
        """Note that an engine that was not heard beats again."""
        self._dispatcher.dispatch(machine.EngineHeard(engine))

    def retire_engine(self, engine: int) -> None:
        """Let an engine leave when it has reported what it computes; `release` is called then."""
        if self.is_active and engine in self._links:
            self._dispatcher.dispatch(machine.RetireEngine(engine))
        else:
            self._pool.release(engine)

    def make_spare(self, engine: int) -> None:
        """Let an engine become a spare: it loads the run and waits."""
        self._dispatcher.dispatch(machine.MakeSpare(engine))

    def activate_spare(self, engine: int) -> None:
        """Let a spare take part, from the shards on that nobody holds."""
        self._dispatcher.dispatch(machine.ActivateSpare(engine))

    # what people want

    def tell(self, kind: str, text: str, engine: int | None = None) -> None:
        """Write an event of another part of the hub into the run's history."""
        if self.is_active:
            self._recorder.add_event(machine.Note(kind, text, engine))

    def ask(self, verb: Literal["pause", "resume", "stop"]) -> None:
        """Pause, resume or stop, between two steps."""
        self._dispatcher.dispatch(machine.Asked(verb))

    def set(self, options: Mapping[str, float | None]) -> None:
        """Change numbers of the optimizer or the clipping, from the next step on.

        Raises:
            ArgumentError: one of them cannot be changed, or not to this; none is.
        """
        self.master.set(options)
        if "clip_norm" in options:
            self.spec = msgspec.structs.replace(self.spec, clip_norm=options["clip_norm"])
            self._checkpoints.go_on_with(self.spec)
            self._recorder.go_on_with(self.spec)
        text = ", ".join(f"{name}={value if value is None else format(value, 'g')}" for name, value in options.items())
        self._recorder.add_event(machine.Note("set", f"{text} from step {self.step + 1}"))

    def replace_functions(self, pickled: bytes, signature: bytes) -> None:
        """Let all engines, and those that join later, go on with another step or loss function."""
        self._checkpoints.replace_functions(pickled)
        self._links.replace_functions(pickled, signature)
        self._recorder.add_event(machine.Note("mended", f"loss or step function replaced from step {self.step + 1}"))

    def take_checkpoint(self, path: Path | None) -> CheckpointState:
        """Let one be written: after the step under way, or now if none is."""
        state = self._checkpoints.ask(path)
        self.tick()
        return self._checkpoints.state_of(state.ticket)

    def checkpoint_state(self, ticket: int) -> CheckpointState:
        """Return the state of a checkpoint that was asked for."""
        return self._checkpoints.state_of(ticket)

    def state(
        self, request: GetRun, *, heartbeats: Mapping[int, float], num_owed: int = 0
    ) -> tuple[RunState, list[bytes]]:
        """Return the part of the run's state that a viewer does not have yet; changes nothing.

        Args:
            request: with what it has.
            heartbeats: seconds since each living engine was heard.
            num_owed: engines that the pool lacks.
        """
        return self._recorder.state(
            request, status=self.status, present=self._links, heartbeats=heartbeats, num_owed=num_owed
        )

    def gradients(self) -> tuple[GradientRows, list[bytes]]:
        """Return the samples of the gradients in the first steps."""
        return self._recorder.gradients.read()

    @property
    def working(self) -> frozenset[int]:
        """Engines that compute right now."""
        return self._coordinator.working

    # what the next hub needs

    @property
    def handover(self) -> RunHandover:
        """The record with which the next hub recovers the run, should this one die."""
        return RunHandover(
            frames=tuple(self.frames),
            clip_norm=self.spec.clip_norm,
            mended=self._links.functions,
            journal=self.master.journal_ref,
        )

    @property
    def departed(self) -> tuple[WorkerTotals, ...]:
        """The accounts of engines that are gone."""
        return self._recorder.stats.departed

    # carrying out

    @property
    def has_deferred(self) -> bool:
        """True if `run_deferred` has something to do."""
        return bool(self._deferred)

    def run_deferred(self) -> None:
        """Write everything that was deferred while engines had to wait for it."""
        self._deferred.run()

    def catch_up(self) -> None:
        """Do everything that was deferred, so that a client that asks now gets it."""
        self.run_deferred()
        self.tick()

    def tick(self) -> None:
        """Look for engines that are late, and for checkpoints that are due; called several times a second."""
        self._dispatcher.dispatch(machine.Tick())
        if self._deferred.fault is not None and self.is_active:
            self._dispatcher.dispatch(machine.CommitFailed(self.step + 1, self._deferred.fault))
        self._checkpoints.tick(is_still=not self.is_active or self.status != "running")
        self._ending.tell()
        self._recorder.tick()

    def _keep_whole(self, failure: Failure) -> Failure:
        return self._recorder.keep_whole(failure, self.step + 1, "hub")

    def _place(self) -> RunProgress:
        return RunProgress(self._coordinator.step, self._coordinator.evaluated, self._recorder.clock.seconds)

    def close(self) -> None:
        """Let go of memory and files; the parameters can be asked for until then."""
        self.run_deferred()
        self._checkpoints.close()
        self._ending.tell(is_closing=True)
        self.master.drop_slabs()
        remove_payload(self.spec.data)
        remove_payload(self.spec.job)
        self.master.close()
        self._recorder.close()
