"""Facts about a pool: its processes, engines and hub."""

from __future__ import annotations

from typing import Literal

import msgspec

from dnb.protocol.base import Record
from dnb.protocol.run import RunStatus

EngineState = Literal["ready", "busy", "hung", "spare"]


class Process(Record, frozen=True):
    """One process on one host, so that a recycled pid is never taken for it."""

    host: str
    pid: int
    create_time: float  # seconds since the epoch, as psutil gives it
    # Two containers may share a name and a home, and a host keeps its name over a reboot. Empty: not known.
    boot_id: str = ""  # of the host's kernel
    pid_namespace: str = ""  # in which the pid counts


class EngineFacts(Record, frozen=True):
    """An engine's description of itself and its host, sent when it joins."""

    engine: int
    process: Process
    cores: int  # threads given to torch
    memory_bytes: int  # physical memory of its host
    device: str
    torch_version: str


class EngineStatus(Record, frozen=True):
    """An engine as the hub sees it now."""

    facts: EngineFacts
    state: EngineState
    rss_bytes: int | None = None
    messages_in: int = 0  # from the engine to the hub, since it joined
    messages_out: int = 0  # from the hub to the engine
    slowdown: float = 1.0  # on purpose: computes so many times as long


class Address(Record, frozen=True):
    """The address of the hub, and the keys to be let in there (Z85 CurveZMQ keys)."""

    url: str
    server_public: str
    public: str
    secret: str
    local: str = ""  # where it listens for processes of its host


class HubRestart(Record, frozen=True):
    """One time that the hub has ended against its will, and another one took its place."""

    time: float  # seconds since the epoch
    reason: str  # "ValueError: no such thing (in _tick (service.py:700))"
    traceback: str = ""  # empty if it was killed


class PoolFacts(Record, frozen=True):
    """A pool as it lies on disk, enough to find every process it owns."""

    cluster_id: str
    # The hub's parent, which starts it again: the pool lives as long as it does.
    supervisor: Process = msgspec.field(name="guardian")
    hub: Process
    controller: Process
    helpers: tuple[Process, ...]  # other children of the controller and of the engines
    engines: tuple[EngineFacts, ...]
    owner: Process | None  # the kernel that may steer it
    run: str | None = None  # name of the run that the hub holds, active or ended
    run_status: RunStatus | None = None
    returning: tuple[EngineFacts, ...] = ()  # of the hub before, and not back yet
    restarts: tuple[HubRestart, ...] = ()  # of the hub, the last ones
    folders: tuple[str, ...] = ()  # of its shared memory; () in a record of an older dnb
    format: int = 1  # as `dnb.protocol.versions.POOL_FORMAT`; likewise in every record that has one
    version: str = ""  # of the dnb that wrote this; empty: an early one


class HubConfig(Record, frozen=True):
    """The hub's configuration, which its supervisor reads from standard input."""

    cluster_id: str
    key: str  # signs payloads
    security_dir: str
    log_dir: str
    host: str  # the interface to bind
    controller: Process
    owner: Process | None
    folders: tuple[str, ...] = ()  # of the pool's shared memory, which the supervisor makes


class HubBinding(Record, frozen=True):
    """The supervisor's answer to the controller once the hub's ports are bound."""

    supervisor: Process
    client: Address
    engine: Address
    folders: tuple[str, ...] = ()  # of the pool's shared memory
    fork_server: str = ""  # name of the socket where engines are ordered; "" where they are not forked


class HubPlace(Record, frozen=True):
    """The hub's entry in a connection file, for an engine or a client."""

    address: Address
    supervisor: Process = msgspec.field(name="guardian")
    fork_server: str = msgspec.field(default="", name="nursery")  # as of `HubBinding`
    format: int = 1
    version: str = ""  # of the hub's dnb
