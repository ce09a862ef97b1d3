"""By how much an engine's peak memory grows when it has one of two stages, against one process with the whole model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.large_models import CASES, NUM_MICRO_BATCHES
from benchmarks.models import num_parameters
from benchmarks.ours import Side, open_side
from benchmarks.pairs import alternate, compare
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from dnb.api.runs.workers import EngineUsage

NAMES = ("mlp-25m", "mlp-large-layers", "gpt-25m")
NUM_STEPS = 6
# Peak memory of an engine with one of two stages, against one process.
REACH = 0.65


def rows(settings: Settings) -> Iterator[Row]:
    """Per model: without a limit, and with one of the share to reach of its parameters and gradients."""
    with open_side(2) as side:
        _grown(side, "warm")  # what is imported and built once is no memory of a model
        for name in NAMES:
            yield from _rows(settings, side, name)


def _rows(settings: Settings, side: Side, name: str) -> Iterator[Row]:
    limit = round(REACH * 2 * 4 * num_parameters(CASES[name]))
    figures = alternate(
        {
            "free": lambda: _grown(side, name),
            "limited": lambda: _grown(side, name, memory_limit=limit),
            "alone": lambda: _alone(name),
        },
        rounds=settings.pairs,
    )
    for kind, text in (("free", ""), ("limited", f" memory_limit={limit / 1e6:.0f}MB")):
        yield compared_row(
            f"stage of {name}{text}",
            compare(figures[kind], figures["alone"]),
            unit="MB",
            scale=1e-6,
            reach=REACH,
        )


def _grown(side: Side, name: str, **options: Any) -> float:
    """The larger of both engines."""
    case = CASES[name]
    run = side.train(
        case,
        steps=NUM_STEPS,
        batch_size=case.batch_per_engine,
        strategy="pipeline",
        micro_batch=case.batch_per_engine // NUM_MICRO_BATCHES,
        **options,
    ).run
    return float(max(_growth_of(worker) for worker in run.workers))


def _growth_of(worker: EngineUsage) -> int:
    if worker.peak_rss_bytes is None or worker.start_rss_bytes is None:
        raise RuntimeError(f"engine {worker.engine} ({worker.state}) has not said what memory it held")
    return worker.peak_rss_bytes - worker.start_rss_bytes


def _alone(name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.rivals.alone", name, str(NUM_STEPS)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
