"""A session in one process: the hub's memory, an engine's session, and a wire that only keeps what is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import pytest
import torch
from torch import nn

from dnb.engine.process.session import Session
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.hub.parameters.master import Master
from dnb.job import Data, DataSource, Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.base import Message
from dnb.protocol.engine_messages import (
    AddSlabs,
    EngineMessage,
    FunctionsReplaced,
    Load,
    Shipped,
    WireOffer,
    Work,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.memory import PayloadRef, SegmentRef
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.payloads import pickle_payload, sign
from dnb.transport.sockets.wires import DATA_SLOT, JOB_SLOT, frame_of

KEY = b"key"
NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)


class PanicException(BaseException):
    """As pyo3 has it."""


class Kept:
    """In place of a wire; everything is encoded, as on one."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.refuses: type[Message] | None = None
        self.receive_buffers: dict[int, memoryview] = {}

    def send(self, record: Message) -> None:
        frame_of(record)
        if type(record) is self.refuses:
            raise OverflowError("can't serialize ints > 2**64")
        self.sent.append(record)


class KeptFar(Kept):
    """Of an engine without shared memory: with what the hub sends before and after model and data are there."""

    def __init__(self, payloads: dict[int, PayloadRef], after: list[tuple[Message, bytes]]) -> None:
        super().__init__()
        self._payloads = payloads
        self._after = after
        self.answered = threading.Event()

    def wait_for_messages(self, *, timeout_seconds: float) -> list[tuple[memoryview, memoryview]]:
        for slot, payload in self._payloads.items():
            if payload.segment is not None:
                self.receive_buffers[slot][:] = Path(payload.segment.path).read_bytes()
        slabs = AddSlabs(run="run", slabs=(SegmentRef(path="", num_bytes=0),))
        records = [(slabs, b""), (Shipped(run="run"), b""), *self._after]
        return [(memoryview(frame_of(record)[16:]), memoryview(raw)) for record, raw in records]

    def queue_frame(self, frame: bytes) -> None:
        self.sent.append(msgspec.msgpack.decode(memoryview(frame)[16:], type=EngineMessage))

    def queue_pieces(self, slot: int, source: Any, ranges: Any) -> None:
        pass

    def flush_all(self, *, timeout_seconds: float) -> None:
        self.answered.set()


class Hub:
    """Gives work to a session of its own.

    Args:
        folder: of its memory.
        after: sent right after model and data over a socket; None shares memory.
        functions: of the job.
    """

    def __init__(self, folder: Path, *, after: list[tuple[Message, bytes]] | None = None, **functions: Any) -> None:
        source = DataSource(samples=(torch.ones(8, 3), torch.ones(8, 1)), collate=None)
        job = Job(
            model=nn.Linear(3, 1),
            **{"loss": None, "step": None, **functions},
            metrics={},
            optimizer="sgd",
            lr=0.1,
            scheduler=None,
            order=BatchOrder(num_samples=8, batch_size=8),
        )
        job_bytes, job_ref, _ = pickle_payload(job, name="job", folders=[folder])
        data_bytes, data_ref, _ = pickle_payload(Data(train=source, val=source), name="data", folders=[folder])
        spec = RunSpec(
            id="run",
            name="run",
            folder=str(folder),
            num_samples=8,
            num_val_samples=8,
            num_steps=1,
            steps_per_epoch=1,
            batch_size=8,
            num_shards=2,
            seed=0,
            clip_norm=None,
            exact=False,
            transport={},
            telemetry=False,
            micro_batch=None,
            precision="float32",
            linger_seconds=1.0,
            notes=(),
            sys_path=(),
            job=job_ref,
            data=data_ref,
        )
        self._master = Master(job, folders=[folder], prefix="run", clip_norm=None)
        load = Load(
            run="run",
            transport="memory" if after is None else "socket",
            wire=WireOffer(url="", token=""),
            parameters=self._master.parameters_ref,
            parameter_layout=self._master.parameter_layout,
            gradient_layout=self._master.gradient_layout,
            buffer_layout=self._master.buffer_layout,
        )
        memory = EngineMemory(load)
        if after is None:
            memory.add_slabs([slab.ref for slab in self._master.add_slabs(0, 1, kind="memory")])
        frames = [msgspec.msgpack.encode(spec), job_bytes, data_bytes]
        self.wire = Kept() if after is None else KeptFar({JOB_SLOT: job_ref, DATA_SLOT: data_ref}, after)
        wire: Any = self.wire
        self._session = Session(
            load,
            [*frames, sign(KEY, frames)],
            engine=0,
            key=KEY,
            wire=wire,
            memory=memory,
            stopwatch=Stopwatch(),
            tell=self.wire.send,
        )

    def work(self) -> Message:
        """What the session answers to the first step."""
        work = Work(
            run="run",
            lease=1,
            kind="step",
            step=1,
            shards=(0, 1),
            shard_sizes=(4, 4),
            slabs=(0,),
            batch_samples=8,
            fresh=True,
        )
        self._give(work, memoryview(torch.arange(8).numpy()).cast("B"))
        return self.wire.sent[-1] if self.wire.sent else work

    def replace_functions(self, **functions: Any) -> None:
        """Let the session go on with other functions."""
        record, pickled = mended(**functions)
        self._give(record, memoryview(pickled))

    def _give(self, record: Message, raw: memoryview) -> None:
        self._session.handle_message(memoryview(frame_of(record)[16:]), raw)

    def close(self) -> None:
        self._session.close()
        self._master.drop_slabs()
        self._master.close()


def mended(**functions: Any) -> tuple[Message, bytes]:
    pickled = cloudpickle.dumps({"step": None, "loss": None, **functions})
    return FunctionsReplaced(run="run", signature=sign(KEY, [pickled])), pickled


@pytest.fixture
def hub_of(tmp_path: Path) -> Iterator[Any]:
    made: list[Hub] = []

    def make(**functions: Any) -> Hub:
        made.append(Hub(tmp_path, **functions))
        return made[-1]

    yield make
    for hub in made:
        hub.close()


def mean_step(model, batch):
    return model(batch[0]).mean()


def failure_of(answer: Message):
    assert isinstance(answer, WorkFailed), answer
    return answer.failure


@pytest.mark.parametrize("error", [PanicException("a library panicked"), KeyboardInterrupt(), SystemExit(3)], ids=str)
def test_what_is_no_exception_is_a_failure_of_user_code(hub_of, error):
    def step(model, batch):
        raise error

    failure = failure_of(hub_of(step=step).work())
    assert failure.kind == type(error).__name__
    assert "in step" in failure.traceback


def test_functions_that_come_while_model_and_data_are_still_unpacked_count(hub_of):
    def replace_functions(model, batch):
        raise ValueError("of the mended one")

    hub = hub_of(step=mean_step, after=[mended(step=replace_functions)])
    hub.work()
    assert hub.wire.answered.wait(30)
    assert failure_of(hub.wire.sent[-1]).message == "of the mended one"


def test_a_report_that_cannot_be_encoded_is_a_failure_of_user_code(hub_of):
    hub = hub_of(step=mean_step)
    hub.wire.refuses = WorkReport
    assert failure_of(hub.work()).message == "can't serialize ints > 2**64"
    hub.wire.refuses = None
    assert isinstance(hub.work(), WorkReport)


def test_a_failure_is_told_even_if_its_place_cannot_be_looked_for(hub_of):
    class Sour(nn.Linear):
        calls = 0

        def forward(self, inputs):
            Sour.calls += 1
            raise ValueError("first") if Sour.calls == 1 else PanicException("then")

    hub = hub_of(step=lambda _, batch: Sour(3, 1)(batch[0]))
    failure = failure_of(hub.work())
    assert (failure.kind, failure.message, failure.place) == ("ValueError", "first", "one of shards 0 to 1")


class Unborn:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return raise_panic, ()


def raise_panic():
    raise PanicException("no such symbol here")


def test_a_mended_function_that_cannot_be_unpickled_is_told_at_the_next_step(hub_of):
    hub = hub_of(step=mean_step)
    hub.replace_functions(step=Unborn())
    for _ in range(2):
        assert failure_of(hub.work()).message == "no such symbol here"
    hub.replace_functions(step=mean_step)
    assert isinstance(hub.work(), WorkReport)


def test_a_mended_function_that_returns_no_loss_is_told(hub_of):
    hub = hub_of(step=mean_step)
    hub.replace_functions(step=lambda *_: None)
    failure = failure_of(hub.work())
    assert failure.kind == "ReturnError"
    assert failure.message.startswith("step must return the loss as a tensor of one number")
    assert failure.place == "shard 0, sample 0"
