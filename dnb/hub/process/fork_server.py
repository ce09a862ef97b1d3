"""Engines as forks of the hub's supervisor: there within milliseconds, and sharing the memory of what it imported.

The supervisor listens on a local socket in the abstract namespace, so no file is left behind; both sides let only
processes of their own user in. An `ForkRequest` comes with the file that takes the engine's output, the answer is its
pid. While the supervisor still imports torch, orders wait in the queue of the socket.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import msgspec

from dnb.errors import PoolError
from dnb.hub.server.members.engine_exits import ExitWriter
from dnb.protocol.base import Record
from dnb.transport.sockets.credentials import is_foreign

log = logging.getLogger(__name__)

CAN_FORK = sys.platform == "linux"
# Imported by name: the floors of hub and engine do not know each other.
ENGINE_MODULE = "dnb.engine.process.forked_engine"
# What engines need beside what the hub needs.
ENGINE_MODULES = (
    ENGINE_MODULE,
    "dnb.engine.process.worker",
    "ipyparallel.engine.app",
    "ipyparallel.engine.nanny",
    # What ipykernel leaves until it starts.
    "ipykernel.debugger",
    "tornado.platform.asyncio",
    "IPython.core.completerlib",
    "IPython.extensions.storemagic",
)
# An order is one message, read to its end; whoever takes longer to write it is not answered.
FORK_REQUEST_SECONDS = 5.0
# How long the supervisor may take for everything before: on a busy machine torch is imported in tens of seconds.
ANSWER_SECONDS = 300.0
# So long that strangers who call are sent away faster than they fill it.
QUEUE_LENGTH = 4096
# How many of them are sent away before the supervisor looks after its hub again.
MOST_STRANGERS = 256
# How soon an order is brought again that the queue had no room for.
QUEUE_SECONDS = 0.005


class ForkRequest(Record, frozen=True):
    """A request to fork an engine: its arguments, environment and limits."""

    arguments: tuple[str, ...]  # of ipyparallel's engine command
    environment: dict[str, str]
    folder: str  # to work in
    most_files: int = 0  # that it may open; 0 as many as the supervisor


class ForkServer:
    """The supervisor's side: takes orders and forks engines."""

    def __init__(self) -> None:
        self.name = f"dnb-{secrets.token_hex(8)}"  # where it listens; who may read the connection files knows it
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(QUEUE_LENGTH)
        self._listener.setblocking(False)
        self._engines: set[int] = set()  # their pids
        self.exits = ExitWriter()

    def fileno(self) -> int:
        """Return the listener's descriptor, for `select`."""
        return self._listener.fileno()

    def serve(self) -> None:
        """Take one order; whatever is wrong with it is its sender's trouble."""
        caller = self._next_caller()
        if caller is None:
            return
        with caller:
            try:
                order, output = _take(caller)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with bytes that are decoded
                log.warning("an order for an engine was refused: %s: %s", type(error).__name__, error)
                return
            if _has_gone(caller):  # it has given up, and would not know of the engine
                os.close(output)
                return
            supervisor = os.getpid()
            try:
                pid = os.fork()
            except OSError:
                os.close(output)
                raise
            if pid == 0:
                _run_engine(order, output, supervisor)
            self._engines.add(pid)
            os.close(output)
            try:
                caller.sendall(b"%d" % pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)

    def _next_caller(self) -> socket.socket | None:
        """Accept the next process of this user in line; strangers before it are sent away."""
        for _ in range(MOST_STRANGERS):
            try:
                caller, _ = self._listener.accept()
            except BlockingIOError:
                return None
            if not is_foreign(caller):
                return caller
            log.warning("a process of another user called for an engine")
            caller.close()
        return None

    def close(self) -> None:
        """Listen no more, in a fork that is no supervisor."""
        self._listener.close()

    def reap(self) -> None:
        """Reap engines that have ended."""
        for pid in list(self._engines):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.exits.write(pid, status)
                self._engines.discard(pid)

    def wait_until_empty(self, *, limit_seconds: float) -> None:
        """Give the engines time to end; the pool does."""
        deadline = time.monotonic() + limit_seconds
        while self._engines and time.monotonic() < deadline:
            self.reap()
            time.sleep(0.02)


def warm_up() -> None:
    """Import what engines need."""
    for module in ENGINE_MODULES:
        importlib.import_module(module)


def fork_engine(
    name: str,
    arguments: list[str],
    *,
    environment: Mapping[str, str],
    folder: str,
    output: int,
    timeout_seconds: float = ANSWER_SECONDS,
) -> int:
    """Ask a pool's supervisor of this host for an engine; its pid.

    Args:
        name: of the supervisor's socket, `ForkServer.name`.
        arguments: for ipyparallel's engine.
        environment: all of it.
        folder: to work in.
        output: descriptor of an open file for what it prints.
        timeout_seconds: how long the supervisor may take.

    Raises:
        PoolError: there is no supervisor, or it starts none.
        TimeoutError: it does not answer in time.
    """
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    order = ForkRequest(arguments=tuple(arguments), environment=dict(environment), folder=folder, most_files=most_files)
    deadline = time.monotonic() + timeout_seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        try:
            _call(line, name, deadline=deadline)
            if is_foreign(line):
                raise PoolError("the supervisor of this pool belongs to another user")
            line.settimeout(max(deadline - time.monotonic(), QUEUE_SECONDS))
            socket.send_fds(line, [b"\n"], [output])
            line.sendall(msgspec.msgpack.encode(order))
            line.shutdown(socket.SHUT_WR)
            answer = line.recv(32)
        except TimeoutError as error:
            raise TimeoutError(f"the supervisor of this pool did not answer within {timeout_seconds:.3g} s") from error
        except OSError as error:
            raise PoolError(f"the supervisor of this pool does not answer: {error}") from error
    if not answer:
        raise PoolError("the supervisor of this pool has started no engine: its log says why")
    return int(answer)


def _call(line: socket.socket, name: str, *, deadline: float) -> None:
    """Stand in line; while the queue is full, as when strangers fill it, come again."""
    line.setblocking(False)
    while True:
        try:
            line.connect(f"\0{name}")
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TimeoutError("its queue is full") from error
            time.sleep(QUEUE_SECONDS)
        else:
            return


def _has_gone(caller: socket.socket) -> bool:
    """Return whether the other side is closed; that it sends nothing more is not enough."""
    poller = select.poll()
    poller.register(caller, select.POLLHUP)
    return bool(poller.poll(0))


def _take(caller: socket.socket) -> tuple[ForkRequest, int]:
    caller.settimeout(FORK_REQUEST_SECONDS)
    _, descriptors, _, _ = socket.recv_fds(caller, 1, 1)
    if len(descriptors) != 1:
        raise OSError("it came without a file for the output")
    try:
        with caller.makefile("rb") as stream:
            return msgspec.msgpack.decode(stream.read(), type=ForkRequest), descriptors[0]
    except BaseException:
        os.close(descriptors[0])
        raise


def _run_engine(order: ForkRequest, output: int, supervisor: int) -> NoReturn:
    """Run an engine in the fork, which never comes back into the supervisor's loop."""
    code = 1
    try:
        code = importlib.import_module(ENGINE_MODULE).run_engine(
            list(order.arguments),
            environment=order.environment,
            folder=order.folder,
            output=output,
            supervisor=supervisor,
            most_files=order.most_files,
        )
    except BaseException:
        log.exception("an engine could not be started")
    finally:
        os._exit(code)
