"""The lifecycle of engines in their pool: they join, beat, are lost, leave; run and other engines hear of it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import zmq

from dnb.hub.message_checks import PeerError, check_engine, check_process, decode_peer, shortened
from dnb.hub.scheduling.events import EngineLost
from dnb.hub.scheduling.failures import describe_exit, is_crash
from dnb.hub.server.members.engine_exits import ExitReader
from dnb.hub.server.members.fault_injection import FaultInjector
from dnb.hub.server.members.heartbeats import SILENT_SECONDS
from dnb.hub.server.members.membership import Membership, PoolEngine
from dnb.hub.server.run_slot import RunSlot
from dnb.protocol.base import Message
from dnb.protocol.client_messages import InjectFault, Retire
from dnb.protocol.engine_messages import Attach, EngineMessage, Exit, Fault, Heartbeat, Join, Rejoin, Welcome
from dnb.protocol.versions import POOL_FORMAT, name_dnb
from dnb.transport.sockets.channels import encode
from dnb.transport.system.processes import is_alive, is_here, liveness, signal_process

log = logging.getLogger(__name__)

NO_BYTES = memoryview(b"")

decode_engine: Callable[[Any], EngineMessage] = msgspec.msgpack.Decoder(EngineMessage).decode


class EngineLifecycle:
    """Carries out what becomes of engines, and tells the run.

    Args:
        members: the pool's.
        slot: the pool's run.
        router: the socket of the engines.
        withdraw: told of engines whose wires are expected no more.
        exits: how engines have ended.
        generation: how many hubs the pool had before.
    """

    def __init__(
        self,
        members: Membership,
        slot: RunSlot,
        *,
        router: zmq.Socket[bytes],
        withdraw: Callable[[int], None],
        exits: ExitReader,
        generation: int,
    ) -> None:
        self._members = members
        self._slot = slot
        self._router = router
        self._withdraw = withdraw
        self._exits = exits
        self._generation = generation
        self.injector = FaultInjector(self.send)

    # what engines say

    def take_frames(self, parts: list[bytes]) -> None:
        """Take what has come by the engines' socket; what makes no sense is refused."""
        identity, *rest = parts
        try:
            message = decode_peer(decode_engine, rest[0] if rest else b"")
            if isinstance(message, Join):
                check_engine(message.facts)
                self._join(message, identity)
            elif isinstance(message, Heartbeat):
                check_process(message.process)
                self._hear(message)
            else:
                self._take_from_known(identity, message)
        except PeerError as error:
            log.warning("a message from %r was refused: %s", identity, error)

    def _take_from_known(self, identity: bytes, message: EngineMessage) -> None:
        number = self._members.find(identity)
        if number is None:
            log.warning("%s from an engine that was given up: %r", type(message).__name__, identity)
            return
        self.take_message(number, message)

    def take_message(self, number: int, message: EngineMessage, raw: memoryview = NO_BYTES) -> None:
        """Take what an engine that has joined says of its work.

        Raises:
            PeerError: it makes no sense; nothing has changed.
        """
        engine = self._members.engines.get(number)
        if engine is None or isinstance(message, Join | Attach | Heartbeat):
            return
        if isinstance(message, Fault):
            failure = shortened(message.failure)
            reason = f"ended of an error of dnb itself: {failure.kind}: {failure.message}"
            log.error("engine %d %s\n%s", number, reason, failure.traceback)
            self.lose(number, reason)
            return
        engine.messages_in += 1
        if message.run == self._slot.run_id:
            self._slot.held.take(number, message, raw)

    def send(self, number: int, record: Message, frames: Sequence[Any] = ()) -> None:
        """Send an engine a record, if it is in."""
        engine = self._members.engines.get(number)
        if engine is None:
            return
        try:
            self._router.send_multipart([engine.identity, *encode(record, frames)], copy=False)
        except zmq.ZMQError as error:  # unreachable: the next tick sees the death
            log.warning("engine %d cannot be reached: %s", number, error)
        else:
            engine.messages_out += 1

    # those who come

    def _join(self, join: Join, identity: bytes) -> None:
        members, facts, number = self._members, join.facts, join.facts.engine
        if join.format != POOL_FORMAT:  # the engine has told its kernel so
            log.warning("engine %d is %s: it is not let in", number, name_dnb(join.version, join.format))
            return
        if members.has_joined(facts, num_wires=join.num_wires):
            return
        if number in members.engines and self._slot.held.is_active:
            # Its wire was closed before it had said whose it is, so that nobody has missed it: it is to be loaded anew.
            self.lose(number, "has lost its wire")
        is_to_leave = members.join(facts, identity, num_wires=join.num_wires, now=time.monotonic())
        self.send(number, Welcome())
        if self._slot.held.is_active:
            if members.engines[number].is_spare:
                self._slot.held.make_spare(number)
            self._slot.held.add_engine(facts)
        if is_to_leave:
            self._let_leave([number])

    def _hear(self, beat: Heartbeat) -> None:
        heartbeats, engine = self._members.heartbeats, self._members.engines.get(beat.engine)
        if engine is None:
            self._ask_back(beat)
            return
        if engine.facts.process != beat.process:
            return
        if beat.is_at_work:
            heartbeats.see_at_work(beat.engine, time.monotonic())
            return
        # The last beat before a signal may come after the tick that saw the engine stopped.
        if beat.engine in heartbeats.silent and liveness(beat.process) == "stopped":
            return
        if heartbeats.beat(beat.engine, time.monotonic()):
            self._slot.held.hear_engine(beat.engine)

    def _ask_back(self, beat: Heartbeat) -> None:
        """Ask an engine that beats and is not in to join again: it belonged to the hub before, or was not heard."""
        now = time.monotonic()
        if not self._members.may_ask(beat.engine, beat.process, now=now):
            return
        try:
            self._router.send_multipart([b"engine-%d" % beat.engine, *encode(Rejoin(generation=self._generation))])
        except zmq.ZMQError:  # its other socket is not connected yet
            return
        self._members.note_asked(beat.engine, now=now)

    # those who are lost

    def lose(self, number: int, reason: str = "") -> None:
        """Lose an engine; those that are gone with it, and not noticed yet, get nothing of its shards."""
        is_in = number in self._members.engines
        gone_too = self._exits.ending(self._members.others_than(number)) if is_in else []
        for other in gone_too:
            self._slot.held.expect_loss(other)
        for other in (number, *gone_too):
            self._lose_one(other, reason if other == number else "")

    def lose_wire(self, number: int, reason: str) -> None:
        """Lose an engine whose wire has closed while a run may change."""
        if number in self._members.engines and self._slot.held.is_active:
            self.lose(number, reason)

    def _lose_one(self, number: int, reason: str) -> None:
        lost = self._members.lose(number)
        self._withdraw(number)
        if lost is not None and not lost.is_spare and not lost.is_retiring:
            self._activate_spare()  # first: so it has its part of the lost shards
        self._slot.held.lose_engine(self._explain(number, lost, reason))

    def _explain(self, number: int, lost: PoolEngine | None, reason: str) -> EngineLost:
        if lost is None or reason:
            return EngineLost(number, reason or "died")
        process = lost.facts.process
        code, is_wanted = self._exits.code_of(process), process in self._members.killed or lost.is_retiring
        self._members.killed.discard(process)
        is_gone = code is not None or not is_here(process) or liveness(process) == "gone"
        return EngineLost(
            number,
            describe_exit(code, is_wanted=is_wanted),
            is_suspect=is_gone and not is_wanted,
            is_crash=is_crash(code) and not is_wanted,
        )

    def _miss(self, number: int) -> None:
        """Give up an engine of the hub before that will not come back."""
        if self._members.miss(number) and not self._activate_spare():
            self._members.expect_one_spare_less()
        self._slot.held.lose_engine(EngineLost(number, "died"))

    def _activate_spare(self) -> bool:
        """Let a spare work; return whether there was one."""
        number = self._members.choose_spare()
        if number is None:
            return False
        self._slot.held.activate_spare(number)
        return True

    # those who leave

    def retire(self, request: Retire) -> None:
        """Let engines leave.

        Raises:
            ArgumentError: they are not there, or the run cannot do without them.
        """
        name = self._slot.active_name
        self._let_leave(self._members.retire(request.engines, active_run=name, force=request.force))

    def _let_leave(self, leaving: Iterable[int]) -> None:
        leaving = list(leaving)
        if self._members.start_leaving(leaving):
            self._activate_spare()
        let_go = self._slot.held.retire_engine if self._slot.held.is_active else self.release
        for number in leaving:
            let_go(number)

    def release(self, number: int) -> None:
        """End an engine that was asked to leave and owes nothing any more."""
        self.send(number, Exit())
        self._members.release(number, now=time.monotonic())

    def watch_leavers(self) -> None:
        """Let those go that a run has kept which has ended; kill those that take too long to end."""
        if not self._slot.held.is_active:
            for number in self._members.retiring:
                self.release(number)
        for process, deadline in list(self._members.leavers.items()):
            if not is_alive(process):
                del self._members.leavers[process]
            elif time.monotonic() > deadline:
                signal_process(process, signal.SIGKILL)

    def dismiss_all(self) -> None:
        """Tell all engines to end."""
        for number in list(self._members.engines):
            self.send(number, Exit())

    # those who stand still, or are harmed on purpose

    def evict(self, number: int) -> None:
        """Kill an engine that stands still and holds others up, or cut it off where that cannot be."""
        engine = self._members.engines.get(number)
        if engine is not None and signal_process(engine.facts.process, signal.SIGKILL):
            self._members.killed.add(engine.facts.process)
        elif engine is not None:
            self.lose(number, "was cut off")

    def inject_fault(self, request: InjectFault) -> None:
        """Harm an engine on purpose.

        Raises:
            ArgumentError: it is not there, or out of reach.
        """
        engine = self._members.check_known(request.engine)
        text = self.injector.act(request, engine.facts)
        if request.verb == "kill":
            self._members.killed.add(engine.facts.process)
        if request.verb == "slow":
            engine.slowdown = request.amount
        self._members.changed = True
        self._slot.held.tell("chaos", text, request.engine)

    def poll(self) -> None:
        """Look at all engines, several times a second: whether they live, beat, stand still."""
        members, heartbeats = self._members, self._members.heartbeats
        busy = heartbeats.busy
        for number in heartbeats.tick(time.monotonic()):
            reason = f"was not heard for {SILENT_SECONDS:g} s"
            self._slot.held.silence_engine(number, reason, is_asleep=True)
        for number in sorted(heartbeats.busy - busy):
            self._slot.held.miss_engine(number)
        for number, facts in list(members.returning.items()):
            if liveness(facts.process) == "gone":
                self._miss(number)
        for number, engine in list(members.engines.items()):
            if number not in members.engines:
                continue  # it was lost together with another
            state = liveness(engine.facts.process)
            if state == "gone":
                self.lose(number)
            elif state == "stopped" and heartbeats.declare_silent(number):
                self._slot.held.silence_engine(number, "was stopped")
