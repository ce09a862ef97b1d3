"""The hub's CPU time per step as engines are added to one global batch; its own rival is the number of slabs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil

from benchmarks.models import CASES
from benchmarks.ours import Side, open_side
from benchmarks.pairs import compare, spread
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

CASE = CASES["mlp-4m"]
NUMBERS_OF_ENGINES = (1, 2, 4, 8)
BATCH_SIZE = 256
# The difference of two runs leaves out what a run costs before its first step and after its last.
SHORT_STEPS, LONG_STEPS, QUICK_STEPS = 5, 45, 20
# Per parameter AdamW reads gradient, value and two moments, besides the other engines' slabs.
OPTIMIZER_READS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cpu:
    """CPU seconds per step."""

    hub: list[float]
    engines: list[float]  # all together


def rows(settings: Settings) -> Iterator[Row]:
    """One row per number of engines, then where it ends."""
    measured: dict[int, _Cpu] = {}
    for num_engines in NUMBERS_OF_ENGINES:
        with open_side(num_engines) as side:
            measured[num_engines] = _measure(settings, side)
        one, now = measured[1], measured[num_engines]
        yield compared_row(
            f"hub N={num_engines} / N=1",
            compare(now.hub, one.hub),
            unit="ms/step",
            scale=1e3,
            reach=float(num_engines),
            note=f"bytes read, optimizer's included, grow {_bytes_growth(num_engines):.2f} times; engines together "
            f"{statistics.median(now.engines) * 1e3:.1f} ms/step",
        )
    yield _limit(measured)


def _measure(settings: Settings, side: Side) -> _Cpu:
    facts = side.pool.facts
    hub = [psutil.Process(facts.hub.pid)]
    engines = [psutil.Process(engine.process.pid) for engine in facts.engines]
    long_steps = QUICK_STEPS if settings.is_quick else LONG_STEPS
    side.train(CASE, steps=SHORT_STEPS, batch_size=BATCH_SIZE)
    cpu = _Cpu(hub=[], engines=[])
    for _ in range(settings.pairs):
        used = []
        for steps in (SHORT_STEPS, long_steps):
            before = _cpu_seconds(hub), _cpu_seconds(engines)
            side.train(CASE, steps=steps, batch_size=BATCH_SIZE)
            used.append((_cpu_seconds(hub) - before[0], _cpu_seconds(engines) - before[1]))
        (short_hub, short_engines), (long_hub, long_engines) = used
        cpu.hub.append((long_hub - short_hub) / (long_steps - SHORT_STEPS))
        cpu.engines.append((long_engines - short_engines) / (long_steps - SHORT_STEPS))
    return cpu


def _limit(measured: dict[int, _Cpu]) -> Row:
    """Where the hub's time per step would be that of an engine, each on a core of its own."""
    numbers = list(measured)
    hub = [statistics.median(cpu.hub) for cpu in measured.values()]
    slope, base = statistics.linear_regression(numbers, hub)
    compute = statistics.median(measured[1].engines)
    grows = slope > 0
    limit = (math.sqrt(base**2 + 4 * slope * compute) - base) / (2 * slope) if grows else 0.0
    return Row(
        name="hub as long as an engine at N",
        unit="engines",
        ours=spread([limit]) if grows else None,
        note=f"hub {base * 1e3:.1f} ms + {slope * 1e3:.2f} ms per engine; the batch of {BATCH_SIZE} takes one engine "
        f"{compute * 1e3:.0f} ms",
        details={"base_seconds": base, "seconds_per_engine": slope, "compute_seconds": compute},
    )


def _bytes_growth(num_engines: int) -> float:
    return (num_engines + OPTIMIZER_READS) / (1 + OPTIMIZER_READS)


def _cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(time.user + time.system for time in times))
