"""The kernels of a pool: any number may look on, one steers, and the pool ends with that one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from dnb.errors import ArgumentError, PoolError
from dnb.hub.handover import PoolHandover
from dnb.hub.server.no_run import NoRun
from dnb.protocol.client_messages import (
    GetCheckpoint,
    GetGradients,
    GetJob,
    GetMembers,
    GetPool,
    GetRun,
    GetState,
    Hello,
    Request,
)
from dnb.protocol.pool import Process
from dnb.protocol.versions import POOL_FORMAT, name_dnb, name_this_dnb
from dnb.transport.system.processes import is_alive, is_same

if TYPE_CHECKING:
    from dnb.hub.run.active_run import ActiveRun

# Requests that change nothing: they are any kernel's.
Watching = Hello | GetPool | GetMembers | GetRun | GetState | GetGradients | GetJob | GetCheckpoint


class Steering:
    """The kernel that steers a pool, and those that look on.

    Args:
        owner: the kernel that steers at first; None if none does.
        clock: seconds from any origin.
    """

    def __init__(self, owner: Process | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.owner = owner
        self.restart: Literal["never", "always"] = "never"  # kept for the kernel that steers
        self.kernels: dict[bytes, Process] = {}  # by the identity of their sockets
        self.versions: dict[bytes, str] = {}  # likewise, for errors
        self.changed = False  # since the next hub could last read it
        self._orphaned: float | None = None  # since when nobody steers a pool whose run does not advance
        self._clock = clock

    def restore(self, handover: PoolHandover) -> None:
        """Take over what the hub before has known."""
        self.owner = handover.owner
        self.restart = handover.restart
        self.kernels = {bytes.fromhex(name): kernel for name, kernel in handover.kernels.items()}
        self.versions = {bytes.fromhex(name): version for name, version in handover.kernel_versions.items()}

    def name_version(self, identity: bytes) -> str:
        """Return how an error names the kernel of a socket, and its version of dnb."""
        return self.versions.get(identity, "a kernel of another version")

    def keep_restart(self, policy: Literal["never", "always"]) -> None:
        """Remember whether engines that die are replaced."""
        self.restart = policy
        self.changed = True

    def check(self, identity: bytes, request: Request) -> None:
        """Let one kernel steer, and any number look on; a kernel that only looked on takes over from a dead one.

        Raises:
            ArgumentError: another kernel steers.
        """
        if isinstance(request, Watching):
            return
        caller, owner = self.kernels.get(identity), self.owner
        if owner is None or is_same(caller, owner):
            return
        if is_alive(owner):
            raise ArgumentError(
                f"the kernel with pid {owner.pid} on {owner.host} steers this pool, this one only watches: "
                "dnb.attach(steer=True) or %dtrain attach --steer takes over"
            )
        self.changed = True
        self.owner = caller or owner

    def greet(self, identity: bytes, hello: Hello) -> bool:
        """Let a kernel in; return whether it steers from now on.

        Raises:
            PoolError: it has another version of dnb.
            ArgumentError: it wants to steer, and another kernel does.
        """
        kernel = name_dnb(hello.version, hello.format)
        if hello.format != POOL_FORMAT:
            raise PoolError(
                f"the pool's hub is {name_this_dnb()}, and this kernel {kernel}: attach with the hub's version of dnb, "
                "or end the pool with it and %dtrain start one of this version"
            )
        self.versions[identity] = f"this kernel, {kernel}"
        self.kernels[identity] = hello.owner
        self.changed = True
        if hello.mode == "watch":
            return False
        owner = self.owner
        if hello.mode == "steer" and owner is not None and not is_same(owner, hello.owner) and is_alive(owner):
            raise ArgumentError(f"the kernel with pid {owner.pid} on {owner.host} steers this pool")
        self.owner = hello.owner
        self._orphaned = None
        return True

    def find_end(self, run: ActiveRun | NoRun) -> str:
        """Return why the pool is to end; empty while its kernel lives, or a run advances or may still be asked for."""
        if self.owner is None or is_alive(self.owner):
            return ""
        if isinstance(run, NoRun) or (self._orphaned is None and run.is_over):
            return "its kernel is gone"
        if run.status in ("starting", "running") or self._orphaned is None:
            self._orphaned = self._clock()
        elif self._clock() - self._orphaned > run.spec.linger_seconds:
            return "its kernel is gone, and nobody attached"
        return ""
