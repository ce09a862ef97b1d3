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
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import psutil
import zmq

from dnb.errors import ArgumentError, DnbError, HubError, PoolError, RunError
from dnb.hub.causes import describe_exit, is_crash
from dnb.hub.chaos import Mischief
from dnb.hub.crashes import Caution, Crash, Recorder, caution_after, restarts_of
from dnb.hub.events import EngineLost
from dnb.hub.exits import ExitReader
from dnb.hub.hearts import SILENT_SECONDS, Hearts
from dnb.hub.log_limits import look_at_logs
from dnb.hub.memo import (
    ACCOUNTS_FILE,
    LOST_FILE,
    POOL_FILE,
    RUN_FILE,
    AccountsMemo,
    PoolMemo,
    RunMemo,
    read_memo,
    remove_memo,
    write_memo,
)
from dnb.hub.peers import PeerError, check_engine, check_process, check_request, decode_peer, shortened
from dnb.hub.pool_files import remove_pool_files, write_pool_file
from dnb.hub.roster import Standing, becomes_spare, check_known, check_retirement, choose_successor, lacks_workers
from dnb.hub.user_code import UserCodeError, user_code
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
    Failure,
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
    RunSpec,
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
from dnb.transport.failures import TRACEBACK_LENGTH, clean_text, describe_error
from dnb.transport.lives import (
    Activity,
    activity_of,
    children_of,
    end_processes,
    is_alive,
    is_here,
    is_same,
    look_at,
    signal_process,
    this_process,
)
from dnb.transport.segments import named_folders, remove_folders
from dnb.transport.wires import WireError
from dnb.versions import POOL_FORMAT, VERSION, name_dnb, name_this_dnb

if TYPE_CHECKING:  # torch takes seconds to import: the sockets are bound first, see `main`
    from dnb.hub.active_run import ActiveRun
    from dnb.hub.lost_run import LostRun
    from dnb.transport.process_settings import AppliedSettings

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
        self._owner = config.owner
        self._orphaned: float | None = None  # since when nobody steers a pool whose run does not advance
        self._engines: dict[int, _Engine] = {}
        self._kernels: dict[bytes, Process] = {}  # by the identity of their sockets
        self._kernel_versions: dict[bytes, str] = {}  # likewise, for errors
        self._hearts = Hearts(look=self._look_at_work)
        self._wiring = Wiring(config.host)
        self._poller = zmq.Poller()
        self._is_listening = False
        self._known_helpers: set[Process] = set()
        self._run: ActiveRun | None = None
        self._settings: AppliedSettings | None = None  # of the notebook, for that run
        self._was_at_work = False
        self._wanted_spares = 0
        self._restart: Literal["never", "always"] = "never"  # kept for the kernel that steers
        self._dead: set[int] = set()
        self._exits = exits or ExitReader(None)
        self._killed: set[Process] = set()  # on purpose
        self._num_threads = 0  # of the engine that joined last
        self._num_owed = 0  # engines that a run's work has ended, and that nobody has replaced yet
        self._leavers: dict[Process, float] = {}  # told to end; when they are killed
        self._is_file_old = False  # the pool's record on disk
        self._is_memo_old = self._is_run_memo_old = False  # what the next hub will find
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
        self._lost_run: LostRun | None = None  # that hubs have died of
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
        self._recorder.end_as_meant()
        self._end_pool()

    # what the hub before has left

    def _take_over(self, crashes: Sequence[Crash]) -> None:
        memo = read_memo(self._folders, POOL_FILE, PoolMemo)
        if memo is not None:
            self._owner = memo.owner
            self._kernels = {bytes.fromhex(name): kernel for name, kernel in memo.kernels.items()}
            self._kernel_versions = {bytes.fromhex(name): told for name, told in memo.kernel_versions.items()}
            self._returning = {facts.engine: facts for facts in memo.engines}
            self._spares = frozenset(memo.spares)
            self._leaving = frozenset(memo.leaving)
            self._wanted_spares = memo.wanted_spares
            self._restart = memo.restart
            self._dead = set(memo.dead)
            self._num_owed = memo.num_owed
            self._mischief.num_killed = memo.num_killed
            self._mischief.stopped = dict(memo.stopped)
            self._known_helpers = set(memo.helpers)
        self._is_file_old = True
        run = read_memo(self._folders, RUN_FILE, RunMemo)
        if run is not None:
            self._take_over_run(run, crashes)
        else:
            from dnb.hub.lost_run import LostRun

            self._lost_run = read_memo(self._folders, LOST_FILE, LostRun)

    def _take_over_run(self, memo: RunMemo, crashes: Sequence[Crash]) -> None:
        """Go on with the run, unless hubs have died of it: then it has failed.

        An exception ends this hub, too, and the next one tries again: in the end that makes it cautious.
        """
        try:
            spec = self._verified_spec(memo.frames)
        except (DnbError, ValueError, msgspec.MsgspecError):
            log.exception("what is left of the run is of no use")
            self._forget_run_memos()
            return
        self._recorder.hold(spec.id, step=crashes[-1].step if crashes else 0)
        caution = caution_after(crashes)
        if caution is Caution.NONE:
            self._resume_run(memo, spec, reason=crashes[-1].reason if crashes else "")
            return
        error, told = _verdict(crashes), crashes[-1].traceback
        if caution is Caution.FAIL:
            try:
                self._resume_run(memo, spec, failure=Failure(kind="HubError", message=error, traceback=told))
                return
            except Exception:  # whatever it is: without the run, the pool can still be used
                log.exception("the run cannot be taken over")
        from dnb.hub.lost_run import lose

        self._run = None
        self._lost_run = lose(spec, error=error, remote_traceback=told, folders=self._folders)
        self._forget_run_memos()
        write_memo(self._folders, LOST_FILE, self._lost_run)

    def _resume_run(self, memo: RunMemo, spec: RunSpec, *, reason: str = "", failure: Failure | None = None) -> None:
        self._run = self._open_run(memo.frames, spec, memo, reason=reason, failure=failure)
        self._is_memo_old = self._is_run_memo_old = True  # its journal may be another one
        self._recorder.hold(spec.id, step=self._run.step)
        self._note_work()
        self._run.start()

    def _forget_run_memos(self) -> None:
        for name in (RUN_FILE, ACCOUNTS_FILE, LOST_FILE):
            remove_memo(self._folders, name)

    def _write_memos(self) -> None:
        if self._is_memo_old:
            self._is_memo_old = not write_memo(self._folders, POOL_FILE, self._memo)
            if self._run is not None:
                write_memo(self._folders, ACCOUNTS_FILE, AccountsMemo(departed=self._run.departed))
        if self._is_run_memo_old and self._run is not None:
            self._is_run_memo_old = not write_memo(self._folders, RUN_FILE, self._run.memo)

    @property
    def _memo(self) -> PoolMemo:
        engines = [*self._returning.values(), *(engine.facts for engine in self._engines.values())]
        return PoolMemo(
            owner=self._owner,
            kernels={name.hex(): kernel for name, kernel in self._kernels.items()},
            kernel_versions={name.hex(): told for name, told in self._kernel_versions.items()},
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
        if self._run is not None:
            self._run.attach(engine, line.wire)

    def _drop_line(self, place: int, line: Line, *, reason: str = "") -> None:
        """A connection that closes is how a death is seen first."""
        self._poller.unregister(place)
        self._wiring.drop(place)
        is_at_work = self._run is not None and self._run.is_active
        if line.engine in self._engines and not line.is_retired and is_at_work:
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
        if self._run is not None and self._run.spec.id == message.run:
            self._run.take(number, message, raw)

    def _join(self, join: Join, identity: bytes) -> None:
        facts, number = join.facts, join.facts.engine
        if join.format != POOL_FORMAT:  # the engine has told its kernel so
            log.warning("engine %d is %s: it is not let in", number, name_dnb(join.version, join.format))
            return
        known = self._engines.get(number)
        if known is not None and known.facts.process == facts.process and known.num_wires == join.num_wires:
            return  # it asked by itself, and was asked to
        if known is not None and self._run is not None and self._run.is_active:
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
        if self._run is not None and self._run.is_active:
            if is_spare:
                self._run.rest_engine(number)
            self._run.add_engine(facts)
        if is_back and number in self._leaving:
            self._let_leave([number])

    def _lose(self, engine: int, reason: str = "") -> None:
        """An engine is gone; whoever is gone with it, and not noticed yet, gets nothing of what it had."""
        others = [(n, e.facts.process) for n, e in self._engines.items() if n != engine]
        gone_too = self._exits.ending(others) if engine in self._engines else []
        if self._run is not None:
            for number in gone_too:
                self._run.expect_loss(number)
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
        if self._run is not None:
            self._run.lose_engine(self._loss(engine, lost, reason))

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
        if self._run is not None:
            self._run.lose_engine(EngineLost(number, "died"))

    # those who leave, and spares

    def _retire(self, request: Retire) -> None:
        run = self._run if self._run is not None and self._run.is_active else None
        name = None if run is None else run.spec.name
        coming = {
            number: _Coming(is_spare=number in self._spares, is_retiring=number in self._leaving)
            for number in self._returning
        }
        known: dict[int, Standing] = {**coming, **self._engines}
        leaving = check_retirement(request.engines, known, active_run=name, force=request.force)
        self._leaving |= coming.keys() & set(leaving)  # as soon as they are back
        self._is_memo_old = True
        self._let_leave(number for number in leaving if number in self._engines)

    def _let_leave(self, leaving: Iterable[int]) -> None:
        leaving = list(leaving)
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
        if request.verb == "kill":
            self._killed.add(self._engines[request.engine].facts.process)
        self._is_memo_old = True
        if self._run is not None:
            self._run.tell("chaos", told, request.engine)

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
            restart=self._restart,
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
            self._check_steering(identity, request)
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
            kernel = self._kernel_versions.get(identity, "a kernel of another version")
            raise refuse_unreadable(header, error.__cause__ or error, kernel=kernel) from error
        return request

    def _check_steering(self, identity: bytes, request: Request) -> None:
        """Any number of kernels may look on, one may steer."""
        if isinstance(request, Hello | GetPool | GetMembers | GetRun | GetState | GetGradients | GetCheckpoint):
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
        kernel = name_dnb(hello.version, hello.format)
        if hello.format != POOL_FORMAT:
            raise PoolError(
                f"the pool's hub is {name_this_dnb()}, and this kernel {kernel}: attach with the hub's version of dnb, "
                "or end the pool with it and %dtrain start one of this version"
            )
        self._kernel_versions[identity] = f"this kernel, {kernel}"
        owner = self._owner
        self._kernels[identity] = hello.owner
        self._is_memo_old = True
        if hello.wish == "watch":
            return
        if hello.wish == "steer" and owner is not None and not is_same(owner, hello.owner) and is_alive(owner):
            raise ArgumentError(f"the kernel with pid {owner.pid} on {owner.host} steers this pool")
        self._owner = hello.owner
        self._orphaned = None
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
                return _read(self._pool_state), []
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
            case GetRun():
                return self._run_state(request)
            case Control(run=name, verb=verb):
                self._control(name, verb)
            case SetOptions(run=name, options=options):
                self._active(name, "set").set(options)
                self._is_run_memo_old = True
            case Mend(run=name):
                self._mend(name, frames)
            case GetState(run=name):
                return _read(partial(_state_of, self._named(name), request))
            case GetGradients(run=name):
                return _read(self._named(name).gradients)
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

    def _run_state(self, request: GetRun) -> tuple[Message, Sequence[Any]]:
        if self._lost_run is not None and self._lost_run.spec.name == request.run:
            return _read(partial(self._lost_run.state, request))
        run = self._named(request.run)
        run.catch_up()
        heartbeats = self._hearts.ages(time.monotonic())
        return _read(partial(run.state, request, heartbeats=heartbeats, num_owed=self._num_owed))

    def _named(self, name: str) -> ActiveRun:
        if self._lost_run is not None and self._lost_run.spec.name == name:
            raise HubError(f"run {name!r} is {self._lost_run.status}: {self._lost_run.error}")
        if self._run is None or self._run.spec.name != name:
            raise HubError(f"the hub does not hold a run {name!r}: %dtrain status says which it holds")
        return self._run

    def _active(self, name: str, verb: str) -> ActiveRun:
        run = self._named(name)
        if not run.is_active:
            raise ArgumentError(f"run {name!r} is {_standing(run)}: there is nothing to {verb}")
        return run

    def _mend(self, name: str, frames: Sequence[bytes]) -> None:
        from dnb.transport.parcels import verify

        if len(frames) != 2:
            raise HubError(f"what is mended comes in 2 frames, not {len(frames)}")
        pickled, signature = frames
        verify(self._config.key.encode(), [pickled], signature)
        run = self._active(name, "mend")
        if run.status != "paused":
            raise ArgumentError(f"run {name!r} is {run.status}, not paused: pause it before it gets other functions")
        run.mend(pickled, signature)
        self._is_run_memo_old = True

    def _control(self, name: str, verb: Literal["pause", "resume", "stop"]) -> None:
        run = self._named(name)
        if verb == "pause" and _standing(run) != "running":
            raise ArgumentError(f"run {name!r} is {_standing(run)}, not running: there is nothing to pause")
        if verb == "resume" and run.status != "paused":
            raise ArgumentError(f"run {name!r} is {_standing(run)}, not paused: there is nothing to resume")
        run.ask(verb)

    def _submit(self, frames: Sequence[bytes]) -> None:
        if len(frames) != 4:
            raise HubError(f"a run comes in 4 frames, not {len(frames)}")
        spec = self._verified_spec(frames)
        if spec.id in (held.spec.id for held in (self._run, self._lost_run) if held is not None):
            return  # the hub before has taken it, and died before it said so
        if self._run is not None:
            if not self._run.is_over:
                raise ArgumentError(_still_active(self._run))
            self._run.close()
            self._run = None
        self._lost_run = None
        self._forget_run_memos()
        self._run = self._open_new_run(frames, spec)
        for number, engine in self._engines.items():
            if engine.is_spare:
                self._run.rest_engine(number)
        self._is_run_memo_old = True
        self._recorder.hold(spec.id, step=0)
        self._note_work()
        self._write_pool_file()
        self._run.start()
        for number in sorted(self._hearts.silent):
            self._tell_silent(number, "is silent")
        for number in sorted(self._hearts.busy):
            self._tell_busy(number)

    def _open_new_run(self, frames: Sequence[bytes], spec: RunSpec) -> ActiveRun:
        """Unpickle it and make its master copy: whatever the user's code raises, the pool has no run then.

        Raises:
            RunError: with what was raised, and its traceback.
        """
        try:
            return self._open_run(frames, spec)
        except OSError as error:
            raise HubError(str(error)) from error
        except UserCodeError as error:
            if isinstance(error.error, DnbError):
                raise error.error from error
            failure = error.failure
            raise RunError(
                f"{failure.kind}: {failure.message} ({failure.place})", remote_traceback=failure.traceback
            ) from error

    def _verified_spec(self, frames: Sequence[bytes]) -> RunSpec:
        from dnb.transport.parcels import verify

        spec_bytes, job_bytes, data_bytes, signature = frames
        verify(self._config.key.encode(), [spec_bytes, job_bytes, data_bytes], signature)
        return msgspec.msgpack.decode(spec_bytes, type=RunSpec)

    def _open_run(
        self,
        frames: Sequence[bytes],
        spec: RunSpec,
        memo: RunMemo | None = None,
        *,
        reason: str = "",
        failure: Failure | None = None,
    ) -> ActiveRun:
        """A new run, or the one of the hub before, which `reason` has ended; it may have failed by that."""
        from dnb.hub.active_run import ActiveRun
        from dnb.hub.beginnings import begin, take_over
        from dnb.transport.parcels import adopt
        from dnb.transport.process_settings import AppliedSettings

        if self._settings is not None:  # of the run before
            self._settings.take_back()
        # The user's files and warnings are the engines' business.
        self._settings = AppliedSettings(spec.settings, everything=False)
        sys.path.extend(path for path in spec.sys_path if path not in sys.path)

        def make_job() -> Any:
            with user_code("where the run's objects are unpickled"):
                return adopt(frames[1], spec.job)[0]

        if memo is None:
            beginning = begin(spec, make_job(), folders=self._folders)
        else:
            spec = msgspec.structs.replace(spec, clip_norm=memo.clip_norm)
            beginning = take_over(spec, memo, make_job, folders=self._folders, reason=reason, failure=failure)
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
            replace=self._replace,
            life=self._life,
            departed=() if accounts is None else accounts.departed,
            count_commit=self._recorder.count_commit,
        )

    # lives

    def _tick(self) -> None:
        if os.getppid() != self._guardian.pid:
            self.end("the guardian is gone")
        self._wiring.refill()
        self._listen(True)
        for place in self._wiring.silent():
            self._drop_line(place, self._wiring.lines[place])
        self._look_at_engines()
        if self._run is not None:
            self._run.tick()
        self._note_work()
        if self._is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        self._mischief.look()
        self._watch_leavers()
        self._write_what_is_old()
        self._watch_owner()
        look_at_logs()

    def _note_work(self) -> None:
        """Let whoever asks why this hub has ended know what it was about."""
        run = self._run
        is_at_work = run is not None and run.status in ("starting", "running")
        if is_at_work != self._was_at_work:
            self._was_at_work = is_at_work
            self._recorder.set_at_work(is_at_work)
        if run is not None and run.has_advanced:
            self._recorder.be_of_use()

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
        if self._run is not None:
            self._run.silence_engine(engine, reason, is_asleep=is_asleep)

    def _tell_busy(self, engine: int) -> None:
        if self._run is not None:
            self._run.miss_engine(engine)

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
        if self._run is None or (self._orphaned is None and self._run.is_over):
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
                is_busy=number in busy or number in self._hearts.busy,
                is_silent=number in self._hearts.silent,
                num_on_wires=sent.get(number, 0),
            )
            for number, engine in sorted(self._engines.items())
        )

    def _facts(self, *, look: bool = True) -> PoolFacts:
        run, lost = self._run, self._lost_run
        name = run.spec.name if run is not None else lost.spec.name if lost is not None else None
        status = run.status if run is not None else lost.status if lost is not None else None
        return PoolFacts(
            cluster_id=self._config.cluster_id,
            guardian=self._guardian,
            hub=self._process,
            controller=self._config.controller,
            helpers=self._helpers(look=look),
            engines=tuple(engine.facts for engine in self._engines.values()),
            owner=self._owner,
            run=name,
            run_status=status,
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
        elif (self._is_memo_old or self._is_run_memo_old) and now >= self._keep_again:
            self._keep_again = now + WRITE_AGAIN_SECONDS
            self._write_memos()

    def _write_pool_file(self) -> None:
        # Looking for children goes over all processes of the host, 13 ms were seen: no step waits for that. The nanny
        # of an engine that has just joined ends with its engine.
        is_training = self._run is not None and self._run.is_active
        try:
            write_pool_file(Path(self._config.security_dir), self._facts(look=not is_training))
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
            self._stop_run,
            lambda: helpers.extend(self._helpers()),  # while those live whose children they are
            self._mischief.close,
            self._dismiss_engines,
            partial(end_processes, engines, patience_seconds=EXIT_SECONDS),
            self._close_run,
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

    def _stop_run(self) -> None:
        if self._run is not None and self._run.is_active:
            self._run.ask("stop")

    def _dismiss_engines(self) -> None:
        for number in list(self._engines):
            self._send_to_engine(number, Exit())

    def _close_run(self) -> None:
        if self._run is not None:
            self._run.close()


def _refusal(error: Exception) -> Refused:
    kind = type(error).__name__ if isinstance(error, DnbError) else HubError.__name__
    message = str(error.args[0]) if isinstance(error, RunError) and error.args else str(error)
    return Refused(
        error=kind,
        message=clean_text(message, length=TRACEBACK_LENGTH),
        traceback=clean_text(getattr(error, "remote_traceback", ""), length=TRACEBACK_LENGTH),
    )


def _read(look: Callable[[], T]) -> T:
    """Look at something without changing it: what goes wrong then ends nothing, the user's own code included.

    Raises:
        RunError: with what went wrong.
    """
    try:
        return look()
    except DnbError:
        raise
    except BaseException as error:
        log.exception("a question cannot be answered")
        failure = describe_error(error)
        raise RunError(f"{failure.kind}: {failure.message}", remote_traceback=failure.traceback) from error


def _verdict(crashes: Sequence[Crash]) -> str:
    """Why a run has failed, for people."""
    last = crashes[-1]
    number = sum((crash.cause, crash.step) == (last.cause, last.step) for crash in crashes)
    times = f"{number} times" if number > 1 else "again and again"
    return f"the hub died {times} in step {last.step + 1}, and does not go on with it: {last.reason}"


def _state_of(run: ActiveRun, request: GetState) -> tuple[Message, Sequence[Any]]:
    from dnb.hub.snapshots import state_of
    from dnb.transport.states import encode_state
    from dnb.transport.trees import take_apart

    state: dict[str, Any] = {
        "parameters": dict(run.master.model.named_parameters()),
        "buffers": dict(run.master.model.named_buffers()),
        "loose": run.master.states.as_tensor(),
    }
    if request.optimizer:
        state["optimizer"] = run.master.optimizer.state_dict()
    if request.scheduler:
        facts, tensors, _ = state_of(run.master.scheduler, "scheduler", is_strict=False)
        state["scheduler"] = None if facts is None else {"tree": facts.tree, "tensors": tensors}
    if request.kept:
        tree, tensors = take_apart(run.master.functions.read(), root="kept")
        state["kept"] = {"tree": tree, "tensors": tensors}
    return encode_state(state)


def _standing(run: ActiveRun) -> str:
    """How a run stands, for people."""
    return run.status if run.is_active or run.is_over else "writing its last checkpoint"


def _still_active(run: ActiveRun) -> str:
    return (
        f"run {run.spec.name!r} is {_standing(run)}: wait for it with %dtrain wait, or end it with %dtrain stop, "
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
