"""Engines' parts in a run, in shares of their time."""

from __future__ import annotations

from typing import Any

import msgspec

from dnb.protocol.measurements import WorkerState, WorkerTotals


class EngineUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's part in a run; shares are of its time and sum to 1, or are all 0 before it did anything."""

    engine: int
    host: str
    pid: int
    state: WorkerState
    compute: float
    wait: float
    data: float
    idle: float
    cpu_percent: float | None
    rss_bytes: int | None
    samples: int
    steps: int
    start_rss_bytes: int | None = None  # resident before it loaded the run
    peak_rss_bytes: int | None = None  # the most since then, pages of shared memory that it used included
    peak_private_bytes: int | None = None  # the most of what no other process had
    device: str | None = None
    cores: int | None = None  # threads given to torch
    memory_bytes: int | None = None  # physical memory of its host
    heartbeat_age_seconds: float | None = None  # since the hub last heard it; None once it is gone
    shards: tuple[int, ...] | None = None  # of the batch, that it holds now


# Fields that both have, and that mean the same in both.
_SAME = tuple(name for name in EngineUsage.__struct_fields__ if name in WorkerTotals.__struct_fields__)


def usage_of(now: WorkerTotals, earlier: WorkerTotals | None) -> EngineUsage:
    """Return an engine's part in a run since an earlier account of it, or since the run began."""

    def grown(name: str) -> float:
        return float(getattr(now, name)) - (float(getattr(earlier, name)) if earlier is not None else 0.0)

    busy = {name: max(grown(f"{name}_seconds"), 0.0) for name in ("compute", "wait", "data")}
    total = max(grown("alive_seconds"), sum(busy.values()))
    shares = {name: seconds / total if total > 0 else 0.0 for name, seconds in busy.items()}
    idle = max(1.0 - sum(shares.values()), 0.0) if total > 0 else 0.0
    facts: dict[str, Any] = {name: getattr(now, name) for name in _SAME} | shares
    return EngineUsage(**facts, idle=idle)
