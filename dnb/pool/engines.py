"""Engines of a pool as they are now, and as they are shown to people."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

import msgspec

from dnb.protocol.pool import EngineState, EngineStatus, HubRestart, PoolFacts, Process


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as it is now."""

    id: int
    host: str
    pid: int
    state: EngineState
    cores: int  # threads given to torch
    memory_bytes: int  # physical memory of its host
    rss_bytes: int | None  # resident memory of its process
    device: str
    slowdown: float = 1.0  # on purpose: computes so many times as long


def engine_of(status: EngineStatus) -> Engine:
    """Return an engine as its hub describes it."""
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
        slowdown=status.slowdown,
    )


def all_processes(facts: PoolFacts) -> list[Process]:
    """List supervisor, hub, controller, schedulers and engines of a pool."""
    return [
        facts.supervisor,  # first: it would start the hub again
        facts.hub,
        facts.controller,
        *facts.helpers,
        *(engine.process for engine in (*facts.engines, *facts.returning)),
    ]


def describe_engines(engines: list[Engine]) -> str:
    """Describe each engine in a line, for people."""
    rows = [("engine", "host", "pid", "state", "threads", "memory", "device")]
    for engine in engines:
        used = "?" if engine.rss_bytes is None else f"{engine.rss_bytes / 1e9:.2f}"
        memory = f"{used} of {engine.memory_bytes / 1e9:.0f} GB"
        cells = (
            engine.id,
            engine.host,
            engine.pid,
            engine.state if engine.slowdown == 1 else f"{engine.state}, {engine.slowdown:g}x slower",
            engine.cores,
            memory,
            engine.device,
        )
        rows.append(tuple(map(str, cells)))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def describe_restarts(restarts: Sequence[HubRestart]) -> str:
    """Tell that the hub was started again, when, and why; empty if it was not."""
    if not restarts:
        return ""
    last = restarts[-1]
    when = time.strftime("%H:%M:%S", time.localtime(last.time))
    more = f", for the last time at {when}" if len(restarts) > 1 else f" at {when}"
    times = f"{len(restarts)} times" if len(restarts) > 1 else "once"
    return f"the hub was started again {times}{more}: {last.reason}"


def describe_added(engines: list[Engine], new: list[int]) -> str:
    """Tell people what has joined, with how many threads, and what that means for the cores."""
    threads = [engine.cores for engine in engines if engine.id in new]
    each = f"{threads[0]} thread{'s' if threads[0] > 1 else ''}{' each' if len(new) > 1 else ''}" if threads else "gone"
    joined = f"engine{'s' if len(new) > 1 else ''} {', '.join(map(str, new))} joined ({each})"
    here = [engine.cores for engine in engines if engine.host == socket.gethostname()]
    num_cores = os.cpu_count() or 1
    return joined if sum(here) <= num_cores else f"{joined}; {len(here)} engines now share {num_cores} cores"
