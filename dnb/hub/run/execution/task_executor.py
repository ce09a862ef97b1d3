"""The tasks of a run, carried out: shards are given to engines, and what they report is committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from dnb.errors import SpaceError
from dnb.hub.checkpoints.writer import Checkpointer
from dnb.hub.guarded_calls import UserCodeError
from dnb.hub.history.step_timelines import EngineTrace
from dnb.hub.message_checks import PeerError, check_parts
from dnb.hub.parameters.master import Master, NotFinite, mean_of
from dnb.hub.run.engine_links import EngineLink, EngineLinks
from dnb.hub.run.execution.consistency import ConsistencyChecks
from dnb.hub.run.execution.deferred_work import DeferredWork
from dnb.hub.run.execution.gathered_batch import CannotGather, Gatherer, gathers_outputs
from dnb.hub.run.execution.nan_search import NonFiniteSearch
from dnb.hub.run.execution.pending_reports import Key, PendingReports, TaskReports, describe_mixed_parts
from dnb.hub.run.execution.run_coordinator import RunCoordinator
from dnb.hub.run.execution.sample_batches import Batches
from dnb.hub.run.execution.trainable_parameters import TrainableParameters
from dnb.hub.run.recorder import RunRecorder
from dnb.hub.scheduling.events import (
    Assign,
    CommitFailed,
    CommitRefused,
    Committed,
    EngineLost,
    Event,
    LeaseDeclined,
    Note,
    WorkDone,
)
from dnb.protocol.engine_messages import Gathered, Work, WorkReport
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import ENDED, Failure, RunSpec
from dnb.transport.pickling.module_states import LooseStates
from dnb.transport.system.failures import TRACEBACK_LENGTH, clean_text
from dnb.user_code.return_values import EVALUATION_PREFIX


class TaskExecutor:
    """Carries out what the coordinator wants done of a step, an evaluation, or the outputs of a batch.

    Args:
        spec: the run's numbers.
        master: the parameters, and what changes them.
        coordinator: decides who computes what.
        batches: the samples of every task.
        links: to the engines.
        recorder: of what was committed.
        checkpoints: taken between two tasks.
        deferred: what may wait until the engines are at work again.
        count_commit: told of every step and evaluation that counts from now on.
    """

    def __init__(
        self,
        spec: RunSpec,
        master: Master,
        coordinator: RunCoordinator,
        *,
        batches: Batches,
        links: EngineLinks,
        recorder: RunRecorder,
        checkpoints: Checkpointer,
        deferred: DeferredWork,
        count_commit: Callable[[int], None],
    ) -> None:
        self._spec = spec
        self._master = master
        self._coordinator = coordinator
        self._batches = batches
        self._links = links
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._deferred = deferred
        self._count_commit = count_commit
        self._pending = PendingReports(is_divided=bool(spec.partitions))
        self._checks = ConsistencyChecks(
            master.parameter_layout, num_steps=spec.num_steps, precision=spec.precision, probe=spec.probe
        )
        self._trainable = TrainableParameters(spec, master, links, recorder)
        self.search = NonFiniteSearch(spec, links, batches, self._pending)
        self._gatherer = Gatherer() if gathers_outputs(spec) else None

    # what engines are given

    def assign(self, action: Assign) -> Event | None:
        """Send an engine its shards."""
        link = self._links.get(action.engine)
        if link is None or link.wire is None:
            return None  # its loss is on the way
        try:
            sizes, raw = self._batches.samples_of(action.kind, action.step, action.shards)
        except UserCodeError as error:  # of the sampler; all before this step is committed
            return CommitFailed(action.step, self._recorder.keep_whole(error.failure, action.step, "hub"))
        if action.kind == "step":
            self._deferred.append(self._prepare)
        try:
            slabs = self._links.slabs_for(action)
        except SpaceError as error:
            if action.in_extra_slab:
                return LeaseDeclined(action.engine, action.lease)
            return EngineLost(action.engine, f"cannot take {len(action.shards)} shards: {error}")
        states = self._links.bring_up_to_date(link, link.wire)
        gathered = None
        if action.kind == "step" and self._gatherer is not None:
            gathered = self._gatherer.of(action.shards)
            raw = self._gatherer.memory + raw
        link.wire.queue(self._work(action, link, sizes=sizes, slabs=slabs, gathered=gathered, states=states), raw)
        link.wire.flush()
        owner = self._coordinator.owner_of(action.engine)
        self._pending.expect(action.engine, action.shards, owner=owner, slabs=slabs)
        return None

    def _work(
        self,
        action: Assign,
        link: EngineLink,
        *,
        sizes: tuple[int, ...],
        slabs: tuple[int, ...],
        gathered: Gathered | None,
        states: bytes,
    ) -> Work:
        is_divided = bool(self._spec.partitions)
        is_first = action.kind == ("step" if self._gatherer is None else "outputs")
        return Work(
            run=self._spec.id,
            lease=action.lease,
            kind=action.kind,
            step=action.step,
            shards=action.shards,
            shard_sizes=sizes,
            slabs=slabs,
            batch_samples=self._batches.num_samples(action.kind, action.step),
            fresh=action.fresh,
            probe=is_first and self._wants_probe(action, link),
            check_copy=not is_divided and is_first and self._checks.is_digest_due(action.step - 1),
            trace=is_divided
            and self._spec.telemetry
            and action.kind == "step"
            and self._recorder.wants_timeline(action.step),
            gathered=gathered,
            states=states,
        )

    def _wants_probe(self, action: Assign, link: EngineLink) -> bool:
        """Return whether the engine has not been held against the notebook or others yet, if there are any."""
        if self._spec.partitions or link.is_probed:
            return False
        if len(self._links) < 2 and self._spec.probe is None:
            return False
        if action.step > self._recorder.first_step + 1:
            return False
        link.is_probed = True
        return True

    def _prepare(self) -> None:
        self._batches.prepare()
        note = self._batches.take_note()
        if note and self._coordinator.status not in ENDED:
            self._recorder.add_event(Note("data", note))

    # what engines report

    def take_report(self, engine: int, message: WorkReport, raw: memoryview) -> WorkDone:
        """Keep a report if it counts; return it for the coordinator.

        Raises:
            PeerError: it makes no sense; nothing has changed.
        """
        num_samples = sum(part.num_samples for part in message.parts)
        done = WorkDone(engine, message.lease, message.kind, message.step, message.shards, num_samples)
        if self._coordinator.expects(done):
            check_parts(
                message,
                num_slabs=self._pending.num_slabs(engine, message.shards),
                num_samples=self._batches.num_samples(message.kind, message.step),
                is_divided=bool(self._spec.partitions),
            )
            if message.thawed:
                self._trainable.check_thawed(message.thawed)
            states = self._read_states(message.states) if message.states else None
            if message.kind == "outputs" and self._gatherer is not None:
                sizes, _ = self._batches.samples_of("outputs", message.step, message.shards)
                self._gatherer.take(engine, message, raw, num_samples=sum(sizes))
            if message.telemetry is not None:
                self._recorder.stats.add(engine, message.telemetry)
                self._recorder.check_memory(engine)
            self._pending.add(engine, message, states)
            if message.note:
                self._recorder.add_event(Note("memory", message.note, engine))
            self._check(engine, message)
        return done

    def take_outputs(self, engine: int, lease: int, raw: memoryview) -> None:
        """Keep a part of the outputs that stand behind a report that is to come.

        Raises:
            PeerError: it is more than can be gathered.
        """
        if self._gatherer is not None:
            self._gatherer.add_piece(engine, lease, raw)

    def _read_states(self, packed: bytes) -> LooseStates:
        try:
            states = LooseStates.unpack(packed)
            self._master.states.check(states)
        except ValueError as error:
            raise PeerError(clean_text(str(error), length=TRACEBACK_LENGTH)) from error
        return states

    def _check(self, engine: int, report: WorkReport) -> None:
        """Hold what an engine says of its model against the hub and the other engines."""
        if report.digests:
            self._deferred.run()  # the hub's own hashes may be among them
        if self._checks.check(engine, report):
            self._links[engine].version = -1  # it gets all of them anew

    # what counts

    def gather(self, step: int, reports: tuple[Key, ...]) -> Event:
        """Put together what the loss of a step is computed on."""
        assert self._gatherer is not None
        self._pending.go_on_with_step()
        sizes, indices = self._batches.samples_of("outputs", step, range(self._spec.num_shards))
        try:
            self._gatherer.gather(reports, sizes=sizes, indices=indices, exact=self._spec.exact)
        except CannotGather as verdict:
            return CommitRefused(step, str(verdict))
        return Committed("outputs", step)

    def commit(self, kind: WorkKind, step: int, reports: tuple[Key, ...]) -> Event | None:
        """Apply a step, or take an evaluation; return nothing while an engine looks for what is not finite in it."""
        self._deferred.run()
        taken = self._pending.take(reports)
        traces = self._recorder.place_traces(taken.traces)
        if (obstacle := self._obstacle(kind, step, taken)) is not None:
            return obstacle
        try:
            values, samples = self._apply(kind, step, taken, [engine for engine, _ in reports])
            if kind == "evaluation":
                self._master.commit_evaluation(step, values)
        except NotFinite as verdict:
            return self.search.begin(step, verdict, taken.contributions, remark=self._whole_batch_remark())
        except UserCodeError as error:
            self._checkpoints.is_torn = True
            return CommitFailed(step, self._recorder.keep_whole(error.failure, step, "hub"))
        self._count_commit(step)
        self._recorder.end_task(kind, reports)
        if kind == "step" and (names := self._master.thawed_here):
            self._deferred.fault = self._trainable.thaw(names, step + 1)
        self._defer_after_commit(kind, step, values, samples, traces)
        return Committed(kind, step)

    def _whole_batch_remark(self) -> str:
        """Say of what is not finite that the loss looks at the whole batch, and at which sample, if it does."""
        if self._spec.loss_over != "batch":
            return ""
        fault = "" if self._gatherer is None else f", and {self._gatherer.describe_fault()}"
        return f" (this loss looks at the whole batch{fault})"

    def _obstacle(self, kind: WorkKind, step: int, taken: TaskReports) -> Event | None:
        """Return why what engines have brought is not applied; mostly nothing."""
        if self._deferred.fault is not None:
            return CommitFailed(step, self._deferred.fault)
        if self._checks.disagreement:
            return CommitFailed(step, Failure(kind="PlanError", message=self._checks.disagreement, traceback=""))
        if reason := describe_mixed_parts(taken.contributions) or self._checks.take_copy_fault():
            return CommitRefused(step, reason)
        return self._trainable.follow(kind, step, taken)

    def _apply(
        self, kind: WorkKind, step: int, taken: TaskReports, engines: Iterable[int]
    ) -> tuple[dict[str, float], dict[int, int]]:
        """Return what the history says, and who brought how many samples to a step."""
        if kind == "evaluation":
            loss, metrics = mean_of([c.sums for c in taken.contributions])
            self._recorder.clock.begin_task()
            return {f"{EVALUATION_PREFIX}{name}": value for name, value in (metrics | {"loss": loss}).items()}, {}
        result = self._master.commit(
            taken.contributions,
            describe=self._recorder.describe,
            sample=self._recorder.gradients.wants(step, self._master.gradient_layout),
            states=taken.states,
        )
        self._links.version += 1
        self._recorder.count_step(step, result, engines)
        return result.values, result.samples

    def _defer_after_commit(
        self,
        kind: WorkKind,
        step: int,
        values: dict[str, float],
        samples: dict[int, int],
        traces: Mapping[int, EngineTrace],
    ) -> None:
        """Put off what is still to be done after a commit, until the engines are at work again."""
        if news := self._master.take_news():
            self._recorder.add_event(Note("state", news), step=step)
        defer_after_commit, recorder = self._deferred.append, self._recorder
        defer_after_commit(self._master.finish_deferred)
        defer_after_commit(partial(recorder.record, kind, step, values, samples, time.time()))
        defer_after_commit(partial(recorder.add_timeline, step, traces))
        if recorder.is_usage_due:
            defer_after_commit(recorder.add_usage)
        if kind == "step" and self._checks.is_digest_due(step):
            defer_after_commit(partial(self._take_digest, step))
        if self._checkpoints.is_due(kind, step, values, owes_evaluation=self._owes_evaluation(kind, step)):
            defer_after_commit(self._checkpoints.take)  # until the next commit nothing changes what it copies
        if departed := self._links.take_departed():
            defer_after_commit(partial(self._links.drop_slabs, departed))

    def _take_digest(self, step: int) -> None:
        whole, each = self._master.digests()
        self._checks.keep(step, each)
        self._recorder.record_digest(step, float(whole))

    def _owes_evaluation(self, kind: WorkKind, step: int) -> bool:
        spec = self._spec
        is_due = step == spec.num_steps or step % spec.steps_per_epoch == 0
        return kind == "step" and spec.num_val_samples > 0 and is_due
