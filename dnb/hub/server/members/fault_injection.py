"""Harm done on purpose: engines that are killed, stopped or slowed, to learn and to test what a pool does then."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable

from dnb.errors import ArgumentError
from dnb.protocol.base import Message
from dnb.protocol.client_messages import InjectFault
from dnb.protocol.engine_messages import Slow
from dnb.protocol.pool import EngineFacts, Process
from dnb.transport.system.processes import signal_process


class FaultInjector:
    """Does what is asked to one engine, and lets those that were stopped go on in time.

    The hub does this, not the kernel: an engine must not stand still for ever because a kernel was restarted.

    Args:
        send: a record to an engine.
        clock: seconds from any origin.
    """

    def __init__(self, send: Callable[[int, Message], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self.stopped: dict[Process, float] = {}  # until when
        self.num_killed = 0

    def act(self, request: InjectFault, facts: EngineFacts) -> str:
        """Carry a request out; return in words what was done.

        Raises:
            ArgumentError: the engine is on another host, where it cannot be signalled.
        """
        match request.verb:
            case "kill":
                self._signal(request, facts, signal.SIGKILL)
                self.num_killed += 1
                return f"engine {request.engine} is killed on purpose"
            case "stop":
                self._signal(request, facts, signal.SIGSTOP)
                self.stopped[facts.process] = self._clock() + request.amount
                return f"engine {request.engine} is stopped on purpose, for {request.amount:g} s"
            case "slow":
                self._send(request.engine, Slow(factor=request.amount))
                return describe_slowdown(request.engine, request.amount)

    def poll(self) -> None:
        """Let those go on whose time is over."""
        for process, until in list(self.stopped.items()):
            if self._clock() >= until:
                del self.stopped[process]
                signal_process(process, signal.SIGCONT)

    def close(self) -> None:
        """Let all go on: a stopped process cannot see that its pool ends."""
        for process in self.stopped:
            signal_process(process, signal.SIGCONT)
        self.stopped.clear()

    def _signal(self, request: InjectFault, facts: EngineFacts, number: signal.Signals) -> None:
        host = socket.gethostname()
        if facts.process.host != host:
            raise ArgumentError(
                f"engine {request.engine} is on {facts.process.host}, where the hub on {host} cannot {request.verb} "
                f"it: %dtrain chaos slow {request.engine} 4x works on every host"
            )
        if not signal_process(facts.process, number):
            raise ArgumentError(f"engine {request.engine} has just ended: %dtrain status")


def describe_slowdown(engine: int, factor: float) -> str:
    """Tell how long an engine computes on purpose, and how that ends."""
    if factor == 1:
        return f"engine {engine} computes as fast as it can again"
    return f"engine {engine} computes {factor:g} times as long, on purpose, until %dtrain chaos slow {engine} 1x"
