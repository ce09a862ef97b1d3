"""The hub's process: sockets, the lives of engines and kernel, and at most one run at a time.

Started by `dnb.hub.guardian`, again if it dies: then it takes over what the one before has left, and the engines that
beat are asked to join again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import psutil
import zmq

from dnb.errors import ArgumentError, DnbError, HubError
from dnb.hub.chaos import Mischief
from dnb.hub.hearts import SILENT_SECONDS, Hearts
from dnb.hub.memo import (
    ACCOUNTS_FILE,
    POOL_FILE,
    RUN_FILE,
    AccountsMemo,
    PoolMemo,
    RunMemo,
    read_memo,
    remove_memo,
    write_memo,
)
from dnb.hub.pool_files import remove_pool_files, write_pool_file
from dnb.hub.roster import becomes_spare, check_known, check_retirement, choose_successor, lacks_workers
from dnb.hub.wiring import Line, Wiring
from dnb.records import (
    Attach,
    Beat,
    Chaos,
    CheckpointState,
    Control,
    Done,
    EngineFacts,
    EngineMessage,
    EngineState,
    EngineStatus,
    Exit,
    GetCheckpoint,
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
    RunSpec,
    SetOptions,
    Shutdown,
    Submit,
    TakeCheckpoint,
    Welcome,
)
from dnb.transport.channels import CLIENT_ROLE, ENGINE_ROLE, RoleKeys, bind_router, encode, start_authenticator
from dnb.transport.lives import (
    children_of,
    end_processes,
    is_alive,
    is_same,
    look_at,
    signal_process,
    this_process,
)
from dnb.transport.segments import pool_folders, remove_pool_folders
from dnb.transport.wires import WireError

if TYPE_CHECKING:  # torch takes seconds to import: the sockets are bound first, see `main`
    from dnb.hub.active_run import ActiveRun

log = logging.getLogger(__name__)

# How often lives are looked at; a killed local engine is noticed within this time.
TICK_SECONDS = 0.1
# How long engines get to end by themselves when the pool is shut down.
EXIT_SECONDS = 3.0
# How long an engine that left its pool may take to end; then it is killed.
LEAVE_SECONDS = 5.0
# A hub that has lived so long without having a run to advance is of use, too.
USEFUL_SECONDS = 2.0
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


class Service:
    """Serves engines and clients of one pool until the pool ends.

    Args:
        config: from the controller.
        keys: of the pool.
        listeners: the ports of engines and clients, by role.
        guardian: the parent.
        life: how many hubs this pool had before.
        is_wary: hubs died of the run that they took over: it is given up.
        be_of_use: called once, when this hub has done something, so that its death is not one of those.
    """

    def __init__(
        self,
        config: HubConfig,
        keys: RoleKeys,
        listeners: Mapping[str, socket.socket],
        *,
        guardian: Process,
        life: int = 0,
        is_wary: bool = False,
        be_of_use: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._guardian = guardian
        self._life = life
        self._be_of_use = be_of_use
        self._is_of_use = False
        self._began = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        self._engine_socket, self._client_socket = (
            bind_router(self._context, keys, role=role, listener=listeners[role]) for role in (ENGINE_ROLE, CLIENT_ROLE)
        )
        self._process = this_process()
        self._owner = config.owner
        self._orphaned: float | None = None  # since when nobody steers a pool whose run does not advance
        self._engines: dict[int, _Engine] = {}
        self._kernels: dict[bytes, Process] = {}  # by the identity of their sockets
        self._hearts = Hearts()
        self._wiring = Wiring(config.host)
        self._poller = zmq.Poller()
        self._known_helpers: set[Process] = set()
        self._run: ActiveRun | None = None
        self._wanted_spares = 0
        self._restart: Literal["never", "always"] = "never"  # kept for the kernel that steers
        self._dead: set[int] = set()
        self._leavers: dict[Process, float] = {}  # told to end; when they are killed
        self._is_file_old = False  # the pool's record on disk
        self._is_memo_old = self._is_run_memo_old = False  # what the next hub will find
        self._mischief = Mischief(self._send_to_engine)
        self._is_doomed = False
        self._ending = ""
        self._decode_engine = msgspec.msgpack.Decoder(EngineMessage).decode
        self._decode_request = msgspec.msgpack.Decoder(Request).decode
        self._folders = pool_folders(config.cluster_id)
        self._returning: dict[int, EngineFacts] = {}  # engines of the hub before
        self._spares: frozenset[int] = frozenset()  # spares among them
        self._leaving: frozenset[int] = frozenset()  # those of them who were asked to leave
        self._asked: dict[int, float] = {}  # engines to join again, and when they may be asked once more
        if life:
            self._take_over(is_wary=is_wary)

    def end(self, reason: str) -> None:
        """Let the loop end; safe from a signal handler."""
        self._ending = self._ending or reason

    def serve(self) -> None:
        """Answer until the pool ends, then leave nothing of it behind."""
        poller = self._poller
        poller.register(self._engine_socket, zmq.POLLIN)
        poller.register(self._client_socket, zmq.POLLIN)
        for listening in self._wiring.listeners:
            poller.register(listening, zmq.POLLIN)
        next_tick = 0.0
        try:
            while not self._ending:
                has_chores = self._run is not None and self._run.has_chores
                ready = dict(poller.poll(0 if has_chores else round(TICK_SECONDS * 1000)))
                self._serve_wires(ready)
                if self._engine_socket in ready:
                    self._drain(self._engine_socket, self._take_from_engine)
                if self._client_socket in ready:
                    self._drain(self._client_socket, self._answer)
                if has_chores and not ready and self._run is not None:
                    self._run.do_chores()
                if time.monotonic() >= next_tick:
                    self._tick()
                    next_tick = time.monotonic() + TICK_SECONDS
                self._watch_writers()
        finally:
            self._end_pool()

    # what the hub before has left

    def _take_over(self, *, is_wary: bool) -> None:
        memo = read_memo(self._folders, POOL_FILE, PoolMemo)
        if memo is not None:
            self._owner = memo.owner
            self._kernels = {bytes.fromhex(name): kernel for name, kernel in memo.kernels.items()}
            self._returning = {facts.engine: facts for facts in memo.engines}
            self._spares = frozenset(memo.spares)
            self._leaving = frozenset(memo.leaving)
            self._wanted_spares = memo.wanted_spares
            self._restart = memo.restart
            self._dead = set(memo.dead)
            self._mischief.num_killed = memo.num_killed
            self._mischief.stopped = dict(memo.stopped)
            self._known_helpers = set(memo.helpers)
        run = read_memo(self._folders, RUN_FILE, RunMemo)
        if run is not None:
            self._take_over_run(run, is_wary=is_wary)
        self._is_file_old = True

    def _take_over_run(self, memo: RunMemo, *, is_wary: bool) -> None:
        from dnb.hub.beginnings import give_up

        try:
            if is_wary:
                raise HubError(f"{self._life} hubs died of it")
            self._run = self._open_run(memo.frames, self._verified_spec(memo.frames), memo)
            self._run.start()
        except Exception as error:  # whatever it is: without the run, the pool can still be used
            log.exception("the run cannot be taken over")
            give_up(memo, f"the hub died, and the run could not be taken over: {type(error).__name__}: {error}")
            self._forget_run_memos()

    def _forget_run_memos(self) -> None:
        for name in (RUN_FILE, ACCOUNTS_FILE):
            remove_memo(self._folders, name)

    def _write_memos(self) -> None:
        if self._is_memo_old:
            self._is_memo_old = False
            write_memo(self._folders, POOL_FILE, self._memo)
            if self._run is not None:
                write_memo(self._folders, ACCOUNTS_FILE, AccountsMemo(departed=self._run.departed))
        if self._is_run_memo_old and self._run is not None:
            self._is_run_memo_old = False
            write_memo(self._folders, RUN_FILE, self._run.memo)

    @property
    def _memo(self) -> PoolMemo:
        engines = [*self._returning.values(), *(engine.facts for engine in self._engines.values())]
        return PoolMemo(
            owner=self._owner,
            kernels={name.hex(): kernel for name, kernel in self._kernels.items()},
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
            restart=self._restart,
            dead=tuple(self._dead),
            num_killed=self._mischief.num_killed,
            stopped=tuple(self._mischief.stopped.items()),
            helpers=tuple(self._known_helpers),
        )

    def _drain(self, router: zmq.Socket[bytes], take: Any) -> None:
        while router.poll(0):
            take(*router.recv_multipart())

    # wires

    def _serve_wires(self, ready: dict[Any, int]) -> None:
        for place in ready:
            if not isinstance(place, int):
                continue
            if place in self._wiring.listeners:
                with contextlib.suppress(OSError):  # the caller is gone already
                    self._poller.register(self._wiring.accept(place), zmq.POLLIN)
            elif (line := self._wiring.lines.get(place)) is not None:
                self._serve_line(place, line)

    def _serve_line(self, place: int, line: Line) -> None:
        line.wire.flush()
        try:
            messages = line.wire.receive()
            for packed, _raw in messages:
                if line.engine is None:
                    self._attach(line, packed)
                else:
                    self._take_message(line.engine, self._decode_engine(packed))
        except (WireError, msgspec.MsgspecError) as error:
            log.warning("a wire of engine %s is closed: %s", line.engine, error)
            line.wire.close()
        if line.wire.is_closed:
            self._drop_line(place, line)

    def _attach(self, line: Line, packed: memoryview) -> None:
        engine = self._wiring.greet(line, self._decode_engine(packed))
        for place, old in list(self._wiring.lines.items()):
            if old is not line and old.engine == engine:
                self._poller.unregister(place)
                self._wiring.drop(place)
        if self._run is not None:
            self._run.attach(engine, line.wire)

    def _drop_line(self, place: int, line: Line) -> None:
        """A connection that closes is how a death is seen first."""
        self._poller.unregister(place)
        self._wiring.drop(place)
        is_at_work = self._run is not None and self._run.is_active
        if line.engine in self._engines and not line.is_retired and is_at_work:
            self._lose(line.engine, "died")

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

    def _take_from_engine(self, identity: bytes, header: bytes, *_frames: bytes) -> None:
        try:
            message = self._decode_engine(header)
        except msgspec.MsgspecError as error:
            log.warning("a message from %r was refused: %s", identity, error)
            return
        if isinstance(message, Join):
            self._join(message, identity)
            return
        if isinstance(message, Beat):
            self._hear(message)
            return
        engine = next((e for e in self._engines.values() if e.identity == identity), None)
        if engine is None:
            log.warning("%s from an engine that was given up: %r", type(message).__name__, identity)
            return
        self._take_message(engine.facts.engine, message)

    def _take_message(self, number: int, message: EngineMessage) -> None:
        engine = self._engines.get(number)
        if engine is None or isinstance(message, Join | Attach | Beat):
            return
        engine.messages_in += 1
        if self._run is not None and self._run.spec.id == message.run:
            self._run.take(number, message)

    def _join(self, join: Join, identity: bytes) -> None:
        facts, number = join.facts, join.facts.engine
        known = self._engines.get(number)
        if known is not None and known.facts.process == facts.process and known.num_wires == join.num_wires:
            return  # it asked by itself, and was asked to
        others = [engine for other, engine in self._engines.items() if other != number]
        is_back = self._returning.pop(number, None) is not None
        is_spare = number in self._spares if is_back else becomes_spare(others, wanted=self._wanted_spares)
        self._engines[number] = _Engine(facts, identity, num_wires=join.num_wires, is_spare=is_spare)
        self._dead.discard(number)  # it had only lost its connection, or stood still
        self._hearts.begin(number, time.monotonic())
        self._send_to_engine(number, Welcome())
        self._is_file_old = self._is_memo_old = True
        if self._run is not None and self._run.is_active:
            if is_spare:
                self._run.rest_engine(number)
            self._run.add_engine(facts)
        if is_back and number in self._leaving:
            self._let_leave([number])

    def _lose(self, engine: int, reason: str) -> None:
        lost = self._engines.pop(engine, None)
        self._hearts.drop(engine)
        self._is_file_old = self._is_memo_old = True
        if lost is not None:
            self._dead.add(engine)
            if not lost.is_spare and not lost.is_retiring:
                self._wake_spare()  # first: so it has its part of the lost shards
        if self._run is not None:
            self._run.lose_engine(engine, reason)

    def _miss(self, number: int) -> None:
        """An engine of the hub before will not come back."""
        del self._returning[number]
        self._dead.add(number)
        if number not in self._spares and not self._wake_spare():
            self._spares = frozenset(sorted(self._spares)[1:])  # one who is still to come does not rest
        if self._run is not None:
            self._run.lose_engine(number, "died")

    # those who leave, and spares

    def _retire(self, request: Retire) -> None:
        run = self._run if self._run is not None and self._run.is_active else None
        name = None if run is None else run.spec.name
        leaving = check_retirement(request.engines, self._engines, active_run=name, force=request.force)
        self._let_leave(leaving)

    def _let_leave(self, leaving: Iterable[int]) -> None:
        run = self._run if self._run is not None and self._run.is_active else None
        for number in leaving:
            self._engines[number].is_retiring = self._is_memo_old = True
        if lacks_workers(self._engines):
            self._wake_spare()
        for number in leaving:
            if run is not None:
                run.retire_engine(number)
            else:
                self._release(number)

    def _release(self, number: int) -> None:
        """An engine that was asked to leave owes nothing any more: it ends."""
        self._send_to_engine(number, Exit())
        engine = self._engines.pop(number, None)
        if engine is not None:
            self._leavers[engine.facts.process] = time.monotonic() + LEAVE_SECONDS
            self._known_helpers.add(engine.facts.process)  # it belongs to the pool until it is gone
            self._is_file_old = self._is_memo_old = True

    def _condemn(self, number: int) -> None:
        """An engine that stands still holds others up: it is killed, or cut off where that cannot be."""
        engine = self._engines.get(number)
        if engine is not None and not signal_process(engine.facts.process, signal.SIGKILL):
            self._lose(number, "was cut off")

    def _watch_leavers(self) -> None:
        if self._run is None or not self._run.is_active:
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
        if self._run is not None:
            self._run.wake_engine(number)
        return True

    def _harm(self, request: Chaos) -> None:
        check_known([request.engine], self._engines)
        told = self._mischief.act(request, self._engines[request.engine].facts)
        self._is_memo_old = True
        if self._run is not None:
            self._run.tell("chaos", told, request.engine)

    def _members(self) -> Members:
        staying = {number: engine for number, engine in sorted(self._engines.items()) if not engine.is_retiring}
        return Members(
            workers=tuple(number for number, engine in staying.items() if not engine.is_spare),
            spares=tuple(number for number, engine in staying.items() if engine.is_spare),
            leaving=tuple(number for number in sorted(self._engines) if number not in staying),
            wanted_spares=self._wanted_spares,
            num_died=len(self._dead),
            num_killed=self._mischief.num_killed,
            restart=self._restart,
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

    def _answer(self, identity: bytes, number: bytes, header: bytes, *frames: bytes) -> None:
        try:
            request = self._decode_request(header)
            self._check_steering(identity, request)
            reply, out = self._serve_request(identity, request, frames)
            self._write_memos()  # what was answered stays done, whatever becomes of this hub
        except (DnbError, OSError, msgspec.MsgspecError) as error:
            kind = type(error).__name__ if isinstance(error, DnbError) else HubError.__name__
            reply, out = Refused(error=kind, message=str(error)), []
        except Exception as error:
            log.exception("a request failed")
            reply, out = Refused(error="RunError", message=f"{type(error).__name__}: {error}"), []
        try:
            self._client_socket.send_multipart([identity, number, *encode(reply, out)], copy=False)
        except zmq.ZMQError as error:
            log.warning("a client left before its answer: %s", error)

    def _check_steering(self, identity: bytes, request: Request) -> None:
        """Any number of kernels may look on, one may steer."""
        if isinstance(request, Hello | GetPool | GetMembers | GetRun | GetState | GetCheckpoint):
            return
        caller, owner = self._kernels.get(identity), self._owner
        if owner is None or is_same(caller, owner):
            return
        if is_alive(owner):
            raise ArgumentError(
                f"the kernel with pid {owner.pid} on {owner.host} steers this pool, this one only watches: "
                "dnb.attach(steer=True) or %dtrain attach --steer takes over"
            )
        self._is_memo_old = True
        self._owner = caller or owner  # who looked on until now has its hand on the wheel

    def _greet(self, identity: bytes, hello: Hello) -> None:
        owner = self._owner
        self._kernels[identity] = hello.owner
        self._is_memo_old = True
        if hello.wish == "watch":
            return
        if hello.wish == "steer" and owner is not None and not is_same(owner, hello.owner) and is_alive(owner):
            raise ArgumentError(f"the kernel with pid {owner.pid} on {owner.host} steers this pool")
        self._owner = hello.owner
        self._orphaned = None
        self._write_pool_file()

    def _serve_request(  # noqa: C901 - the table of requests, in one place
        self, identity: bytes, request: Request, frames: Sequence[bytes]
    ) -> tuple[Message, Sequence[Any]]:
        match request:
            case Hello():
                self._greet(identity, request)
            case GetPool():
                return PoolState(facts=self._facts(), engines=self._statuses()), []
            case GetMembers():
                return self._members(), []
            case Retire():
                self._retire(request)
            case KeepSpares(number=number):
                self._wanted_spares = number
                self._is_memo_old = True
            case KeepRestart(policy=policy):
                self._restart = policy
                self._is_memo_old = True
            case Chaos():
                self._harm(request)
            case KillHub():
                self._is_doomed = True
                if self._run is not None:
                    self._run.tell("chaos", "the hub is killed on purpose")
            case Submit():
                self._submit(frames)
            case GetRun(run=name):
                return self._named(name).state(request, heartbeats=self._hearts.ages(time.monotonic()))
            case Control(run=name, verb=verb):
                self._control(name, verb)
            case SetOptions(run=name, options=options):
                self._active(name, "set").set(options)
                self._is_run_memo_old = True
            case Mend(run=name):
                self._mend(name, frames)
            case GetState(run=name, optimizer=optimizer):
                return _state_of(self._named(name), optimizer=optimizer)
            case TakeCheckpoint() | GetCheckpoint():
                return self._serve_checkpoint(request), []
            case Shutdown():
                self.end("asked to")
        return Done(), []

    def _serve_checkpoint(self, request: TakeCheckpoint | GetCheckpoint) -> CheckpointState:
        run = self._named(request.run)
        if isinstance(request, GetCheckpoint):
            return run.checkpoint_state(request.ticket)
        return run.take_checkpoint(None if request.path is None else Path(request.path))

    def _named(self, name: str) -> ActiveRun:
        if self._run is None or self._run.spec.name != name:
            raise HubError(f"the hub does not hold a run {name!r}: %dtrain status says which it holds")
        return self._run

    def _active(self, name: str, verb: str) -> ActiveRun:
        run = self._named(name)
        if not run.is_active:
            raise ArgumentError(f"run {name!r} is {run.status}: there is nothing to {verb}")
        return run

    def _mend(self, name: str, frames: Sequence[bytes]) -> None:
        from dnb.transport.parcels import verify

        pickled, signature = frames
        verify(self._config.key.encode(), [pickled], signature)
        run = self._active(name, "mend")
        if run.status != "paused":
            raise ArgumentError(f"run {name!r} is {run.status}, not paused: pause it before it gets other functions")
        run.mend(pickled, signature)
        self._is_run_memo_old = True

    def _control(self, name: str, verb: Literal["pause", "resume", "stop"]) -> None:
        run = self._named(name)
        if verb == "pause" and run.status != "running":
            raise ArgumentError(f"run {name!r} is {run.status}, not running: there is nothing to pause")
        if verb == "resume" and run.status != "paused":
            raise ArgumentError(f"run {name!r} is {run.status}, not paused: there is nothing to resume")
        run.ask(verb)

    def _submit(self, frames: Sequence[bytes]) -> None:
        if len(frames) != 4:
            raise HubError(f"a run comes in 4 frames, not {len(frames)}")
        spec = self._verified_spec(frames)
        if self._run is not None:
            if self._run.is_active:
                raise ArgumentError(_still_active(self._run))
            self._run.close()
            self._run = None
            self._forget_run_memos()
        self._run = self._open_run(frames, spec)
        for number, engine in self._engines.items():
            if engine.is_spare:
                self._run.rest_engine(number)
        self._is_run_memo_old = True
        self._write_pool_file()
        self._run.start()
        for number in sorted(self._hearts.silent):
            self._run.silence_engine(number, "is silent")

    def _verified_spec(self, frames: Sequence[bytes]) -> RunSpec:
        from dnb.transport.parcels import verify

        spec_bytes, job_bytes, data_bytes, signature = frames
        verify(self._config.key.encode(), [spec_bytes, job_bytes, data_bytes], signature)
        return msgspec.msgpack.decode(spec_bytes, type=RunSpec)

    def _open_run(self, frames: Sequence[bytes], spec: RunSpec, memo: RunMemo | None = None) -> ActiveRun:
        """A new run, or the one of the hub before."""
        from dnb.hub.active_run import ActiveRun
        from dnb.hub.beginnings import begin, take_over
        from dnb.transport.parcels import unpack

        sys.path.extend(path for path in spec.sys_path if path not in sys.path)
        make_job = partial(unpack, frames[1], spec.job)
        if memo is None:
            beginning = begin(spec, make_job(), folders=self._folders)
        else:
            spec = msgspec.structs.replace(spec, clip_norm=memo.clip_norm)
            beginning = take_over(spec, memo, make_job, folders=self._folders)
        engines = self._returning.values() if memo else [engine.facts for engine in self._engines.values()]
        accounts = read_memo(self._folders, ACCOUNTS_FILE, AccountsMemo) if memo else None
        return ActiveRun(
            spec,
            frames,
            beginning,
            engines=engines,
            send=self._send_to_engine,
            offer_wire=self._wiring.offer,
            release=self._release,
            condemn=self._condemn,
            life=self._life,
            departed=() if accounts is None else accounts.departed,
        )

    # lives

    def _tick(self) -> None:
        if os.getppid() != self._guardian.pid:
            self.end("the guardian is gone")
        for place in self._wiring.silent():
            self._drop_line(place, self._wiring.lines[place])
        self._look_at_engines()
        if self._run is not None:
            self._run.tick()
        has_advanced = self._run is not None and self._run.has_advanced
        if not self._is_of_use and (has_advanced or time.monotonic() - self._began > USEFUL_SECONDS):
            self._is_of_use = True
            self._be_of_use()
        if self._is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        self._mischief.look()
        self._watch_leavers()
        if self._is_file_old:
            self._write_pool_file()
        self._watch_owner()

    def _look_at_engines(self) -> None:
        for number in self._hearts.tick(time.monotonic()):
            self._tell_silent(number, f"was not heard for {SILENT_SECONDS:g} s")
        for number, facts in list(self._returning.items()):
            if look_at(facts.process) == "gone":
                self._miss(number)
        for number, engine in list(self._engines.items()):
            state = look_at(engine.facts.process)
            if state == "gone":
                self._lose(number, "died")
            elif state == "stopped" and self._hearts.declare_silent(number):
                self._tell_silent(number, "was stopped")

    def _tell_silent(self, engine: int, reason: str) -> None:
        if self._run is not None:
            self._run.silence_engine(engine, reason)

    def _hear(self, beat: Beat) -> None:
        engine = self._engines.get(beat.engine)
        if engine is None:
            self._ask_back(beat)
            return
        if engine.facts.process != beat.process:
            return
        # The last beat before a signal may come after the tick that saw the engine stopped.
        if beat.engine in self._hearts.silent and look_at(beat.process) == "stopped":
            return
        if self._hearts.beat(beat.engine, time.monotonic()) and self._run is not None:
            self._run.hear_engine(beat.engine)

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

    def _watch_owner(self) -> None:
        """The pool ends with its kernel, unless a run is advancing, or was and may still be asked for."""
        if self._owner is None or is_alive(self._owner):
            return
        if self._run is None or (self._orphaned is None and not self._run.is_active):
            self.end("its kernel is gone")
        elif self._run.status in ("starting", "running") or self._orphaned is None:
            self._orphaned = time.monotonic()
        elif time.monotonic() - self._orphaned > self._run.spec.linger_seconds:
            self.end("its kernel is gone, and nobody attached")

    def _statuses(self) -> tuple[EngineStatus, ...]:
        busy = self._run.working if self._run is not None else frozenset()
        sent = self._wiring.num_records_out()
        return tuple(
            _status(
                engine,
                is_busy=number in busy,
                is_silent=number in self._hearts.silent,
                num_on_wires=sent.get(number, 0),
            )
            for number, engine in sorted(self._engines.items())
        )

    def _facts(self, *, look: bool = True) -> PoolFacts:
        run = self._run
        return PoolFacts(
            cluster_id=self._config.cluster_id,
            guardian=self._guardian,
            hub=self._process,
            controller=self._config.controller,
            helpers=self._helpers(look=look),
            engines=tuple(engine.facts for engine in self._engines.values()),
            owner=self._owner,
            run=None if run is None else run.spec.name,
            run_status=None if run is None else run.status,
        )

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

    def _write_pool_file(self) -> None:
        self._is_file_old = False
        # Looking for children goes over all processes of the host, 13 ms were seen: no step waits for that. The nanny
        # of an engine that has just joined ends with its engine.
        is_training = self._run is not None and self._run.is_active
        write_pool_file(Path(self._config.security_dir), self._facts(look=not is_training))
        self._is_memo_old = True
        self._write_memos()

    def _end_pool(self) -> None:
        """End every process of the pool and remove what it left; the controller goes last."""
        log.info("the pool ends: %s", self._ending or "an error in the hub")
        if self._run is not None and self._run.is_active:
            self._run.ask("stop")
        self._mischief.close()
        for number in list(self._engines):
            self._send_to_engine(number, Exit())
        helpers = self._helpers()
        engines = [engine.facts.process for engine in self._engines.values()]
        end_processes(engines, patience_seconds=EXIT_SECONDS)
        if self._run is not None:
            self._run.close()
        self._wiring.close()
        self._authenticator.stop()
        self._engine_socket.close()
        self._client_socket.close()
        self._context.term()
        remove_pool_folders(self._config.cluster_id)
        end_processes([self._config.controller], patience_seconds=EXIT_SECONDS, first_signal=signal.SIGTERM)
        end_processes(helpers, patience_seconds=HELPER_EXIT_SECONDS)
        remove_pool_files(self._config)


def _state_of(run: ActiveRun, *, optimizer: bool) -> tuple[Message, Sequence[Any]]:
    from dnb.transport.states import encode_state

    state: dict[str, Any] = {
        "parameters": dict(run.master.model.named_parameters()),
        "buffers": dict(run.master.model.named_buffers()),
    }
    if optimizer:
        state["optimizer"] = run.master.optimizer.state_dict()
    return encode_state(state)


def _still_active(run: ActiveRun) -> str:
    return (
        f"run {run.spec.name!r} is {run.status}: wait for it with %dtrain wait, or end it with %dtrain stop, "
        "before the next fit"
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
