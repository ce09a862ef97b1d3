"""The hub's process: sockets, the lives of engines and kernel, and at most one run at a time.

Started by `dnb.hub.guardian`, again if it dies: then it takes over what the one before has left, and the engines that
beat are asked to join again. An exception of its own ends a hub as SIGKILL does, in the middle of whatever it does;
only who wants the pool to end ends more. What peers say is checked where it arrives (`dnb.hub.peers`), what the user's
own code raises is caught where it is called (`dnb.hub.user_code`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import psutil
import zmq

from dnb.errors import DnbError, HubError, RunError
from dnb.hub.causes import describe_exit, is_crash
from dnb.hub.chaos import Mischief
from dnb.hub.crashes import Crash, Recorder, restarts_of
from dnb.hub.events import EngineLost
from dnb.hub.exits import ExitReader
from dnb.hub.hearts import SILENT_SECONDS, Hearts
from dnb.hub.log_limits import look_at_logs
from dnb.hub.memo import (
    POOL_FILE,
    PoolMemo,
    read_memo,
    write_memo,
)
from dnb.hub.peers import PeerError, check_engine, check_process, check_request, decode_peer, shortened
from dnb.hub.pool_files import remove_pool_files, write_pool_file
from dnb.hub.roster import Standing, becomes_spare, check_known, check_retirement, choose_successor, lacks_workers
from dnb.hub.run_opening import PoolLinks, RunOpener
from dnb.hub.run_slot import RunSlot, read
from dnb.hub.steering import Steering
from dnb.hub.wiring import Line, Wiring
from dnb.records import (
    Attach,
    Beat,
    Chaos,
    Control,
    Done,
    EngineFacts,
    EngineMessage,
    EngineState,
    EngineStatus,
    Exit,
    Fault,
    GetCheckpoint,
    GetGradients,
    GetMembers,
    GetPool,
    GetRun,
    GetState,
    Hello,
    HubConfig,
    Join,
    KeepRestart,
    KeepSpares,
    KillHub,
    Members,
    Mend,
    Message,
    PoolFacts,
    PoolState,
    Process,
    Refused,
    Rejoin,
    Request,
    Retire,
    SetOptions,
    Shutdown,
    Submit,
    TakeCheckpoint,
    Welcome,
)
from dnb.transport.channels import (
    CLIENT_ROLE,
    ENGINE_ROLE,
    RoleKeys,
    bind_router,
    encode,
    local,
    refuse_unreadable,
    start_authenticator,
)
from dnb.transport.doors import Doorkeeper
from dnb.transport.failures import TRACEBACK_LENGTH, clean_text
from dnb.transport.lives import (
    Activity,
    activity_of,
    children_of,
    end_processes,
    is_alive,
    is_here,
    look_at,
    signal_process,
    this_process,
)
from dnb.transport.segments import named_folders, remove_folders
from dnb.transport.wires import WireError
from dnb.versions import POOL_FORMAT, VERSION, name_dnb

if TYPE_CHECKING:  # torch takes seconds to import: the sockets are bound first, see `main`
    pass

T = TypeVar("T")

log = logging.getLogger(__name__)

# How often lives are looked at; a killed local engine is noticed within this time.
TICK_SECONDS = 0.1
NO_BYTES = memoryview(b"")
# How long engines get to end by themselves when the pool is shut down.
EXIT_SECONDS = 3.0
# How long an engine that left its pool may take to end; then it is killed.
LEAVE_SECONDS = 5.0
# How long a new hub expects the engines of the one before: those that live are back within a tenth of that.
RETURN_SECONDS = 5.0
# How often a disk is tried again that did not take the pool's record.
WRITE_AGAIN_SECONDS = 1.0
# How often an engine is asked to join again that does not.
ASK_SECONDS = 1.0
# ipyparallel's nannies and heart monitor have nothing to save, and may take seconds to see that they are alone.
HELPER_EXIT_SECONDS = 0.2


@dataclass(slots=True)
class _Engine:
    facts: EngineFacts
    identity: bytes
    messages_in: int = 0
    messages_out: int = 0
    num_wires: int = 0  # that it had lost when it joined
    is_spare: bool = False  # loads the run and rests
    is_retiring: bool = False  # leaves as soon as it owes the run nothing


@dataclass(slots=True)
class _Coming:
    """An engine of the hub before that is not back yet."""

    is_spare: bool
    is_retiring: bool


class Service:
    """Serves engines and clients of one pool until the pool ends.

    Args:
        config: from the controller.
        keys: of the pool.
        listeners: the ports of engines and clients, by role.
        guardian: the parent.
        life: how many hubs this pool had before.
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
        guardian: Process,
        recorder: Recorder,
        life: int = 0,
        crashes: Sequence[Crash] = (),
        exits: ExitReader | None = None,
    ) -> None:
        self._config = config
        self._guardian = guardian
        self._life = life
        self._recorder = recorder
        self._restarts = restarts_of(crashes)
        self._began = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        self._engine_socket, self._client_socket = (
            bind_router(self._context, keys, role=role, listener=listeners[role], local=listeners.get(local(role)))
            for role in (ENGINE_ROLE, CLIENT_ROLE)
        )
        self._doorkeeper = Doorkeeper(
            {self._engine_socket: listeners[ENGINE_ROLE], self._client_socket: listeners[CLIENT_ROLE]}
        )
        self._doorkeeper.start()
        self._process = this_process()
        self._steering = Steering(config.owner)
        self._engines: dict[int, _Engine] = {}
        self._hearts = Hearts(look=self._look_at_work)
        self._wiring = Wiring(config.host)
        self._poller = zmq.Poller()
        self._is_listening = False
        self._known_helpers: set[Process] = set()
        self._wanted_spares = 0
        self._dead: set[int] = set()
        self._exits = exits or ExitReader(None)
        self._killed: set[Process] = set()  # on purpose
        self._num_threads = 0  # of the engine that joined last
        self._num_owed = 0  # engines that a run's work has ended, and that nobody has replaced yet
        self._leavers: dict[Process, float] = {}  # told to end; when they are killed
        self._is_file_old = False  # the pool's record on disk
        self._is_memo_old = False  # what the next hub will find
        self._write_again = self._keep_again = 0.0  # when disk and memory are tried again, on the monotonic clock
        self._disk_fault = ""  # that was logged
        self._mischief = Mischief(self._send_to_engine)
        self._is_doomed = False
        self._ending = ""
        self._decode_engine = msgspec.msgpack.Decoder(EngineMessage).decode
        self._decode_request = msgspec.msgpack.Decoder(Request).decode
        self._folders = named_folders(config.folders, config.cluster_id)
        self._returning: dict[int, EngineFacts] = {}  # engines of the hub before
        self._spares: frozenset[int] = frozenset()  # spares among them
        self._leaving: frozenset[int] = frozenset()  # those of them who were asked to leave
        self._asked: dict[int, float] = {}  # engines to join again, and when they may be asked once more
        self._slot = RunSlot(folders=self._folders, recorder=recorder)
        self._opener = RunOpener(
            key=config.key,
            folders=self._folders,
            links=PoolLinks(
                send=self._send_to_engine,
                offer_wire=self._wiring.offer,
                release=self._release,
                condemn=self._condemn,
                replace=self._replace,
                count_commit=recorder.count_commit,
            ),
            life=life,
        )
        if life:
            self._take_over(crashes)

    def end(self, reason: str) -> None:
        """Let the loop end; safe from a signal handler."""
        self._ending = self._ending or reason

    def serve(self) -> None:
        """Answer until the pool ends, then leave nothing of it; an exception leaves everything to the next hub."""
        poller = self._poller
        poller.register(self._engine_socket, zmq.POLLIN)
        poller.register(self._client_socket, zmq.POLLIN)
        self._listen(True)
        next_tick = 0.0
        while not self._ending:
            has_chores = self._slot.held.has_chores
            ready = dict(poller.poll(0 if has_chores else round(TICK_SECONDS * 1000)))
            self._serve_wires(ready)
            if self._engine_socket in ready:
                self._drain(self._engine_socket, self._take_from_engine)
            if self._client_socket in ready:
                self._drain(self._client_socket, self._answer)
            if has_chores and not ready:
                self._slot.held.do_chores()
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + TICK_SECONDS
            self._watch_writers()
        self._recorder.end_as_meant()
        self._end_pool()

    # what the hub before has left

    def _take_over(self, crashes: Sequence[Crash]) -> None:
        memo = read_memo(self._folders, POOL_FILE, PoolMemo)
        if memo is not None:
            self._steering.restore(memo)
            self._returning = {facts.engine: facts for facts in memo.engines}
            self._spares = frozenset(memo.spares)
            self._leaving = frozenset(memo.leaving)
            self._wanted_spares = memo.wanted_spares
            self._dead = set(memo.dead)
            self._num_owed = memo.num_owed
            self._mischief.num_killed = memo.num_killed
            self._mischief.stopped = dict(memo.stopped)
            self._known_helpers = set(memo.helpers)
        self._is_file_old = True
        self._slot.take_over(self._opener, crashes, engines=list(self._returning.values()))

    def _write_memos(self) -> None:
        if self._is_memo_old or self._steering.changed:
            self._is_memo_old = self._steering.changed = not write_memo(self._folders, POOL_FILE, self._memo)
            self._slot.write_accounts()
        self._slot.write_memo()

    @property
    def _memo(self) -> PoolMemo:
        engines = [*self._returning.values(), *(engine.facts for engine in self._engines.values())]
        return PoolMemo(
            owner=self._steering.owner,
            kernels={name.hex(): kernel for name, kernel in self._steering.kernels.items()},
            kernel_versions={name.hex(): version for name, version in self._steering.versions.items()},
            engines=tuple(engines),
            spares=(
                *(self._spares & self._returning.keys()),
                *(number for number, engine in self._engines.items() if engine.is_spare),
            ),
            leaving=(
                *(self._leaving & self._returning.keys()),
                *(number for number, engine in self._engines.items() if engine.is_retiring),
            ),
            wanted_spares=self._wanted_spares,
            restart=self._steering.restart,
            dead=tuple(self._dead),
            num_killed=self._mischief.num_killed,
            stopped=tuple(self._mischief.stopped.items()),
            helpers=tuple(self._known_helpers),
            num_owed=self._num_owed,
        )

    def _drain(self, router: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
        while router.poll(0):
            take(router.recv_multipart())

    # wires

    def _serve_wires(self, ready: dict[Any, int]) -> None:
        for place in ready:
            if not isinstance(place, int):
                continue
            if place in self._wiring.listeners:
                self._answer_calls(place)
            elif (line := self._wiring.lines.get(place)) is not None:
                self._serve_line(place, line)

    def _answer_calls(self, listening: int) -> None:
        for caller in self._wiring.accept_some(listening):
            self._poller.register(caller, zmq.POLLIN)
            for place in self._wiring.surplus():
                self._drop_line(place, self._wiring.lines[place])
        if not self._wiring.num_calls_left:  # until the next tick; else they would wake the loop all the time
            self._listen(False)

    def _listen(self, wanted: bool) -> None:
        if wanted == self._is_listening:
            return
        self._is_listening = wanted
        for place in self._wiring.listeners:
            if wanted:
                self._poller.register(place, zmq.POLLIN)
            else:
                self._poller.unregister(place)

    def _serve_line(self, place: int, line: Line) -> None:
        line.wire.flush()
        reason = ""
        try:
            messages = line.wire.receive()
            for packed, raw in messages:
                if line.engine is None:
                    self._attach(line, packed)
                    messages += line.wire.receive()  # what came behind the greeting
                else:
                    self._take_message(line.engine, decode_peer(self._decode_engine, packed), raw)
        except (WireError, PeerError) as error:  # whoever says this is cut off, and may call again
            log.warning("a wire of engine %s is closed: %s", line.engine, error)
            reason = f"was cut off: {error}"
            line.wire.close()
        if line.wire.is_closed:
            self._drop_line(place, line, reason=reason)

    def _attach(self, line: Line, packed: memoryview) -> None:
        engine = self._wiring.hear(line, packed)
        for place, old in list(self._wiring.lines.items()):
            if old is not line and old.engine == engine:
                self._poller.unregister(place)
                self._wiring.drop(place)
        self._slot.held.attach(engine, line.wire)

    def _drop_line(self, place: int, line: Line, *, reason: str = "") -> None:
        """A connection that closes is how a death is seen first."""
        self._poller.unregister(place)
        self._wiring.drop(place)
        if line.engine in self._engines and not line.is_retired and self._slot.held.is_active:
            self._lose(line.engine, reason)

    def _watch_writers(self) -> None:
        for place, line in list(self._wiring.lines.items()):
            if line.wire.is_closed:
                self._drop_line(place, line)
                continue
            wants = line.wire.wants_to_write
            if wants != line.is_watched:
                line.is_watched = wants
                self._poller.modify(place, zmq.POLLIN | zmq.POLLOUT if wants else zmq.POLLIN)

    # engines

    def _take_from_engine(self, parts: list[bytes]) -> None:
        identity, *rest = parts
        try:
            message = decode_peer(self._decode_engine, rest[0] if rest else b"")
            if isinstance(message, Join):
                check_engine(message.facts)
                self._join(message, identity)
            elif isinstance(message, Beat):
                check_process(message.process)
                self._hear(message)
            else:
                self._take_from_known(identity, message)
        except PeerError as error:
            log.warning("a message from %r was refused: %s", identity, error)

    def _take_from_known(self, identity: bytes, message: EngineMessage) -> None:
        engine = next((e for e in self._engines.values() if e.identity == identity), None)
        if engine is None:
            log.warning("%s from an engine that was given up: %r", type(message).__name__, identity)
            return
        self._take_message(engine.facts.engine, message)

    def _take_message(self, number: int, message: EngineMessage, raw: memoryview = NO_BYTES) -> None:
        engine = self._engines.get(number)
        if engine is None or isinstance(message, Join | Attach | Beat):
            return
        if isinstance(message, Fault):
            failure = shortened(message.failure)
            reason = f"ended of an error of dnb itself: {failure.kind}: {failure.message}"
            log.error("engine %d %s\n%s", number, reason, failure.traceback)
            self._lose(number, reason)
            return
        engine.messages_in += 1
        if message.run == self._slot.run_id:
            self._slot.held.take(number, message, raw)

    def _join(self, join: Join, identity: bytes) -> None:
        facts, number = join.facts, join.facts.engine
        if join.format != POOL_FORMAT:  # the engine has told its kernel so
            log.warning("engine %d is %s: it is not let in", number, name_dnb(join.version, join.format))
            return
        known = self._engines.get(number)
        if known is not None and known.facts.process == facts.process and known.num_wires == join.num_wires:
            return  # it asked by itself, and was asked to
        if known is not None and self._slot.held.is_active:
            # Its wire was closed before it had said whose it is, so that nobody has missed it: it is to be loaded anew.
            self._lose(number, "has lost its wire")
        others = [engine for other, engine in self._engines.items() if other != number]
        is_back = self._returning.pop(number, None) is not None
        is_spare = number in self._spares if is_back else becomes_spare(others, wanted=self._wanted_spares)
        self._engines[number] = _Engine(facts, identity, num_wires=join.num_wires, is_spare=is_spare)
        if not is_back and known is None and number not in self._dead:
            self._num_owed = max(self._num_owed - 1, 0)
        self._dead.discard(number)  # it had only lost its connection, or stood still
        self._num_threads = facts.cores
        self._hearts.begin(number, time.monotonic())
        self._send_to_engine(number, Welcome())
        self._is_file_old = self._is_memo_old = True
        if self._slot.held.is_active:
            if is_spare:
                self._slot.held.rest_engine(number)
            self._slot.held.add_engine(facts)
        if is_back and number in self._leaving:
            self._let_leave([number])

    def _lose(self, engine: int, reason: str = "") -> None:
        """An engine is gone; whoever is gone with it, and not noticed yet, gets nothing of what it had."""
        others = [(n, e.facts.process) for n, e in self._engines.items() if n != engine]
        gone_too = self._exits.ending(others) if engine in self._engines else []
        for number in gone_too:
            self._slot.held.expect_loss(number)
        for number in (engine, *gone_too):
            self._lose_one(number, reason if number == engine else "")

    def _lose_one(self, engine: int, reason: str) -> None:
        lost = self._engines.pop(engine, None)
        self._wiring.withdraw(engine)
        self._hearts.drop(engine)
        self._is_file_old = self._is_memo_old = True
        if lost is not None:
            self._dead.add(engine)
            if not lost.is_spare and not lost.is_retiring:
                self._wake_spare()  # first: so it has its part of the lost shards
        self._slot.held.lose_engine(self._loss(engine, lost, reason))

    def _loss(self, engine: int, lost: _Engine | None, reason: str) -> EngineLost:
        """What is known of an engine's end."""
        if lost is None or reason:
            return EngineLost(engine, reason or "died")
        process = lost.facts.process
        code, is_wanted = self._exits.code_of(process), process in self._killed or lost.is_retiring
        self._killed.discard(process)
        is_gone = code is not None or not is_here(process) or look_at(process) == "gone"
        return EngineLost(
            engine,
            describe_exit(code, is_wanted=is_wanted),
            is_suspect=is_gone and not is_wanted,
            is_crash=is_crash(code) and not is_wanted,
        )

    def _miss(self, number: int) -> None:
        """An engine of the hub before will not come back."""
        del self._returning[number]
        self._dead.add(number)
        if number not in self._spares and not self._wake_spare():
            self._spares = frozenset(sorted(self._spares)[1:])  # one who is still to come does not rest
        self._slot.held.lose_engine(EngineLost(number, "died"))

    # those who leave, and spares

    def _retire(self, request: Retire) -> None:
        coming = {
            number: _Coming(is_spare=number in self._spares, is_retiring=number in self._leaving)
            for number in self._returning
        }
        known: dict[int, Standing] = {**coming, **self._engines}
        leaving = check_retirement(request.engines, known, active_run=self._slot.active_name, force=request.force)
        self._leaving |= coming.keys() & set(leaving)  # as soon as they are back
        self._is_memo_old = True
        self._let_leave(number for number in leaving if number in self._engines)

    def _let_leave(self, leaving: Iterable[int]) -> None:
        leaving = list(leaving)
        for number in leaving:
            self._engines[number].is_retiring = self._is_memo_old = True
        if lacks_workers(self._engines):
            self._wake_spare()
        for number in leaving:
            if self._slot.held.is_active:
                self._slot.held.retire_engine(number)
            else:
                self._release(number)

    def _release(self, number: int) -> None:
        """An engine that was asked to leave owes nothing any more: it ends."""
        self._send_to_engine(number, Exit())
        engine = self._engines.pop(number, None)
        self._hearts.drop(number)
        if engine is not None:
            self._leavers[engine.facts.process] = time.monotonic() + LEAVE_SECONDS
            self._known_helpers.add(engine.facts.process)  # it belongs to the pool until it is gone
            self._is_file_old = self._is_memo_old = True

    def _condemn(self, number: int) -> None:
        """An engine that stands still holds others up: it is killed, or cut off where that cannot be."""
        engine = self._engines.get(number)
        if engine is not None and signal_process(engine.facts.process, signal.SIGKILL):
            self._killed.add(engine.facts.process)
        elif engine is not None:
            self._lose(number, "was cut off")

    def _replace(self, number: int) -> None:
        """Engines have ended at a run's work: the pool is filled up again, so that the run can go on."""
        self._num_owed = min(self._num_owed + number, len(self._dead))
        self._is_memo_old = True

    def _watch_leavers(self) -> None:
        if not self._slot.held.is_active:
            for number in [number for number, engine in self._engines.items() if engine.is_retiring]:
                self._release(number)  # the run that they were to bring something to has ended
        for process, deadline in list(self._leavers.items()):
            if not is_alive(process):
                del self._leavers[process]
            elif time.monotonic() > deadline:
                signal_process(process, signal.SIGKILL)

    def _wake_spare(self) -> bool:
        """Let a spare work; whether there was one."""
        number = choose_successor(self._engines)
        if number is None:
            return False
        self._engines[number].is_spare = False
        self._slot.held.wake_engine(number)
        return True

    def _harm(self, request: Chaos) -> None:
        check_known([request.engine], self._engines)
        told = self._mischief.act(request, self._engines[request.engine].facts)
        if request.verb == "kill":
            self._killed.add(self._engines[request.engine].facts.process)
        self._is_memo_old = True
        self._slot.held.tell("chaos", told, request.engine)

    def _members(self) -> Members:
        staying = {number: engine for number, engine in sorted(self._engines.items()) if not engine.is_retiring}
        return Members(
            workers=tuple(number for number, engine in staying.items() if not engine.is_spare),
            spares=tuple(number for number, engine in staying.items() if engine.is_spare),
            leaving=(
                *(number for number in sorted(self._engines) if number not in staying),
                *sorted(self._leaving & self._returning.keys()),
            ),
            wanted_spares=self._wanted_spares,
            num_died=len(self._dead),
            num_killed=self._mischief.num_killed,
            restart=self._steering.restart,
            last_restart=self._restarts[-1].reason if self._restarts else "",
            num_owed=self._num_owed,
            num_threads=self._num_threads,
        )

    def _send_to_engine(self, engine: int, record: Message, frames: Sequence[Any] = ()) -> None:
        entry = self._engines.get(engine)
        if entry is None:
            return
        try:
            self._engine_socket.send_multipart([entry.identity, *encode(record, frames)], copy=False)
        except zmq.ZMQError as error:  # unreachable: the next tick sees the death
            log.warning("engine %d cannot be reached: %s", engine, error)
        else:
            entry.messages_out += 1

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
            self._write_memos()  # what was answered stays done, whatever becomes of this hub
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
            self._client_socket.send_multipart([identity, number, *packed], copy=False)
        except zmq.ZMQError as error:
            log.warning("a client left before its answer: %s", error)

    def _read_request(self, identity: bytes, header: bytes) -> Request:
        try:
            request: Request = decode_peer(self._decode_request, header)
        except PeerError as error:
            kernel = self._steering.name_version(identity)
            raise refuse_unreadable(header, error.__cause__ or error, kernel=kernel) from error
        return request

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if not self._steering.greet(identity, hello):
            return
        try:
            self._write_pool_file()
        except OSError as error:
            raise HubError(str(error)) from error

    def _serve_request(  # noqa: C901 - the table of requests, in one place
        self, identity: bytes, request: Request, frames: Sequence[bytes]
    ) -> tuple[Message, Sequence[Any]]:
        match request:
            case Hello():
                self._greet(identity, request)
            case GetPool():
                return read(self._pool_state), []
            case GetMembers():
                return self._members(), []
            case Retire():
                self._retire(request)
            case KeepSpares(number=number):
                self._wanted_spares = number
                self._is_memo_old = True
            case KeepRestart(policy=policy):
                self._steering.keep_restart(policy)
            case Chaos():
                self._harm(request)
            case KillHub():
                self._is_doomed = True
                self._slot.held.tell("chaos", "the hub is killed on purpose")
            case Submit():
                self._submit(frames)
            case GetRun():
                heartbeats = self._hearts.ages(time.monotonic())
                return self._slot.state(request, heartbeats=heartbeats, num_owed=self._num_owed)
            case Control(run=name, verb=verb):
                self._slot.control(name, verb)
            case SetOptions(run=name, options=options):
                self._slot.set_options(name, options)
            case Mend(run=name):
                self._slot.replace_functions(name, *self._opener.verify_functions(frames))
            case GetState():
                return self._slot.tensors(request)
            case GetGradients(run=name):
                return self._slot.gradients(name)
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
        run = self._opener.open(frames, spec, engines=[engine.facts for engine in self._engines.values()])
        slot.hold(run, step=0)
        for number, engine in self._engines.items():
            if engine.is_spare:
                run.rest_engine(number)
        self._write_pool_file()
        run.start()
        for number in sorted(self._hearts.silent):
            run.silence_engine(number, "is silent")
        for number in sorted(self._hearts.busy):
            run.miss_engine(number)

    # lives

    def _tick(self) -> None:
        if os.getppid() != self._guardian.pid:
            self.end("the guardian is gone")
        self._wiring.refill()
        self._listen(True)
        for place in self._wiring.silent():
            self._drop_line(place, self._wiring.lines[place])
        self._look_at_engines()
        self._slot.held.tick()
        self._slot.note_work()
        if self._is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        self._mischief.look()
        self._watch_leavers()
        self._write_what_is_old()
        self.end(self._steering.find_end(self._slot.held))
        look_at_logs()

    def _look_at_engines(self) -> None:
        busy = self._hearts.busy
        for number in self._hearts.tick(time.monotonic()):
            self._tell_silent(number, f"was not heard for {SILENT_SECONDS:g} s", is_asleep=True)
        for number in sorted(self._hearts.busy - busy):
            self._tell_busy(number)
        for number, facts in list(self._returning.items()):
            if look_at(facts.process) == "gone":
                self._miss(number)
        for number, engine in list(self._engines.items()):
            if number not in self._engines:
                continue  # it was lost together with another
            state = look_at(engine.facts.process)
            if state == "gone":
                self._lose(number)
            elif state == "stopped" and self._hearts.declare_silent(number):
                self._tell_silent(number, "was stopped")

    def _look_at_work(self, engine: int) -> Activity | None:
        known = self._engines.get(engine)
        return None if known is None else activity_of(known.facts.process)

    def _tell_silent(self, engine: int, reason: str, *, is_asleep: bool = False) -> None:
        self._slot.held.silence_engine(engine, reason, is_asleep=is_asleep)

    def _tell_busy(self, engine: int) -> None:
        self._slot.held.miss_engine(engine)

    def _hear(self, beat: Beat) -> None:
        engine = self._engines.get(beat.engine)
        if engine is None:
            self._ask_back(beat)
            return
        if engine.facts.process != beat.process:
            return
        if beat.is_at_work:
            self._hearts.see_at_work(beat.engine, time.monotonic())
            return
        # The last beat before a signal may come after the tick that saw the engine stopped.
        if beat.engine in self._hearts.silent and look_at(beat.process) == "stopped":
            return
        if self._hearts.beat(beat.engine, time.monotonic()):
            self._slot.held.hear_engine(beat.engine)

    def _ask_back(self, beat: Beat) -> None:
        """An engine beats that this hub does not know: it belonged to the one before, or its greeting was lost."""
        now = time.monotonic()
        if beat.process in self._leavers or now < self._asked.get(beat.engine, 0.0):
            return
        self._asked[beat.engine] = now + ASK_SECONDS
        with contextlib.suppress(zmq.ZMQError):  # its other socket is not connected yet
            self._engine_socket.send_multipart([b"engine-%d" % beat.engine, *encode(Rejoin(life=self._life))])
            return
        del self._asked[beat.engine]

    def _statuses(self) -> tuple[EngineStatus, ...]:
        busy = self._slot.held.working
        sent = self._wiring.num_records_out()
        return tuple(
            _status(
                engine,
                is_busy=number in busy or number in self._hearts.busy,
                is_silent=number in self._hearts.silent,
                num_on_wires=sent.get(number, 0),
            )
            for number, engine in sorted(self._engines.items())
        )

    def _facts(self, *, look: bool = True) -> PoolFacts:
        return PoolFacts(
            cluster_id=self._config.cluster_id,
            guardian=self._guardian,
            hub=self._process,
            controller=self._config.controller,
            helpers=self._helpers(look=look),
            engines=tuple(engine.facts for engine in self._engines.values()),
            owner=self._steering.owner,
            run=self._slot.name,
            run_status=self._slot.status,
            returning=tuple(self._returning.values()),
            restarts=self._restarts,
            folders=tuple(map(str, self._folders)),
            format=POOL_FORMAT,
            version=VERSION,
        )

    def _pool_state(self) -> PoolState:
        is_new = time.monotonic() - self._began < RETURN_SECONDS
        returning = sorted(self._returning) if is_new else ()
        return PoolState(facts=self._facts(), engines=self._statuses(), returning=tuple(returning))

    def _helpers(self, *, look: bool = True) -> tuple[Process, ...]:
        parents = [
            self._config.controller,
            *(engine.facts.process for engine in self._engines.values()),
        ]
        if look:
            # Remembered, as the children of a controller that was killed can no longer be found.
            own = {self._process.pid, self._guardian.pid}
            self._known_helpers |= {child for child in children_of(parents) if child.pid not in own}
        return tuple(helper for helper in self._known_helpers if is_alive(helper))

    def _write_what_is_old(self) -> None:
        now = time.monotonic()
        if self._is_file_old and now >= self._write_again:
            self._write_pool_file()
        elif (self._is_memo_old or self._steering.changed or self._slot.changed) and now >= self._keep_again:
            self._keep_again = now + WRITE_AGAIN_SECONDS
            self._write_memos()

    def _write_pool_file(self) -> None:
        # Looking for children goes over all processes of the host, 13 ms were seen: no step waits for that. The nanny
        # of an engine that has just joined ends with its engine.
        try:
            write_pool_file(Path(self._config.security_dir), self._facts(look=not self._slot.held.is_active))
        except OSError as error:
            # Only other kernels read it: nothing that this one does waits for it.
            self._is_file_old, self._write_again = True, time.monotonic() + WRITE_AGAIN_SECONDS
            if str(error) != self._disk_fault:
                self._disk_fault = str(error)
                log.warning("the pool's record is not up to date, and is written as soon as it can be: %s", error)
        else:
            self._is_file_old = False
            if self._disk_fault:
                self._disk_fault = ""
                log.warning("the pool's record is up to date again")
        self._is_memo_old = True
        self._write_memos()

    def _end_pool(self) -> None:
        """End every process of the pool and remove what it left; the controller goes last."""
        log.info("the pool ends: %s", self._ending)
        helpers: list[Process] = []
        engines = [engine.facts.process for engine in self._engines.values()]
        engines += [facts.process for facts in self._returning.values()]
        steps: tuple[Callable[[], object], ...] = (
            self._slot.stop,
            lambda: helpers.extend(self._helpers()),  # while those live whose children they are
            self._mischief.close,
            self._dismiss_engines,
            partial(end_processes, engines, patience_seconds=EXIT_SECONDS),
            lambda: self._slot.held.close(),
            self._wiring.close,
            self._authenticator.stop,
            self._doorkeeper.stop,
            self._engine_socket.close,
            self._client_socket.close,
            self._context.term,
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

    def _dismiss_engines(self) -> None:
        for number in list(self._engines):
            self._send_to_engine(number, Exit())


def _refusal(error: Exception) -> Refused:
    kind = type(error).__name__ if isinstance(error, DnbError) else HubError.__name__
    message = str(error.args[0]) if isinstance(error, RunError) and error.args else str(error)
    return Refused(
        error=kind,
        message=clean_text(message, length=TRACEBACK_LENGTH),
        traceback=clean_text(getattr(error, "remote_traceback", ""), length=TRACEBACK_LENGTH),
    )


def _status(engine: _Engine, *, is_busy: bool, is_silent: bool, num_on_wires: int) -> EngineStatus:
    state: EngineState = "busy" if is_busy else "spare" if engine.is_spare else "ready"
    state = "hung" if is_silent else state
    rss_bytes = None
    try:
        process = psutil.Process(engine.facts.process.pid)
        rss_bytes = process.memory_info().rss
        if process.status() == psutil.STATUS_STOPPED:
            state = "hung"
    except psutil.Error as error:
        log.info("engine %d cannot be looked at: %s", engine.facts.engine, error)
    return EngineStatus(
        facts=engine.facts,
        state=state,
        rss_bytes=rss_bytes,
        messages_in=engine.messages_in,
        messages_out=engine.messages_out + num_on_wires,
    )
