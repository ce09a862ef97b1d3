"""An engine's part in one run: work comes in over the wire, reports go out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import msgspec
import torch

from dnb.engine.replicas.engine_replica import EngineReplica
from dnb.engine.replicas.gathered_loss import GatheringReplica
from dnb.engine.replicas.replica import Replica
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.whole_batch.output_form import bytes_of
from dnb.engine.runtime.allocator import ration
from dnb.engine.runtime.run_memory import EngineMemory, Publisher
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.errors import USER_ERRORS, summary_of
from dnb.protocol.engine_messages import (
    AddSlabs,
    Diagnose,
    EngineMessage,
    Freeze,
    FunctionsReplaced,
    Load,
    OutputPiece,
    Printed,
    RankAssignment,
    Shipped,
    Thaw,
    WireMessage,
    Work,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.hooks import drop_gradient_hooks
from dnb.transport.pickling.payloads import adopt, verify
from dnb.transport.pickling.user_modules import loads
from dnb.transport.sockets.wires import DATA_SLOT, JOB_SLOT, PARAMETERS_SLOT, Outbox, Wire
from dnb.transport.system.failures import describe_error
from dnb.transport.system.process_settings import AppliedSettings, differing_packages
from dnb.user_code.captured_output import CapturedOutput

# How long the hub may take to send model and data, and to read what is sent to it.
SHIP_SECONDS = 300.0
# How long the last pieces of a run that has ended may take to go; its wire is closed soon after.
OUTBOX_SECONDS = 1.0
# Behind a report without outputs.
NO_OUTPUTS = (b"",)

log = logging.getLogger(__name__)

_decode = msgspec.msgpack.Decoder(WireMessage).decode


class Session:
    """Model, data and slabs of one run.

    Args:
        load: of the hub.
        frames: spec, job, data and signature.
        engine: this engine's id.
        key: the cluster's key, which signed the frames.
        wire: to the hub; parameters and payloads come over it where no memory is shared.
        memory: parameters and slabs.
        stopwatch: counts data and compute time.
        tell: sends what was printed if loading fails, on the way of the message that says so.

    Raises:
        HubError: the frames are not signed, or the hub does not send what it should.
    """

    def __init__(
        self,
        load: Load,
        frames: Sequence[bytes],
        *,
        engine: int,
        key: bytes,
        wire: Wire,
        memory: EngineMemory,
        stopwatch: Stopwatch,
        tell: Callable[[EngineMessage], None],
    ) -> None:
        spec_bytes, job_bytes, data_bytes, signature = frames
        verify(key, [spec_bytes, job_bytes, data_bytes], signature)
        self.run = load.run
        self._engine = engine
        self._key = key
        self._spec = spec = msgspec.msgpack.decode(spec_bytes, type=RunSpec)
        self._wire = wire
        self._memory = memory
        self._stopwatch = stopwatch
        adopt_path(spec.sys_path)
        self._settings = AppliedSettings(spec.settings)
        self._output = CapturedOutput()
        ration.set(spec.memory_limit, start_bytes=stopwatch.start_rss_bytes)
        self._outbox: Outbox | None = None
        self._fault: BaseException | None = None  # why what was mended cannot be used
        self._early: list[tuple[memoryview, memoryview]] = []  # what came before there was a replica that it is for
        self._layouts = load.gradient_layout, load.buffer_layout
        payloads: dict[int, memoryview | None] = {JOB_SLOT: None, DATA_SLOT: None}
        try:
            if memory.kind == "socket":
                payloads = self._receive_payloads(spec)
                self._outbox = Outbox(wire, timeout_seconds=SHIP_SECONDS)
                self._outbox.start()
            job, of_job = adopt(job_bytes, spec.job, memory=payloads[JOB_SLOT])
            drop_gradient_hooks(job.model)
            data, of_data = adopt(data_bytes, spec.data, memory=payloads[DATA_SLOT])
            # Now that whatever model and data need is imported.
            if spec.settings is not None and (difference := differing_packages(spec.settings.packages)):
                self._settings.notes.append(difference)
            layouts = {"gradient_layout": self._layouts[0], "buffer_layout": self._layouts[1]}
            context = ReplicaContext(
                spec=spec,
                job=job,
                data=data,
                load=msgspec.structs.replace(load, **layouts),
                memory=memory,
                stopwatch=stopwatch,
                publisher=self._make_publisher(),
                generators=of_job + of_data,
            )
            self._replica: EngineReplica = _kind_of_replica(load, spec)(context)
        except BaseException:
            if lines := self._output.collect():  # what was unpickled may say why it fails
                tell(Printed(run=self.run, lines=lines))
            if self._outbox is not None:
                self._outbox.stop()
            self._let_process_go()
            raise
        for packed, raw in self._early:
            self.handle_message(packed, raw)
        self._early.clear()

    def num_threads(self, usual: int) -> int:
        """Return torch's number of threads: one in an exact run, as it shows in the last bits."""
        return 1 if self._spec.exact else usual

    def handle_message(self, packed: memoryview, raw: memoryview) -> None:
        """Do what the hub says."""
        message = _decode(packed)
        match message:
            case AddSlabs():
                self._memory.add_slabs(message.slabs)
            case Thaw():
                self._lay_out_anew(message)
                assert isinstance(self._replica, Replica)  # the hub tells nobody else
                self._replica.thaw(*self._layouts, self._make_publisher())
            case Freeze(names=names):
                assert isinstance(self._replica, Replica)
                self._replica.freeze(names)
            case Work():
                self._work(message, raw)
            case Diagnose():
                self._diagnose(message, _indices(raw))
            case FunctionsReplaced():
                self._replace_functions(message, bytes(raw))
            case Shipped():
                pass

    def send(self, record: EngineMessage, raw: bytes = b"") -> None:
        """Send a record, after the pieces that go before it, with raw bytes behind it."""
        if self._outbox is not None:
            self._outbox.send(record, raw)
        elif raw:
            self._wire.send(record, raw)
            self._wire.flush_all(timeout_seconds=SHIP_SECONDS)
        else:
            self._wire.send(record)

    def close(self) -> None:
        """Let model, data and memory go."""
        if self._outbox is not None:
            self._outbox.stop()
            self._outbox.join(OUTBOX_SECONDS)
        self._wire.receive_buffers = {}
        try:
            self._replica.close()
        finally:
            self._let_process_go()

    def _let_process_go(self) -> None:
        """Let the process be as it was before the run."""
        self._output.close()
        self._settings.take_back()

    def _work(self, work: Work, raw: memoryview) -> None:
        if work.run != self.run:
            return
        begin = len(raw) - 8 * sum(work.shard_sizes)
        indices = _indices(raw[begin:])
        if work.gathered is not None:
            assert isinstance(self._replica, GatheringReplica)
            self._replica.take_gathered(raw[:begin])
        if self._fault is not None:
            self._report_failure(work, self._fault, None)
            return
        try:
            report, raws = self._computed(work, indices)
        except USER_ERRORS as error:  # whatever a user's model raises is the user's to read
            self._send_output(with_counts=True)
            self._report_failure(work, error, indices)
            return
        self._send_output()
        try:
            for piece in raws[:-1]:
                self.send(OutputPiece(run=work.run, lease=work.lease), piece)
            self.send(report, raws[-1])
        except (TypeError, ValueError, OverflowError) as error:  # what user code returned cannot be encoded
            self._report_failure(work, error, None)

    def _computed(self, work: Work, indices: torch.Tensor) -> tuple[WorkReport, Sequence[bytes]]:
        probe = self._replica.probe() if work.probe else None
        outcome = self._replica.compute(work, indices)
        raws = bytes_of(outcome.tensors) if outcome.tensors else NO_OUTPUTS
        return WorkReport(
            run=work.run,
            lease=work.lease,
            kind=work.kind,
            step=work.step,
            shards=work.shards,
            parts=outcome.parts,
            is_sum=outcome.is_sum,
            unused=outcome.unused,
            telemetry=self._stopwatch.collect() if self._spec.telemetry else None,
            note=f"engine {self._engine}: {outcome.note}" if outcome.note else "",
            probe=probe,
            digests=self._replica.digests() if work.check_copy else b"",  # of what this work has begun with
            trace=self._replica.trace() if work.trace else None,
            outputs=outcome.leaves,
            states=outcome.states,
            thawed=outcome.thawed,
            frozen=outcome.frozen,
            more_output=self._output.take_counts(),
        ), raws

    def _send_output(self, *, with_counts: bool = False) -> None:
        """Send what user code has printed, and what of the notebook's settings could not be had here.

        Args:
            with_counts: no report follows that has them.
        """
        if self._settings.notes:
            self.send(Printed(run=self.run, lines=tuple(self._settings.notes), kind="data"))
            self._settings.notes = []
        if news := self._replica.take_news():
            self.send(Printed(run=self.run, lines=news, kind="metrics"))
        lines = self._output.collect()
        more = self._output.take_counts() if with_counts else {}
        if lines or more:
            self.send(Printed(run=self.run, lines=lines, more=more))

    def _report_failure(self, work: Work, error: BaseException, indices: torch.Tensor | None) -> None:
        """Say that user code failed, and where, if it did with these samples and that can be found."""
        place = ""
        if indices is not None:
            try:
                with self._output.muted():  # what is computed once more is printed once more
                    place = self._replica.find_place(work, indices, error)
            except USER_ERRORS as second:  # what failed once may fail otherwise when it is looked at
                log.warning("where it failed was not found: %s", summary_of(second))
        self.send(
            WorkFailed(
                run=work.run,
                lease=work.lease,
                kind=work.kind,
                step=work.step,
                shards=work.shards,
                failure=describe_error(error, place=place),
            )
        )

    def _diagnose(self, request: Diagnose, indices: torch.Tensor) -> None:
        try:
            self.send(self._replica.diagnose(request, indices))
        except USER_ERRORS as error:  # whatever a user's model raises is the user's to read
            failed = WorkFailed(
                run=self.run,
                lease=0,
                kind="step",
                step=request.step,
                shards=request.shards,
                failure=describe_error(error),
            )
            self.send(failed)

    def _replace_functions(self, message: FunctionsReplaced, pickled: bytes) -> None:
        verify(self._key, [pickled], message.signature)
        try:
            self._replica.replace_functions(**loads(pickled, adopt=True))
        except USER_ERRORS as error:  # what a user's function needs may be missing here: the next step says so
            self._fault = error
        else:
            self._fault = None

    def _lay_out_anew(self, message: Thaw) -> None:
        self._layouts = message.gradient_layout, message.buffer_layout
        self._memory.lay_out_anew(message.buffer_layout.num_bytes)

    def _make_publisher(self) -> Publisher | None:
        gradients, buffers = self._layouts
        return None if self._outbox is None else Publisher(gradients, buffers.num_bytes, self._outbox)

    def _receive_payloads(self, spec: RunSpec) -> dict[int, memoryview | None]:
        payloads = {JOB_SLOT: _landing(spec.job), DATA_SLOT: _landing(spec.data)}
        self._wire.receive_buffers = {PARAMETERS_SLOT: memoryview(self._memory.parameters)}
        self._wire.receive_buffers |= {slot: memory for slot, memory in payloads.items() if memory is not None}
        uploaded = False
        while not uploaded:
            for packed, raw in self._wire.wait_for_messages(timeout_seconds=SHIP_SECONDS):
                message = _decode(packed)
                if isinstance(message, AddSlabs):
                    self.handle_message(packed, raw)
                elif isinstance(message, Thaw):  # the run has changed since this engine was asked to load it
                    self._lay_out_anew(message)
                elif not isinstance(message, Shipped):
                    self._early.append((packed, raw))
                uploaded = uploaded or isinstance(message, Shipped)
        for slot in payloads:
            self._wire.receive_buffers.pop(slot, None)
        return payloads


def _kind_of_replica(load: Load, spec: RunSpec | None = None) -> Callable[[ReplicaContext], EngineReplica]:
    if load.assignment is None:
        return GatheringReplica if spec is not None and spec.loss_over == "batch" else Replica
    if load.assignment.partition.kind in ("tensor", "synced"):
        return _kind_of_tensor_replica(load.assignment)
    from dnb.engine.replicas.pipeline.stage_replica import StageReplica  # torch's pipelines take two seconds to import

    return StageReplica


def _kind_of_tensor_replica(assignment: RankAssignment) -> Callable[[ReplicaContext], EngineReplica]:
    if assignment.partition.num_engines == 1:
        return Replica  # nothing is divided
    if assignment.partition.kind == "synced":
        from dnb.engine.replicas.sync_replica import SyncReplica

        return SyncReplica
    from dnb.engine.replicas.tensor.tensor_replica import TensorReplica  # DTensor takes a second to import

    return TensorReplica


def import_for(load: Load) -> None:
    """Import what a run of this kind needs, if it is not there yet."""
    _kind_of_replica(load)


def adopt_path(paths: tuple[str, ...]) -> None:
    """Let modules that the notebook can import be importable here."""
    sys.path.extend(path for path in paths if path not in sys.path)


def _landing(payload: PayloadRef) -> memoryview | None:
    if payload.segment is None:
        return None
    return memoryview(bytearray(payload.segment.num_bytes))


def _indices(raw: memoryview) -> torch.Tensor:
    if not len(raw):
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(raw), dtype=torch.int64)
