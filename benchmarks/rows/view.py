"""What the view costs the kernel and the browser, and how soon it shows what happens."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comm
import msgspec
import psutil

from benchmarks.pairs import spread
from benchmarks.settings import Settings
from benchmarks.table import Row
from benchmarks.viewer import Browserless
from benchmarks.viewing import watch_in_browser
from dnb.api.runs.history import History
from dnb.protocol.measurements import UsageRow
from tests.browser.lab import find_chromium
from tests.fake_runs import long_run, usage_rows

NUM_STEPS, NUM_ENGINES = 100_000, 4
WARM_REFRESHES, REFRESHES, QUICK_REFRESHES = 200, 2_000, 200


def rows(settings: Settings) -> Iterator[Row]:
    """The kernel's part without a browser, then a real JupyterLab in Chromium."""
    yield from _kernel_rows(settings)
    if find_chromium() is None:
        yield Row(name="in the browser", unit="s", is_available=False, note="there is no Chromium")
        return
    with tempfile.TemporaryDirectory(prefix="bench-lab-") as home:
        yield from watch_in_browser(settings, home=Path(home))


def _kernel_rows(settings: Settings) -> Iterator[Row]:
    comm.create_comm = Browserless
    from dnb.notebook.live.dashboard import Dashboard

    run = _long_run()
    dashboard = Dashboard(run, interval_seconds=3600.0, publish=_drop)  # its own painter paints once, and sleeps
    dashboard.show()
    _wait_for_figure(dashboard)
    _refresh(dashboard, run, times=WARM_REFRESHES)
    before = _resident_bytes()
    times = QUICK_REFRESHES if settings.is_quick else REFRESHES
    seconds, sizes = _refresh(dashboard, run, times=times)
    grown = _resident_bytes() / before
    dashboard.close()
    name = f"{NUM_ENGINES} engines, {NUM_STEPS:,} steps"
    yield Row(
        name=f"CPU of a refresh, {name}",
        unit="ms",
        ours=spread([1e3 * value for value in seconds]),
        reach=5.0,
        figure=1e3 * statistics.median(seconds),
        details={"mean": 1e3 * statistics.mean(seconds), "most": 1e3 * max(seconds)},
    )
    yield Row(
        name=f"bytes of a refresh, {name}",
        unit="kB",
        ours=spread([size / 1e3 for size in sizes]),
        reach=20.0,
        figure=statistics.mean(sizes) / 1e3,
        details={"most": max(sizes) / 1e3},
    )
    yield Row(
        name=f"kernel's memory after {times:,} refreshes / before",
        unit="times",
        ours=spread([grown]),
        reach=1.05,
        figure=grown,
    )


def _long_run() -> Any:
    run = long_run(num_steps=NUM_STEPS, num_engines=NUM_ENGINES)
    history = History()
    for name in run.history:
        history.append(name, *(column.tolist() for column in run.history.column(name)))
    steps = range(1, NUM_STEPS + 1)
    history.append("lr", steps, [1e-3] * NUM_STEPS)
    history.append("grad_norm", steps, [1.0 + 0.01 * (step % 17) for step in steps])
    history.append("samples_per_second", steps, [2400.0 + step % 31 for step in steps])
    history.append("seconds", steps, [0.01 * step for step in steps])
    run.history = history
    run.utilisation.extend(usage_rows(1_000, engines=tuple(range(NUM_ENGINES))))
    return run


def _refresh(dashboard: Any, run: Any, *, times: int) -> tuple[list[float], list[int]]:
    """CPU seconds and bytes of each refresh; between two of them the run has gone on."""
    seconds, sizes = [], []
    for number in range(times):
        run.step += 1
        for name in ("loss", "lr", "grad_norm", "samples_per_second", "seconds"):
            run.history.append(name, [run.step], [1.0 + 0.01 * (number % 7)])
        compute = 0.5 + 0.01 * (run.step % 9)
        run.workers = [replace(worker, compute=compute, wait=0.8 - compute, data=0.15) for worker in run.workers]
        if number % 4 == 0:  # the hub closes a span once a second at most; the view asks some three times
            run.utilisation.extend([_next_span(run)])
        before, cpu = Browserless.num_bytes, time.process_time()
        dashboard.paint()
        seconds.append(time.process_time() - cpu)
        sizes.append(Browserless.num_bytes - before)
    return seconds, sizes


def _next_span(run: Any) -> UsageRow:
    end = run.utilisation.spans(limit=NUM_STEPS).edges[-1]
    (row,) = usage_rows(1, engines=run.utilisation.engines)
    return msgspec.structs.replace(row, begin_seconds=end, end_seconds=end + 1.0, step=run.step)


def _wait_for_figure(dashboard: Any) -> None:
    limit = time.monotonic() + 60
    while dashboard.figure is None:
        if time.monotonic() > limit:
            raise TimeoutError("there was no figure within 60 s")
        time.sleep(0.05)


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _drop(content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
    del content, display_id, update
