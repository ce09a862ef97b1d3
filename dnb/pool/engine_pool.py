"""A pool as the kernel holds it: ipyparallel's cluster and client, and a line to the hub."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import ipyparallel
import msgspec

from dnb.errors import DnbError, PoolError
from dnb.hub.pool_files import remove_cluster_files
from dnb.records import (
    Address,
    Done,
    EngineStatus,
    GetPool,
    Hello,
    PoolFacts,
    PoolState,
    Process,
    Shutdown,
)
from dnb.transport.channels import HubClient
from dnb.transport.lives import end_processes, is_alive, is_this_process, this_process
from dnb.transport.segments import pool_folders, remove_pool_folders

log = logging.getLogger(__name__)

# The hub waits 3 s for engines and 3 s for the controller before it kills them.
SHUTDOWN_SECONDS = 15.0


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as it is now."""

    id: int
    host: str
    pid: int
    state: Literal["ready", "busy", "hung"]
    cores: int  # threads given to torch
    memory_bytes: int  # physical memory of its host
    rss_bytes: int | None  # resident memory of its process
    device: str


class EnginePool:
    """Engines and their hub; made by `dnb.start`, also a context manager.

    Args:
        client: connected to the controller.
        connection: what the client's connection file says.
        cluster: that started it; None if another kernel did.
        security_dir: of the profile.
        log_dir: of the profile.
        wish: to steer it, or only to watch.
    """

    def __init__(
        self,
        client: ipyparallel.Client,
        connection: dict[str, Any],
        *,
        cluster: ipyparallel.Cluster | None,
        security_dir: Path,
        log_dir: Path,
        wish: Literal["steer", "watch"] = "steer",
    ) -> None:
        self.client = client
        self._hub_process = msgspec.convert(connection["dnb"]["hub"], Process)
        self.hub = HubClient(
            msgspec.convert(connection["dnb"]["address"], Address),
            is_alive=lambda: is_alive(self._hub_process),
        )
        self.key: bytes = connection["key"].encode()
        self._cluster = cluster
        self._security_dir = security_dir
        self._log_dir = log_dir
        self._is_open = True
        self.hub.ask(Hello(owner=this_process(), wish=wish), Done)
        self.cluster_id = self.facts.cluster_id

    @property
    def facts(self) -> PoolFacts:
        """Every process of the pool, as the hub knows it."""
        return self._state().facts

    @property
    def statuses(self) -> tuple[EngineStatus, ...]:
        """The living engines, with the hub's message counts."""
        return self._state().engines

    @property
    def engines(self) -> list[Engine]:
        """The living engines, in order of their ids."""
        return [_engine(status) for status in self.statuses]

    @property
    def is_open(self) -> bool:
        """Whether the pool can still be asked; False after `shutdown` or if its hub has died."""
        return self._is_open and is_alive(self._hub_process)

    @property
    def is_steered_here(self) -> bool:
        """Whether this kernel may change things, and its end ends the pool; another one may have taken over."""
        owner = self.facts.owner
        return owner is not None and is_this_process(owner)

    def take_over(self) -> None:
        """Steer from this kernel; the one that did so far only watches from now on."""
        self.hub.ask(Hello(owner=this_process(), wish="take over"), Done)

    @property
    def segment_folders(self) -> list[Path]:
        """Where this pool's shared memory may lie."""
        return pool_folders(self.cluster_id)

    def shutdown(self) -> None:
        """End every process of the pool and remove what it left on disk and in shared memory. Safe to call twice."""
        if not self._is_open:
            return
        if self.is_open and not self.is_steered_here:
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
        remove_pool_folders(self.cluster_id)
        remove_cluster_files(self.cluster_id, security_dir=self._security_dir, log_dir=self._log_dir)

    def _ask_to_end(self) -> list[Process]:
        """Let the hub end the pool; every process that should then be gone."""
        processes = [self._hub_process]
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        if not self.is_open:
            return "<dnb.Pool: shut down>"
        return f"<dnb.Pool: {len(self.engines)} engines on {socket.gethostname()}>"


def all_processes(facts: PoolFacts) -> list[Process]:
    """Hub, controller, schedulers and engines of a pool."""
    return [
        facts.hub,
        facts.controller,
        *facts.helpers,
        *(engine.process for engine in facts.engines),
    ]


def describe_engines(engines: list[Engine]) -> str:
    """One line per engine, for people."""
    rows = [("engine", "host", "pid", "state", "threads", "memory", "device")]
    for engine in engines:
        used = "?" if engine.rss_bytes is None else f"{engine.rss_bytes / 1e9:.2f}"
        memory = f"{used} of {engine.memory_bytes / 1e9:.0f} GB"
        cells = (
            engine.id,
            engine.host,
            engine.pid,
            engine.state,
            engine.cores,
            memory,
            engine.device,
        )
        rows.append(tuple(map(str, cells)))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _engine(status: EngineStatus) -> Engine:
    facts = status.facts
    return Engine(
        id=facts.engine,
        host=facts.process.host,
        pid=facts.process.pid,
        state=status.state,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        rss_bytes=status.rss_bytes,
        device=facts.device,
    )
