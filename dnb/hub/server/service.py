"""The hub's process: sockets, the processes of engines and kernel, and at most one run at a time.

Started by `dnb.hub.process.supervisor`, again if it dies: then it takes over what the one before has left, and the
engines that beat are asked to join again. An exception of its own ends a hub as SIGKILL does, in the middle of whatever
it does; only who wants the pool to end ends more. What peers say is checked where it arrives
(`dnb.hub.message_checks`), what the user's own code raises is caught where it is called (`dnb.hub.guarded_calls`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import zmq

from dnb.errors import DnbError, HubError, RunError
from dnb.hub.hub_failures import Crash, Recorder, restarts_of
from dnb.hub.log_limits import report_log_counts
from dnb.hub.message_checks import PeerError, check_request, decode_peer
from dnb.hub.pool_files import remove_pool_files
from dnb.hub.run.pool_links import PoolLinks
from dnb.hub.run.run_opening import RunOpener
from dnb.hub.server.connection_poller import ConnectionPoller
from dnb.hub.server.connections import Connections
from dnb.hub.server.members.engine_exits import ExitReader
from dnb.hub.server.members.engine_lifecycle import EngineLifecycle
from dnb.hub.server.members.fault_injection import describe_slowdown
from dnb.hub.server.members.membership import Membership
from dnb.hub.server.pool_records import PoolRecords
from dnb.hub.server.pool_sockets import PoolSockets
from dnb.hub.server.run_slot import RunSlot, read
from dnb.hub.server.steering import Steering
from dnb.protocol.base import Message
from dnb.protocol.client_messages import (
    Control,
    Done,
    GetCheckpoint,
    GetGradients,
    GetJob,
    GetMembers,
    GetPool,
    GetRun,
    GetState,
    Hello,
    InjectFault,
    KeepRestart,
    KeepSpares,
    KillHub,
    Refused,
    ReplaceFunctions,
    Request,
    Retire,
    SetOptions,
    Shutdown,
    Submit,
    TakeCheckpoint,
)
from dnb.protocol.pool import HubConfig, Process
from dnb.transport.segments import named_folders, remove_folders
from dnb.transport.sockets.channels import RoleKeys, encode, refuse_unreadable
from dnb.transport.system.failures import TRACEBACK_LENGTH, clean_text
from dnb.transport.system.processes import activity_of, end_processes

log = logging.getLogger(__name__)

# How often processes are checked; a killed local engine is noticed within this time.
TICK_SECONDS = 0.1
# How long engines get to end by themselves when the pool is shut down.
EXIT_SECONDS = 3.0
# ipyparallel's nannies and heart monitor have nothing to save, and may take seconds to see that they are alone.
HELPER_EXIT_SECONDS = 0.2

_decode_request: Callable[[Any], Request] = msgspec.msgpack.Decoder(Request).decode


class Service:
    """The loop that serves engines and clients of one pool until the pool ends.

    Args:
        config: from the controller.
        keys: of the pool.
        listeners: the ports of engines and clients, by role.
        supervisor: the parent.
        generation: how many hubs this pool had before.
        crashes: how the last ones of them have ended.
        recorder: notes how far this one is.
        exits: how engines have ended.
    """

    def __init__(
        self,
        config: HubConfig,
        keys: RoleKeys,
        listeners: Mapping[str, socket.socket],
        *,
        supervisor: Process,
        recorder: Recorder,
        generation: int = 0,
        crashes: Sequence[Crash] = (),
        exits: ExitReader | None = None,
    ) -> None:
        folders = named_folders(config.folders, config.cluster_id)
        self._config = config
        self._supervisor = supervisor
        self._recorder = recorder
        self._folders = folders
        self._is_doomed = False
        self._ending = ""
        self._sockets = PoolSockets(keys, listeners)
        self._wire_connections = Connections(config.host)
        self._members = Membership(poll=activity_of)
        self._steering = Steering(config.owner)
        self._slot = RunSlot(folders=folders, recorder=recorder)
        self._lifecycle = EngineLifecycle(
            self._members,
            self._slot,
            router=self._sockets.engines,
            withdraw=self._wire_connections.withdraw,
            exits=exits or ExitReader(None),
            generation=generation,
        )
        self._connections = ConnectionPoller(
            self._wire_connections,
            attach=lambda engine, wire: self._slot.held.attach(engine, wire),
            take=self._lifecycle.take_message,
            lose=self._lifecycle.lose_wire,
        )
        self._opener = RunOpener(
            key=config.key,
            folders=folders,
            links=PoolLinks(
                send=self._lifecycle.send,
                offer_wire=self._wire_connections.offer,
                release=self._lifecycle.release,
                evict=self._lifecycle.evict,
                replace=self._members.owe,
                count_commit=recorder.count_commit,
            ),
            generation=generation,
        )
        self._records = PoolRecords(
            config,
            supervisor=supervisor,
            restarts=restarts_of(crashes),
            folders=folders,
            members=self._members,
            steering=self._steering,
            slot=self._slot,
            injector=self._lifecycle.injector,
            count_sent=self._wire_connections.num_records_out,
        )
        if generation:
            self._records.restore()
            self._slot.take_over(self._opener, crashes, engines=list(self._members.returning.values()))

    def end(self, reason: str) -> None:
        """Let the loop end; safe from a signal handler. Without a reason it goes on."""
        self._ending = self._ending or reason

    def serve(self) -> None:
        """Answer until the pool ends, then leave nothing of it; an exception leaves everything to the next hub."""
        poller, engines, clients = self._connections.poller, self._sockets.engines, self._sockets.clients
        poller.register(engines, zmq.POLLIN)
        poller.register(clients, zmq.POLLIN)
        self._connections.listen(True)
        next_tick = 0.0
        while not self._ending:
            has_deferred = self._slot.held.has_deferred
            ready = dict(poller.poll(0 if has_deferred else round(TICK_SECONDS * 1000)))
            if (
                os.getppid() != self._supervisor.pid
            ):  # looked at first: its engines die with it, and shall not be missed
                self.end("the supervisor is gone")
                break
            self._connections.serve(ready)
            if engines in ready:
                _drain(engines, self._lifecycle.take_frames)
            if clients in ready:
                _drain(clients, self._answer)
            if has_deferred and not ready:
                self._slot.held.run_deferred()
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + TICK_SECONDS
            self._connections.watch_writers()
        self._recorder.end_as_meant()
        self._end_pool()

    def _tick(self) -> None:
        self._connections.tick()
        self._lifecycle.poll()
        self._slot.held.tick()
        self._slot.note_work()
        if self._is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        self._lifecycle.injector.poll()
        self._lifecycle.watch_leavers()
        self._records.flush()
        self.end(self._steering.find_end(self._slot.held))
        report_log_counts()

    # clients

    def _answer(self, parts: list[bytes]) -> None:
        if len(parts) < 3:
            log.warning("a request of %d parts was refused", len(parts))
            return
        identity, number, header, *frames = parts
        try:
            request = self._read_request(identity, header)
            check_request(request)
            self._steering.check(identity, request)
            reply, out = self._serve_request(identity, request, frames)
            self._records.write_handovers()  # what was answered stays done, whatever becomes of this hub
        except (DnbError, PeerError, msgspec.MsgspecError) as error:
            reply, out = _refusal(error), []
        self._reply(identity, number, reply, out)

    def _reply(self, identity: bytes, number: bytes, reply: Message, out: Sequence[Any]) -> None:
        try:
            packed = encode(reply, out)
        except (ValueError, OverflowError, msgspec.MsgspecError) as error:  # such as text that is no text
            log.exception("an answer cannot be sent")
            packed = encode(_refusal(HubError(f"the answer cannot be sent: {type(error).__name__}: {error}")))
        try:
            self._sockets.clients.send_multipart([identity, number, *packed], copy=False)
        except zmq.ZMQError as error:
            log.warning("a client left before its answer: %s", error)

    def _read_request(self, identity: bytes, header: bytes) -> Request:
        try:
            request: Request = decode_peer(_decode_request, header)
        except PeerError as error:
            kernel = self._steering.name_version(identity)
            raise refuse_unreadable(header, error.__cause__ or error, kernel=kernel) from error
        return request

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if not self._steering.greet(identity, hello):
            return
        try:
            self._records.write_pool_file()
        except OSError as error:
            raise HubError(str(error)) from error

    def _serve_request(  # noqa: C901 - the table of requests, in one place
        self, identity: bytes, request: Request, frames: Sequence[bytes]
    ) -> tuple[Message, Sequence[Any]]:
        match request:
            case Hello():
                self._greet(identity, request)
            case GetPool():
                return read(self._records.state), []
            case GetMembers():
                return self._records.members(), []
            case Retire():
                self._lifecycle.retire(request)
            case KeepSpares(number=number):
                self._members.keep_spares(number)
            case KeepRestart(policy=policy):
                self._steering.keep_restart(policy)
            case InjectFault():
                self._lifecycle.inject_fault(request)
            case KillHub():
                self._is_doomed = True
                self._slot.held.tell("chaos", "the hub is killed on purpose")
            case Submit():
                self._submit(frames)
            case GetRun():
                heartbeats = self._members.heartbeats.ages(time.monotonic())
                return self._slot.state(request, heartbeats=heartbeats, num_owed=self._members.num_owed)
            case Control(run=name, verb=verb):
                self._slot.control(name, verb)
            case SetOptions(run=name, options=options):
                self._slot.set_options(name, options)
            case ReplaceFunctions(run=name):
                self._slot.replace_functions(name, *self._opener.verify_functions(frames))
            case GetState():
                return self._slot.tensors(request)
            case GetGradients(run=name):
                return self._slot.gradients(name)
            case GetJob(run=name):
                return self._slot.job(name)
            case TakeCheckpoint() | GetCheckpoint():
                return self._slot.serve_checkpoint(request), []
            case Shutdown():
                self.end("asked to")
        return Done(), []

    def _submit(self, frames: Sequence[bytes]) -> None:
        if len(frames) != 4:
            raise HubError(f"a run comes in 4 frames, not {len(frames)}")
        slot, spec = self._slot, self._opener.verified_spec(frames)
        if slot.has(spec.id):
            return
        slot.clear()
        run = self._opener.open(frames, spec, engines=self._members.facts)
        slot.hold(run, step=0)
        for number, engine in self._members.engines.items():
            if engine.is_spare:
                run.make_spare(number)
            if engine.slowdown > 1:
                run.tell("chaos", describe_slowdown(number, engine.slowdown), number)
        self._records.write_pool_file()
        run.start()
        for number in sorted(self._members.heartbeats.silent):
            run.silence_engine(number, "is silent")
        for number in sorted(self._members.heartbeats.busy):
            run.miss_engine(number)

    # the end

    def _end_pool(self) -> None:
        """End every process of the pool and remove what it left; the controller goes last."""
        log.info("the pool ends: %s", self._ending)
        helpers: list[Process] = []
        engines = [facts.process for facts in (*self._members.facts, *self._members.returning.values())]
        steps: tuple[Callable[[], object], ...] = (
            self._slot.stop,
            lambda: helpers.extend(self._records.helpers()),  # while those live whose children they are
            self._lifecycle.injector.close,
            self._lifecycle.dismiss_all,
            partial(end_processes, engines, patience_seconds=EXIT_SECONDS),
            lambda: self._slot.held.close(),
            self._wire_connections.close,
            *self._sockets.closing_steps,
            partial(remove_folders, self._folders),
            partial(
                end_processes, [self._config.controller], patience_seconds=EXIT_SECONDS, first_signal=signal.SIGTERM
            ),
            partial(end_processes, helpers, patience_seconds=HELPER_EXIT_SECONDS),
            partial(remove_pool_files, self._config),
        )
        for step in steps:
            try:
                step()
            except Exception:  # the pool ends all the same, and leaves nothing
                log.exception("something went wrong while the pool ended")


def _drain(router: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
    while router.poll(0):
        take(router.recv_multipart())


def _refusal(error: Exception) -> Refused:
    kind = type(error).__name__ if isinstance(error, DnbError) else HubError.__name__
    message = str(error.args[0]) if isinstance(error, RunError) and error.args else str(error)
    return Refused(
        error=kind,
        message=clean_text(message, length=TRACEBACK_LENGTH),
        traceback=clean_text(getattr(error, "remote_traceback", ""), length=TRACEBACK_LENGTH),
    )
