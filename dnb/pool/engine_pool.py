"""A pool as the kernel holds it: ipyparallel's cluster and client, and a line to the hub."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self

import ipyparallel
import msgspec

from dnb.errors import ArgumentError, DnbError, PoolError
from dnb.hub.pool_files import remove_cluster_files
from dnb.planning.capacity import check_num_added, choose_num_threads
from dnb.pool.chaos import Chaos
from dnb.pool.engine_starter import EngineStarter, free_bytes
from dnb.pool.engines import Engine, all_processes, engine_of
from dnb.pool.replacement import EngineReplacer, RestartPolicy
from dnb.protocol.base import Message
from dnb.protocol.client_messages import (
    Done,
    GetMembers,
    GetPool,
    Hello,
    KeepRestart,
    KeepSpares,
    Members,
    PoolState,
    Retire,
    Shutdown,
)
from dnb.protocol.pool import EngineStatus, HubPlace, HubRestart, PoolFacts, Process
from dnb.protocol.versions import POOL_FORMAT, VERSION, name_dnb
from dnb.transport.segments import named_folders, remove_folders
from dnb.transport.sockets.channels import HubClient
from dnb.transport.system.processes import children_of, end_processes, is_alive, is_this_process, this_process

log = logging.getLogger(__name__)

# The hub waits 3 s for engines and 3 s for the controller before it kills them.
SHUTDOWN_SECONDS = 15.0
# How long engines that were asked to leave may take to end once the run lets them go.
EXIT_SECONDS = 10.0
# How long ipyparallel may take to hear that an engine is gone.
UNREGISTER_SECONDS = 5.0
# How long engines may take to come back to a hub that was started again: it expects them no longer itself.
RETURN_SECONDS = 10.0
LOOK_SECONDS = 0.05


class EnginePool:
    """Engines and their hub; made by `dnb.start`, also a context manager.

    Args:
        client: connected to the controller.
        connection: what the client's connection file says.
        cluster: that started it; None if another kernel did.
        security_dir: of the profile.
        log_dir: of the profile.
        mode: to steer it, or only to watch.
    """

    ends_with_block = True  # of a with statement; not one that was running before it

    def __init__(
        self,
        client: ipyparallel.Client,
        connection: dict[str, Any],
        *,
        cluster: ipyparallel.Cluster | None,
        security_dir: Path,
        log_dir: Path,
        mode: Literal["steer", "watch"] = "steer",
    ) -> None:
        self.client = client
        place = msgspec.convert(connection["dnb"], HubPlace)
        self._supervisor = place.supervisor
        self.hub = HubClient(
            place.address,
            is_alive=lambda: is_alive(self._supervisor),
            hub=name_dnb(place.version, place.format),
        )
        self.key: bytes = connection["key"].encode()
        self._cluster = cluster
        self._security_dir = security_dir
        self._log_dir = log_dir
        self._is_open = True
        try:
            self._greet(mode)
        except BaseException:
            self.hub.close()
            raise
        facts = self.facts
        self.cluster_id = facts.cluster_id
        self._folders = named_folders(facts.folders, facts.cluster_id)
        self._starter = EngineStarter(
            client, cluster=cluster, cluster_id=self.cluster_id, profile_dir=security_dir.parent
        )
        self._replacer: EngineReplacer | None = None
        self._size_lock = threading.Lock()  # held by whoever changes how many engines there are
        self.chaos = Chaos(self._ask_settled)
        if mode == "steer":
            self._keep()  # what the kernel before wanted: spares, the dead replaced

    @property
    def facts(self) -> PoolFacts:
        """Every process of the pool, as the hub knows it."""
        return self._state().facts

    @property
    def statuses(self) -> tuple[EngineStatus, ...]:
        """The living engines, with the hub's message counts; those who are coming back to a new hub are waited for."""
        return self._settled().engines

    @property
    def restarts(self) -> tuple[HubRestart, ...]:
        """The last restarts of the hub, with time and reason; empty if it has not been restarted."""
        return self.facts.restarts

    @property
    def engines(self) -> list[Engine]:
        """The living engines, in order of their ids."""
        return [engine_of(status) for status in self.statuses]

    @property
    def is_open(self) -> bool:
        """True while the pool can be asked; False after `shutdown` or if its hub has died."""
        return self._is_open and is_alive(self._supervisor)

    @property
    def is_steered_here(self) -> bool:
        """True if this kernel may change things, and its end ends the pool; another one may have taken over."""
        owner = self.facts.owner
        return owner is not None and is_this_process(owner)

    def take_over(self) -> None:
        """Steer from this kernel; the one that did so far only watches from now on."""
        self._greet("take over")
        self._keep()

    def _greet(self, mode: Literal["steer", "take over", "watch"]) -> None:
        self.hub.ask(Hello(owner=this_process(), mode=mode, format=POOL_FORMAT, version=VERSION), Done)

    @property
    def segment_folders(self) -> list[Path]:
        """The folders in which this pool's shared memory may lie."""
        return list(self._folders)

    # more and fewer engines

    def add(self, n: int = 1, *, timeout_seconds: float = 60.0) -> list[int]:
        """Start engines and return their ids when they have joined; an active run takes them from its next step.

        Args:
            n: number of engines to start; they get as many threads as the others have.
            timeout_seconds: how long that may take.

        Raises:
            ArgumentError: n is not a number of engines that this host can hold beside what runs.
            PoolError: not all came up in time; those that did not are ended.
        """
        check_num_added(n, free_bytes=free_bytes())
        if timeout_seconds <= 0:
            raise ArgumentError(f"timeout_seconds must be positive, not {timeout_seconds!r}")
        with self._size_lock:
            return self._start_engines(n, timeout_seconds=timeout_seconds)

    def remove(self, engines: int | Iterable[int], *, force: bool = False, timeout_seconds: float = 60.0) -> None:
        """Let engines leave: each brings what it computes, then its process ends; return when they are gone.

        Args:
            engines: an id, or several.
            force: also the last engine of an active run, which then pauses until engines are added.
            timeout_seconds: after which they are killed.

        Raises:
            ArgumentError: an engine is not in the pool, or is the last one of an active run.
            PoolError: some had to be killed; other engines do again what they had not brought.
        """
        leaving = _ids(engines)
        facts = {engine.facts.engine: engine.facts.process for engine in self.statuses}
        processes = [facts[engine] for engine in leaving if engine in facts]
        nannies = children_of(processes)
        try:
            self.hub.ask(Retire(engines=tuple(leaving), force=force), Done)
        except ArgumentError:
            if not processes or any(is_alive(process) for process in processes):
                raise  # else a hub that has died since had let them go
        left_in_time = _wait_until(lambda: not set(leaving) & set(self._members().leaving), timeout_seconds)
        stubborn = end_processes(processes, patience_seconds=EXIT_SECONDS if left_in_time else 0.0)
        end_processes(nannies, patience_seconds=EXIT_SECONDS)
        _wait_until(lambda: not set(leaving) & set(self.client.ids), UNREGISTER_SECONDS)
        if not left_in_time or stubborn:
            raise PoolError(
                f"not all of the engines {', '.join(map(str, leaving))} left within {timeout_seconds:g} s: they were "
                "killed, and what they had not brought is done again by others"
            )

    @property
    def spares(self) -> int:
        """The number of engines that are kept warm beside those that work; may be set, see `keep_spares`."""
        return self._members().wanted_spares

    @spares.setter
    def spares(self, n: int) -> None:
        self.keep_spares(n)

    def keep_spares(self, n: int, *, timeout_seconds: float = 60.0) -> None:
        """Keep so many extra engines that hold the active run and take over at once when one dies.

        Args:
            n: number of spares; one that took over is replaced while this kernel lives, and what is too many ended.
            timeout_seconds: how long the start of new ones may take.

        Raises:
            ArgumentError: n is negative, or more than this host can hold.
            PoolError: not all came up in time.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ArgumentError(f"the number of spares must be 0 or more, not {n!r}: %dtrain spares 1")
        with self._size_lock:
            self.await_engines()
            before = self._members()
            missing = n - len(before.spares)
            if missing > 0:
                check_num_added(missing, free_bytes=free_bytes())
            self.hub.ask(KeepSpares(number=n), Done)
            try:
                if missing > 0:
                    self._start_engines(missing, timeout_seconds=timeout_seconds)
            except BaseException:
                self.hub.ask(KeepSpares(number=before.wanted_spares), Done)
                raise
            surplus = self._members().spares[n:]
        if surplus:
            self.remove(surplus)
        self._keep()

    @property
    def restart(self) -> RestartPolicy:
        """The policy by which the kernel that steers replaces engines that die: "never" or "always"; may be set."""
        return self._members().restart

    @restart.setter
    def restart(self, policy: RestartPolicy) -> None:
        if policy not in ("never", "always"):
            raise ArgumentError(f"restart must be 'never' or 'always', not {policy!r}")
        self.hub.ask(KeepRestart(policy=policy), Done)
        self._stop_keeping()
        self._keep()

    @property
    def trouble(self) -> str:
        """The reason why engines are not replaced any more; "" if nothing is wrong."""
        return "" if self._replacer is None else self._replacer.trouble

    def _keep(self) -> None:
        """Start an engine replacer if there is something to keep."""
        if self._replacer is not None and self._replacer.is_alive() and not self._replacer.is_done:
            return
        members = self._members()
        if members.restart == "always" or members.wanted_spares or members.num_owed:
            look, start = self._members_if_steered, self._start_engines
            self._replacer = EngineReplacer(members.restart, poll=look, start=start, size_lock=self._size_lock)
            self._replacer.start()

    def fill_up(self) -> None:
        """Have engines started in the place of those that a run's work has ended, if this kernel steers."""
        replacer = self._replacer
        if replacer is not None and ((replacer.is_alive() and not replacer.is_done) or replacer.trouble):
            return
        try:
            if self.is_steered_here:
                self._keep()
        except DnbError as error:
            log.info("the pool is not filled up: %s", error)

    def _stop_keeping(self) -> None:
        if self._replacer is not None:
            self._replacer.stop()
            self._replacer.join()
            self._replacer = None

    def _start_engines(self, n: int, *, timeout_seconds: float = 60.0) -> list[int]:
        threads = [status.facts.cores for status in self.statuses]
        num_threads = max(threads) if threads else self._members().num_threads
        num_threads = num_threads or choose_num_threads(os.cpu_count() or 1, num_engines=n)
        return self._starter.start(n, num_threads=num_threads, timeout_seconds=timeout_seconds)

    def _members_if_steered(self) -> Members:
        """Return the members for the replacer, unless another kernel has taken over and replaces engines itself."""
        if not self.is_steered_here:
            raise PoolError("another kernel steers it")
        return self._members()

    def await_engines(self) -> PoolFacts:
        """Wait for engines that are coming back to a hub that was started again, as long as it expects them."""
        return self._settled().facts

    def _ask_settled(self, request: Message, expect: type[Done]) -> tuple[Done, list[bytes]]:
        """Ask for something that is done to an engine, which may be on its way back."""
        self.await_engines()
        return self.hub.ask(request, expect)

    def _settled(self) -> PoolState:
        state = self._state()
        deadline = time.monotonic() + RETURN_SECONDS
        while state.returning and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            state = self._state()
        return state

    def _members(self) -> Members:
        members, _ = self.hub.ask(GetMembers(), Members)
        return members

    def shutdown(self) -> None:
        """End every process of the pool and remove what it left on disk and in shared memory. Safe to call twice."""
        if not self._is_open:
            return
        self._starter.cancel()
        self._stop_keeping()
        if self._is_steered_elsewhere():
            self._is_open = False  # not ours to end
            self.hub.close()
            self.client.close(linger=False)
            return
        processes = self._ask_to_end()
        self._is_open = False
        stubborn = end_processes(processes, patience_seconds=SHUTDOWN_SECONDS)
        if stubborn:
            log.warning("killed %d processes that did not end within %g s", len(stubborn), SHUTDOWN_SECONDS)
        self.hub.close()
        self.client.close(linger=False)
        remove_folders(self._folders)
        remove_cluster_files(self.cluster_id, security_dir=self._security_dir, log_dir=self._log_dir)

    def _is_steered_elsewhere(self) -> bool:
        """Tell whether another kernel ends it; a pool that dies while it is asked is cleared up from here."""
        try:
            return self.is_open and not self.is_steered_here
        except DnbError as error:
            log.info("the pool has just died: %s", error)
            return False

    def _ask_to_end(self) -> list[Process]:
        """Let the hub end the pool; every process that should then be gone."""
        processes = [self._supervisor]
        try:
            facts = self.facts
            processes = all_processes(facts)
            self.hub.ask(Shutdown(), Done)
        except DnbError as error:
            log.warning("the hub could not be asked: %s", error)
            end_processes(processes, patience_seconds=0.0)
        return processes

    def _state(self) -> PoolState:
        if not self.is_open:
            raise PoolError("this pool was shut down, or its hub has died: %dtrain start opens a new one")
        state, _ = self.hub.ask(GetPool(), PoolState)
        return state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ends_with_block:
            self.shutdown()
        self.ends_with_block = True

    def __repr__(self) -> str:
        if not self.is_open:
            return "<dnb.Pool: shut down>"
        return f"<dnb.Pool: {len(self.engines)} engines on {socket.gethostname()}>"


def _ids(engines: int | Iterable[int]) -> list[int]:
    ids = [engines] if isinstance(engines, int) else list(engines)
    wrong = next((each for each in ids if not isinstance(each, int) or isinstance(each, bool)), None)
    if wrong is not None or not ids:
        raise ArgumentError(f"engines are named by their ids, not {wrong if ids else engines!r}: pool.remove([3])")
    return list(dict.fromkeys(ids))


def _wait_until(holds: Callable[[], bool], limit_seconds: float) -> bool:
    """Wait until something holds; say whether it did within the time."""
    deadline = time.monotonic() + limit_seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True
