"""What the live view costs, and what telemetry costs: the same run with each and without."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from benchmarks.models import CASES, Case
from benchmarks.ours import Side, open_side, wait_for_step
from benchmarks.pairs import alternate, compare
from benchmarks.rows.step import train_ours
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from benchmarks.viewer import Browserless, Viewer

NAMES = ("tiny", "cnn")
NUM_ENGINES = 2
REACH = 1.01
# 2 % is far below the noise of one turn: many short ones are taken.
VIEW_ROUNDS_FACTOR = 12
TELEMETRY_ROUNDS_FACTOR = 6
WINDOW_SECONDS = 1.0
# After a change of sides: the painter may be at work, and a step belongs to both.
SETTLE_SECONDS = 0.1
PROBE_STEPS = {"tiny": 300, "cnn": 15}
WARM_STEPS = 5


def rows(settings: Settings) -> Iterator[Row]:
    """Per case, one row for the view and one for telemetry; what both cost is the two together."""
    with open_side(NUM_ENGINES) as side:
        for name in NAMES:
            seconds = train_ours(side, CASES[name], steps=PROBE_STEPS[name])
            yield _view_row(settings, CASES[name], side, seconds)
            yield _telemetry_row(settings, CASES[name], side, seconds)


def _view_row(settings: Settings, case: Case, side: Side, step_seconds: float) -> Row:
    """One long run, watched in every second window; windows that lie side by side are a pair."""
    rounds = settings.pairs if settings.is_quick else VIEW_ROUNDS_FACTOR * settings.pairs
    viewer = Viewer()
    run = side.submit(case, steps=10 * round(2 * rounds * WINDOW_SECONDS / step_seconds))
    viewer.watch(run)
    viewer.wait_for_figure()
    wait_for_step(run, run.step + WARM_STEPS)
    before = Browserless.num_bytes
    windows: dict[str, list[tuple[float, float]]] = {"watched": [], "unwatched": []}
    alternate(
        {
            "watched": partial(_window, windows["watched"], viewer, is_watching=True),
            "unwatched": partial(_window, windows["unwatched"], viewer, is_watching=False),
        },
        rounds=rounds,
    )
    kilobytes = (Browserless.num_bytes - before) / (rounds * WINDOW_SECONDS) / 1e3
    run.stop()
    run.wait()
    viewer.close()
    with open(run.folder / "history.jsonl") as file:
        commits = [float(json.loads(line)["time"]) for line in file]
    return compared_row(
        f"watching {case.name} N={side.num_engines} / unwatched",
        compare(*(_mean_steps(commits, windows[name]) for name in ("watched", "unwatched"))),
        unit="ms",
        scale=1e3,
        reach=REACH,
        details={"kilobytes_to_the_browser_per_second": kilobytes},
    )


def _window(windows: list[tuple[float, float]], viewer: Viewer, *, is_watching: bool) -> float:
    viewer.be_watching(is_watching)
    time.sleep(SETTLE_SECONDS)
    begin = time.time()
    time.sleep(WINDOW_SECONDS)
    windows.append((begin, time.time()))
    return 0.0


def _mean_steps(commits: Sequence[float], windows: Sequence[tuple[float, float]]) -> list[float]:
    """Mean seconds of the steps that lie within each window."""
    means = []
    for begin, end in windows:
        inside = [when for when in commits if begin <= when <= end]
        means.append(statistics.fmean(later - earlier for earlier, later in pairwise(inside)))
    return means


def _telemetry_row(settings: Settings, case: Case, side: Side, step_seconds: float) -> Row:
    steps = round(WINDOW_SECONDS / step_seconds)
    turn = partial(train_ours, side, case, steps=steps)
    rounds = settings.pairs if settings.is_quick else TELEMETRY_ROUNDS_FACTOR * settings.pairs
    figures = alternate({"with": turn, "without": partial(turn, telemetry=False)}, rounds=rounds)
    return compared_row(
        f"telemetry {case.name} N={side.num_engines} / without",
        compare(figures["with"], figures["without"]),
        unit="ms",
        scale=1e3,
        reach=REACH,
        details={"steps_per_turn": steps},
    )
