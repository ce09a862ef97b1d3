"""The training thread of an engine: it takes work from the hub while the main thread answers cells."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from typing import Any

import msgspec
import psutil
import torch
import zmq

from dnb.engine.replica import Replica
from dnb.engine.telemetry import Stopwatch
from dnb.errors import PoolError
from dnb.records import (
    Address,
    EngineFacts,
    EngineMessage,
    Exit,
    Failure,
    HubMessage,
    Join,
    Load,
    Loaded,
    LoadFailed,
    Process,
    RunSpec,
    Unload,
    Welcome,
    Work,
    WorkFailed,
    WorkReport,
)
from dnb.transport.channels import connect_dealer, encode
from dnb.transport.lives import is_alive, this_process
from dnb.transport.parcels import unpack, verify

log = logging.getLogger(__name__)

# How often a waiting engine looks whether its hub still lives.
WATCH_MILLISECONDS = 1000

_worker: Worker | None = None


def join_pool(engine: int, *, num_threads: int, connection_file: str, timeout_seconds: float) -> EngineFacts:
    """Start this process's worker and say what it has; runs in the engine's main thread.

    Args:
        engine: the id that ipyparallel gave this engine.
        num_threads: threads for torch.
        connection_file: of the engine, as ipyparallel wrote it; read if the environment carries none.
        timeout_seconds: for the hub's welcome.

    Raises:
        PoolError: the hub did not welcome this engine in time.
    """
    global _worker
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    connection = _read_connection(connection_file)
    facts = engine_facts(engine, num_threads=num_threads)
    if _worker is None:
        _worker = Worker(
            facts,
            address=msgspec.convert(connection["dnb"]["address"], Address),
            hub=msgspec.convert(connection["dnb"]["hub"], Process),
            key=connection["key"].encode(),
        )
        _worker.start()
    if not _worker.is_welcome.wait(timeout_seconds):
        raise PoolError(f"engine {engine} was not welcomed by the hub within {timeout_seconds:g} s")
    return facts


def engine_facts(engine: int, *, num_threads: int) -> EngineFacts:
    """What this process is and has."""
    return EngineFacts(
        engine=engine,
        process=this_process(),
        cores=num_threads,
        memory_bytes=psutil.virtual_memory().total,
        device="cpu",
        torch_version=str(torch.__version__),
    )


def _read_connection(connection_file: str) -> dict[str, Any]:
    text = os.environ.get("IPP_CONNECTION_INFO")
    if text is None:
        with open(connection_file) as file:
            text = file.read()
    connection: dict[str, Any] = json.loads(text)
    return connection


class Worker(threading.Thread):
    """Holds the engine's only socket to the hub; ends when told, or when the hub is gone.

    Args:
        facts: of this engine.
        address: of the hub.
        hub: its process; if it dies, so does this engine.
        key: the cluster's key, which signs every parcel.
    """

    def __init__(self, facts: EngineFacts, *, address: Address, hub: Process, key: bytes) -> None:
        super().__init__(name="dnb-worker", daemon=True)
        self._facts = facts
        self._address = address
        self._hub = hub
        self._key = key
        self._stopwatch = Stopwatch()
        self.is_welcome = threading.Event()
        self._replica: Replica | None = None
        self._spec: RunSpec | None = None
        self._decoder = msgspec.msgpack.Decoder(HubMessage)

    def run(self) -> None:
        """Serve the hub until it says `Exit` or is gone."""
        torch.set_num_threads(self._facts.cores)  # OpenMP keeps this number per thread
        context = zmq.Context()
        self._socket = connect_dealer(context, self._address, identity=b"engine-%d" % self._facts.engine)
        try:
            self._send(Join(facts=self._facts))
            while self._serve_once():
                pass
        finally:
            self._socket.close(linger=0)
            context.term()
            # The main thread runs ipykernel's loop: a signal is what ends it, and ipyparallel's nanny with it.
            os.kill(os.getpid(), signal.SIGTERM)

    def _serve_once(self) -> bool:
        while not self._socket.poll(WATCH_MILLISECONDS):
            if not is_alive(self._hub):
                log.warning("the hub is gone: engine %d ends", self._facts.engine)
                return False
        header, *frames = self._socket.recv_multipart(copy=False)
        message = self._decoder.decode(header.buffer)
        match message:
            case Welcome():
                self.is_welcome.set()
            case Load():
                self._load(message, frames)
            case Work():
                self._work(message, frames)
            case Unload():
                self._replica = self._spec = None
            case Exit():
                return False
        return True

    def _load(self, load: Load, frames: list[zmq.Frame]) -> None:
        try:
            spec_bytes, job_bytes, data_bytes, signature = (frame.bytes for frame in frames)
            verify(self._key, [spec_bytes, job_bytes, data_bytes], signature)
            spec = msgspec.msgpack.decode(spec_bytes, type=RunSpec)
            adopt_path(spec.sys_path)
            job, data = unpack(job_bytes, spec.job), unpack(data_bytes, spec.data)
            self._replica = Replica(spec, job, data, load, self._stopwatch)
            self._spec = spec
        except Exception as error:  # noqa: BLE001 - whatever a user's class raises is the user's to read
            self._send(LoadFailed(run=load.run, failure=describe(error)))
        else:
            self._stopwatch.take()
            self._send(Loaded(run=load.run))

    def _work(self, work: Work, frames: list[zmq.Frame]) -> None:
        if self._replica is None or self._spec is None or self._spec.name != work.run:
            return  # late work of a run that was unloaded
        indices = (
            torch.frombuffer(frames[0].bytes, dtype=torch.int64)
            if len(frames[0])
            else torch.empty(0, dtype=torch.int64)
        )
        try:
            sums, is_sum = self._replica.compute(work, indices)
        except Exception as error:  # noqa: BLE001 - whatever a user's model raises is the user's to read
            self._send(
                WorkFailed(
                    run=work.run,
                    kind=work.kind,
                    step=work.step,
                    shards=work.shards,
                    failure=describe(error),
                )
            )
            return
        self._send(
            WorkReport(
                run=work.run,
                kind=work.kind,
                step=work.step,
                shards=work.shards,
                sums=sums,
                is_sum=is_sum,
                telemetry=self._stopwatch.take(),
            )
        )

    def _send(self, record: EngineMessage) -> None:
        self._socket.send_multipart(encode(record))


def adopt_path(paths: tuple[str, ...]) -> None:
    """Let modules that the notebook can import be importable here."""
    sys.path.extend(path for path in paths if path not in sys.path)


def describe(error: BaseException) -> Failure:
    """An exception as text, without the frames of dnb itself where user code is deeper."""
    return Failure(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )
