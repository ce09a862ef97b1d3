"""Memory of the whole tree in mid-run beyond what it had just before, as bytes per parameter; against DDP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import psutil

from benchmarks.models import CASES, num_parameters
from benchmarks.ours import Side, open_side, wait_for_step
from benchmarks.pairs import compare, spread
from benchmarks.rivals.gang import Gang
from benchmarks.rivals.messages import Train
from benchmarks.rows.step import DDP
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from benchmarks.workspace import segment_folders

CASE = CASES["mlp-17m-few"]
WARM = CASES["tiny"]
NUMBERS_OF_ENGINES = (1, 2, 4)
STEADY_STEP = 4
NUM_LOOKS = 8
LOOK_SECONDS = 0.27  # no multiple of a step
NUM_STEPS = 24
# What the hub holds, and what every engine adds: parameters and two moments, and a gradient.
HUB_BYTES, ENGINE_BYTES = 12, 4


def rows(settings: Settings) -> Iterator[Row]:
    """Per number of engines, bytes per parameter in all; then what one more engine adds."""
    del settings  # bytes do not swing: one run of each side, several looks at it
    count = num_parameters(CASE)
    activations = activation_bytes() / count
    medians: dict[int, tuple[float, float]] = {}
    for num_engines in NUMBERS_OF_ENGINES:
        ours, parts = _ours(num_engines)
        rival = _growth(DDP, num_ranks=num_engines)
        compared = compare([size / count for size in ours], [size / count for size in rival])
        medians[num_engines] = compared.ours.median, compared.rival.median
        yield compared_row(
            f"memory N={num_engines}",
            compared,
            unit="B/param",
            figure=compared.ours.median,
            reach=HUB_BYTES + (ENGINE_BYTES + activations) * num_engines,
            note=f"{', '.join(f'{name} {size / count:.1f}' for name, size in parts.items())} B/param; "
            f"reach allows {activations:.1f} B/param per engine for activations, as plain torch was seen to need",
            details={"parameters": count, "activation_bytes_per_engine": activations * count},
        )
    first, last = NUMBERS_OF_ENGINES[0], NUMBERS_OF_ENGINES[-1]
    added = [(medians[last][index] - medians[first][index]) / (last - first) for index in (0, 1)]
    yield Row(
        name="memory of one more engine",
        unit="B/param",
        ours=spread(added[:1]),
        rival=spread(added[1:]),
        ratio=spread([added[0] / added[1]]),
        figure=added[0],
        reach=ENGINE_BYTES + activations,
    )


def activation_bytes() -> float:
    """What a plain process needs in mid-step besides parameters and gradients, scratch space included."""
    growth = _growth("benchmarks.rivals.plain", num_ranks=1)
    return statistics.median(growth) - 2 * 4 * num_parameters(CASE)


def _ours(num_engines: int) -> tuple[list[float], dict[str, float]]:
    """Growth of the tree at each look, and by part at the last one; the kernel's own model was there before."""
    with open_side(num_engines) as side:
        side.train(WARM, steps=20)
        made = CASE.make_model(), CASE.data()
        parts = _parts(side)
        before = {name: _pss(processes) for name, processes in parts.items()}
        run = side.submit(CASE, steps=NUM_STEPS * 10, made=made)
        wait_for_step(run, STEADY_STEP)
        looks = list(_looks(parts))
        segments = sum(file.stat().st_size for folder in segment_folders() for file in folder.glob("dnb-*/*"))
        run.stop()
        run.wait()
    growth = [sum(look.values()) - sum(before.values()) for look in looks]
    by_part: dict[str, float] = {name: looks[-1][name] - before[name] for name in parts}
    return growth, {**by_part, "of these in shared-memory files": segments}


def _parts(side: Side) -> Mapping[str, list[psutil.Process]]:
    facts = side.pool.facts
    return {
        "kernel": [psutil.Process()],
        "hub": [psutil.Process(facts.hub.pid)],
        "engines": [psutil.Process(engine.process.pid) for engine in facts.engines],
        "others": [psutil.Process(process.pid) for process in (facts.controller, *facts.helpers)],
    }


def _growth(module: str, *, num_ranks: int) -> list[float]:
    """Growth of a gang at each look."""
    with Gang(module, num_ranks=num_ranks) as gang:
        gang.turn(Train(case=WARM.name, steps=20))
        parts = {"ranks": gang.processes}
        before = _pss(parts["ranks"])
        looks: list[float] = []
        request = Train(case=CASE.name, steps=NUM_STEPS, progress_at=STEADY_STEP)
        gang.turn(request, on_progress=partial(_look_on, parts, looks))
    return [look - before for look in looks]


def _look_on(parts: Mapping[str, list[psutil.Process]], looks: list[float]) -> None:
    looks.extend(sum(look.values()) for look in _looks(parts))


def _looks(parts: Mapping[str, list[psutil.Process]]) -> Iterator[dict[str, float]]:
    for _ in range(NUM_LOOKS):
        yield {name: _pss(processes) for name, processes in parts.items()}
        time.sleep(LOOK_SECONDS)


def _pss(processes: Iterable[psutil.Process]) -> float:
    return float(sum(process.memory_full_info().pss for process in processes))
