"""What telemetry and the live view cost together: the same run watched, unwatched, and without telemetry."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.models import CASES, Case
from benchmarks.ours import NotAvailableError, Side, open_side
from benchmarks.pairs import alternate, compare
from benchmarks.rows.step import train_ours
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from benchmarks.viewer import Browserless, Viewer

NAMES = ("tiny", "cnn")
NUM_ENGINES = 2
REACH = 1.02
# 2 % is below the noise of one turn: many are taken.
PAIRS_FACTOR = 3
TURN_SECONDS = 3.0
# The figure is built meanwhile, once in a run's life however long that is.
UNCOUNTED_SHARE = 0.4
PROBE_STEPS = {"tiny": 300, "cnn": 15}


def rows(settings: Settings) -> Iterator[Row]:
    """Per case, one row against the same run unwatched, one against a run without telemetry."""
    viewer = Viewer()
    with open_side(NUM_ENGINES) as side:
        for name in NAMES:
            yield from _rows(settings, CASES[name], side, viewer)


def _rows(settings: Settings, case: Case, side: Side, viewer: Viewer) -> Iterator[Row]:
    seconds = train_ours(side, case, steps=PROBE_STEPS[case.name])
    steps = round(TURN_SECONDS / seconds)
    _seconds(side, case, steps=steps, viewer=viewer)  # plotly takes seconds to import
    unwatched: dict[str, dict[str, Any]] = {"unwatched": {}}
    try:
        _seconds(side, case, steps=steps, telemetry=False)
        unwatched["without telemetry"] = {"telemetry": False}
    except NotAvailableError as lack:
        yield Row(name=f"watching {case.name} / without telemetry", unit="ms", is_available=False, note=str(lack))
    sides: dict[str, Callable[[], float]] = {
        name: partial(_seconds, side, case, steps=steps, **options) for name, options in unwatched.items()
    }
    sides["watched"] = partial(_seconds, side, case, steps=steps, viewer=viewer)
    before = Browserless.num_bytes
    rounds = settings.pairs if settings.is_quick else PAIRS_FACTOR * settings.pairs
    figures = alternate(sides, rounds=rounds)
    kilobytes = (Browserless.num_bytes - before) / rounds / 1e3
    for name in unwatched:
        compared = compare(figures["watched"], figures[name])
        details = {"steps_per_turn": steps, "kilobytes_to_the_browser_per_turn": kilobytes}
        row_name = f"watching {case.name} N={side.num_engines} / {name}"
        yield compared_row(row_name, compared, unit="ms", scale=1e3, reach=REACH, details=details)


def _seconds(side: Side, case: Case, *, steps: int, viewer: Viewer | None = None, **options: Any) -> float:
    """Mean step time of a turn's later part."""
    training = side.train(case, steps=steps, watch=None if viewer is None else viewer.watch, **options)
    if viewer is not None:
        viewer.close()
    return statistics.fmean(training.step_seconds[round(UNCOUNTED_SHARE * steps) :])
