"""The training thread of an engine: it takes work from the hub while the main thread answers cells."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading

import msgspec
import psutil
import torch
import zmq
from threadpoolctl import threadpool_limits

from dnb.engine.process.heartbeat import HeartbeatThread
from dnb.engine.process.session import Session, import_for
from dnb.engine.runtime.allocator import keep_freed_memory, release_freed_memory
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.errors import USER_ERRORS, HubError, PoolError, summary_of
from dnb.protocol.engine_messages import (
    EngineMessage,
    Exit,
    Fault,
    HubMessage,
    Join,
    Load,
    Loaded,
    LoadFailed,
    NoSharedMemory,
    Rejoin,
    Slow,
    Unload,
    Welcome,
)
from dnb.protocol.pool import Address, EngineFacts, HubPlace, Process
from dnb.protocol.versions import POOL_FORMAT, VERSION, RecordHeader, name_dnb, name_this_dnb
from dnb.transport.sockets.channels import SEND_SECONDS, connect_dealer, encode
from dnb.transport.sockets.wire_connections import connect_wire
from dnb.transport.sockets.wires import Wire, WireError
from dnb.transport.system.failures import describe_error
from dnb.transport.system.processes import is_alive, is_here, this_process

log = logging.getLogger(__name__)

# How often a waiting engine looks whether its hub still lives.
WATCH_MILLISECONDS = 1000
# How long the hub may take to greet a wire.
WIRE_SECONDS = 10.0
# How long the last word of an engine that ends of an error may take to go.
LAST_WORD_MILLISECONDS = 1000

_worker: TrainingThread | None = None


def join_pool(engine: int, *, num_threads: int, connection_file: str, timeout_seconds: float) -> EngineFacts:
    """Start this process's worker and say what it has; runs in the engine's main thread.

    Args:
        engine: the id that ipyparallel gave this engine.
        num_threads: threads for torch.
        connection_file: of the engine, as ipyparallel wrote it; read if the environment carries none.
        timeout_seconds: for the hub's welcome.

    Raises:
        PoolError: the hub is another version of dnb, or did not welcome this engine in time.
    """
    global _worker
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    threadpool_limits(num_threads)  # NumPy's, too: it may have been imported under another environment
    facts = engine_facts(engine, num_threads=num_threads)
    if _worker is None:
        place, key = _read_connection(connection_file)
        keep_freed_memory()  # before there are threads, which would get heaps of their own
        _worker = TrainingThread(
            facts,
            address=place.address,
            supervisor=place.supervisor,
            key=key,
        )
        _worker.start()
    if not _worker.is_welcome.wait(timeout_seconds):
        raise PoolError(f"engine {engine} was not welcomed by the hub within {timeout_seconds:g} s")
    return facts


def has_run() -> bool:
    """Say whether this process holds a run, whose settings are then its own."""
    return _worker is not None and _worker.has_session


def engine_facts(engine: int, *, num_threads: int) -> EngineFacts:
    """Describe this process and its host."""
    return EngineFacts(
        engine=engine,
        process=this_process(),
        cores=num_threads,
        memory_bytes=psutil.virtual_memory().total,
        device="cpu",
        torch_version=str(torch.__version__),
    )


def _read_connection(connection_file: str) -> tuple[HubPlace, bytes]:
    """Read the hub's address and the cluster's key from the connection file."""
    # Taken out: it holds the cluster's key, which is no business of cells and of what they start.
    text = os.environ.pop("IPP_CONNECTION_INFO", None)
    if text is None:
        with open(connection_file) as file:
            text = file.read()
    connection = json.loads(text)
    header = msgspec.convert(connection["dnb"], type=RecordHeader)
    if header.format != POOL_FORMAT:
        raise PoolError(
            f"the pool's hub is {name_dnb(header.version, header.format)}, and the engine on {socket.gethostname()} "
            f"{name_this_dnb()}: install one version of dnb on all hosts"
        )
    return msgspec.convert(connection["dnb"], type=HubPlace), connection["key"].encode()


class TrainingThread(threading.Thread):
    """Holds the engine's connections to the hub; ends when told, or when the hub is gone.

    What concerns the pool and the loading of runs comes over an encrypted socket, the work of a run over its wire.

    Args:
        facts: of this engine.
        address: of the hub.
        supervisor: of the hub; if it dies, so does this engine.
        key: the cluster's key, which signs every payload.
    """

    def __init__(self, facts: EngineFacts, *, address: Address, supervisor: Process, key: bytes) -> None:
        super().__init__(name="dnb-worker", daemon=True)
        self._facts = facts
        self._address = address
        self._supervisor = supervisor
        self._num_lost_wires = 0
        self._generation = 0  # which hub of the pool this engine has joined
        self._key = key
        self._stopwatch = Stopwatch()
        self.is_welcome = threading.Event()
        self._session: Session | None = None
        self._wire: Wire | None = None
        self._decoder = msgspec.msgpack.Decoder(HubMessage)

    @property
    def has_session(self) -> bool:
        """True while a run is loaded."""
        return self._session is not None

    def run(self) -> None:
        """Serve the hub until it says `Exit` or is gone."""
        torch.set_num_threads(self._facts.cores)  # OpenMP keeps this number per thread
        context = zmq.Context()
        self._socket = connect_dealer(context, self._address, identity=b"engine-%d" % self._facts.engine)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        heartbeat_thread = HeartbeatThread(self._facts, address=self._address, is_far=not is_here(self._supervisor))
        heartbeat_thread.start()
        linger = 0
        try:
            self._join()
            while self._serve_once():
                pass
        except BaseException as error:  # user code's are caught where it is called: this one is our own
            log.critical("engine %d ends of an error of dnb itself", self._facts.engine, exc_info=True)
            self._report_fault(error)
            linger = LAST_WORD_MILLISECONDS
        finally:
            heartbeat_thread.stop()
            self._drop_wire()
            self._socket.close(linger=linger)
            context.term()
            # The main thread runs ipykernel's loop: a signal is what ends it, and ipyparallel's nanny with it.
            os.kill(os.getpid(), signal.SIGTERM)

    def _serve_once(self) -> bool:
        ready = self._poller.poll(WATCH_MILLISECONDS)
        if not ready and not is_alive(self._supervisor):
            log.warning("the hub is gone: engine %d ends", self._facts.engine)
            return False
        for source, _ in ready:
            if source is self._socket:
                if not self._read_hub():
                    return False
            elif self._wire is not None:
                self._read_wire(self._wire)
        return True

    def _read_hub(self) -> bool:
        header, *frames = self._socket.recv_multipart(copy=False)
        message = self._decoder.decode(header.buffer)
        match message:
            case Welcome():
                self.is_welcome.set()
            case Rejoin(generation=generation):
                if generation != self._generation:
                    self._generation = generation
                    self._close_session()
                    self._join()
            case Load():
                self._load(message, frames)
            case Unload():
                self._close_session()
            case Slow(factor=factor):
                self._stopwatch.slowness = factor
            case Exit():
                return False
        return True

    def _read_wire(self, wire: Wire) -> None:
        try:
            messages = wire.receive()
            if self._session is not None:
                for packed, raw in messages:
                    self._session.handle_message(packed, raw)
        except WireError as error:
            log.warning("engine %d: %s", self._facts.engine, error)
            wire.close()
        if wire.is_closed and self._wire is wire:
            was_at_work = self._session is not None
            self._drop_wire()
            if was_at_work and is_alive(self._supervisor):
                self._num_lost_wires += 1
                self._join()  # the hub died, or gave this engine up: come back as a new one

    def _load(self, load: Load, frames: list[zmq.Frame]) -> None:
        self._close_session()
        import_for(load)
        self._stopwatch.begin_run()  # what it imports once is no memory of this run
        team = None if load.assignment is None else load.assignment.team
        try:
            wire = self._wire_to(load)
            memory = EngineMemory(load)
        except (OSError, HubError) as error:
            # A wire that is there stays until the hub has heard why: that it closes would be taken for a death.
            if load.transport == "memory":
                self._send(NoSharedMemory(run=load.run, reason=summary_of(error)))
            else:
                self._send(LoadFailed(run=load.run, failure=describe_error(error), team=team))
            return
        try:
            self._session = Session(
                load,
                [frame.bytes for frame in frames],
                engine=self._facts.engine,
                key=self._key,
                wire=wire,
                memory=memory,
                stopwatch=self._stopwatch,
                tell=self._send,
            )
        except USER_ERRORS as error:  # whatever a user's class raises is the user's to read
            self._send(LoadFailed(run=load.run, failure=describe_error(error), team=team))
        else:
            release_freed_memory()  # where the parameters lay before they were bound to the hub's
            torch.set_num_threads(self._session.num_threads(self._facts.cores))
            self._stopwatch.collect()
            self._session.send(Loaded(run=load.run, team=team))

    def _wire_to(self, load: Load) -> Wire:
        """Connect a new wire for a run, so that the hub's first records on it belong to that run."""
        self._drop_wire()
        self._wire = connect_wire(load.wire, engine=self._facts.engine, timeout_seconds=WIRE_SECONDS)
        self._poller.register(self._wire.fileno(), zmq.POLLIN)
        return self._wire

    def _drop_wire(self) -> None:
        self._close_session()
        if self._wire is not None:
            if not self._wire.is_closed:
                self._poller.unregister(self._wire.fileno())
            else:
                self._forget_closed()
            self._wire.close()
            self._wire = None

    def _forget_closed(self) -> None:
        """Drop closed sockets from the poller: they have no number any more by which to unregister them."""
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def _close_session(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            try:
                session.close()
            except USER_ERRORS as error:  # what user code has done to its objects shows here, and ends no engine
                log.warning("a run was not closed properly: %s", summary_of(error))
            release_freed_memory()

    def _report_fault(self, error: BaseException) -> None:
        """Let the hub say why this engine is gone; it may be past telling."""
        fault = Fault(engine=self._facts.engine, failure=describe_error(error))
        try:
            if self._session is not None:
                self._session.send(fault)  # over the wire: before the hub sees that it was closed
            else:
                self._send(fault)
        except Exception:
            log.exception("the hub was not told")

    def _join(self) -> None:
        self._send(Join(facts=self._facts, num_wires=self._num_lost_wires, format=POOL_FORMAT, version=VERSION))

    def _send(self, record: EngineMessage) -> None:
        try:
            self._socket.send_multipart(encode(record))
        except zmq.Again as error:
            raise HubError(
                f"engine {self._facts.engine} could not send {type(record).__name__} within {SEND_SECONDS:g} s: its "
                f"connection to {self._address.url} was given up, as no hub answers there, or none that has its keys"
            ) from error
