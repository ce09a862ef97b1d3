"""A notebook in a real JupyterLab and Chromium that trains while it is measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, sync_playwright

from benchmarks.pairs import spread
from benchmarks.settings import Settings
from benchmarks.table import Row
from tests.browser.lab import CHROMIUM_FLAGS, LabPage, LabServer, find_chromium, write_notebook

POINTS = "svg.main-svg .scatterlayer path.js-line"
SETUP = """
import gc, psutil, time, torch, dnb.api.runs.run_follower
from sklearn.datasets import load_digits
from torch import nn

pixels, targets = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(targets)

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return len(images)

    def __getitem__(self, index):
        time.sleep(0.001)
        return images[index], labels[index]

train, val = Slow(), (images[:300], labels[:300])
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
"""
# The widgets' own code, 5 MB of plotly.js, is loaded before the clock starts; the buttons of this run are pressed.
LOAD = "early = %dtrain fit model train --val val --loss cross_entropy --epochs 20000"
# Samples come as from a slow disk: two engines would leave nothing of two cores to page and kernel.
FIT = "run = %dtrain fit model train --val val --loss cross_entropy --epochs 20000"
# As fast as the page draws, so that two thousand refreshes take minutes; `paints` counts them.
FAST = """
from dnb.notebook.live.browser import live_figure
from dnb.notebook.live.display import dashboard_of
from dnb.notebook.live.browser.live_figure import LiveFigure
dnb.api.runs.run_follower.REFRESH_SECONDS = 0.02
live_figure._PAGE_SHARE = 1.0
paints = 0
paint = LiveFigure.paint
def counted(self, drawing, **kinds):
    global paints
    paints += 1
    paint(self, drawing, **kinds)
LiveFigure.paint = counted
run = %dtrain fit model train --val val --loss cross_entropy --epochs 200000
dashboard_of(run)._painter._interval = 0.02
"""
SAY = """
gc.collect()
print(paints, psutil.Process().memory_info().rss)
"""
CELLS = {
    "load": "%load_ext dnb",
    "start": "%dtrain start -n 2",
    "setup": SETUP,
    "early": LOAD,
    "end early": "%dtrain stop",
    "fit": FIT,
    "step": "print(run.step)",
    "stop": "%dtrain stop",
    "fast": FAST,
    "say": SAY,
    "end": "%dtrain stop",
    "shutdown": "%dtrain shutdown",
}
BUSY_SECONDS = 20.0
PRESSES = 10
SETTLE_SECONDS = 0.7  # between two presses: a person does not press in the very moment of the effect
WARM_REFRESHES, REFRESHES, QUICK_REFRESHES = 200, 2_000, 100


def cell(name: str) -> int:
    """Its number in the notebook."""
    return list(CELLS).index(name)


def watch_in_browser(settings: Settings, *, home: Path) -> Iterator[Row]:
    """Rows for what a person at the screen notices.

    Args:
        settings: how much.
        home: a folder for JupyterLab's files and the notebook.
    """
    root = home / "root"
    root.mkdir()
    write_notebook(root / "view.ipynb", list(CELLS.values()))
    with (
        LabServer(root=root, home=home) as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS) as chromium,
    ):
        context = chromium.new_context(viewport={"width": 1400, "height": 1000})
        context.set_default_timeout(120_000)
        lab = LabPage(context, server)
        lab.open("view.ipynb")
        for index in range(cell("fit")):
            lab.run_and_wait(index)
            if index == cell("early"):
                lab.output_area(index).locator(POINTS).first.wait_for(timeout=60_000)
                presses = [_press(lab, turn) for turn in range(PRESSES)]  # this run's chart is full of marks then
                yield _seconds_row("press of a button to its effect", presses, reach=0.5)
        lab.wait_for_picture(cell("early"))
        lab.evaluate("cells[argument].model.outputs.clear();", cell("early"))  # one run is to be saved, not two
        yield from _live_rows(lab, context.new_cdp_session(lab.page))
        yield _saved_row(lab, root / "view.ipynb")
        yield from _memory_rows(settings, lab, context.new_cdp_session(lab.page))
        lab.run_and_wait(cell("shutdown"))
        server.shut_down_kernels()


def _live_rows(lab: LabPage, devtools: CDPSession) -> Iterator[Row]:
    begin = time.monotonic()
    lab.run(cell("fit"))
    _curve(lab).wait_for(timeout=60_000)
    yield _seconds_row("fit to the first curve", [time.monotonic() - begin], reach=3.0)
    yield _busy_row(devtools)
    step = int(lab.run_and_wait(cell("step"))[0]["text"])
    lab.save()  # JupyterLab forgets outputs that are in no file yet, whoever made them
    lab.reload()
    begin = time.monotonic()
    lab.page.locator(f"img.dnb-still, {POINTS}").first.wait_for(timeout=60_000)
    picture_seconds = time.monotonic() - begin
    _wait_for_step(lab, step)
    yield _seconds_row("page and kernel ready to a picture of the chart", [picture_seconds], reach=None)
    yield _seconds_row("page and kernel ready to the whole history, live", [time.monotonic() - begin], reach=2.0)
    lab.run_and_wait(cell("stop"))
    lab.wait_for_picture(cell("stop"))


def _busy_row(devtools: CDPSession) -> Row:
    """CPU time of the page's main thread: in wall time, waiting for a core would count as being busy."""
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    begin, before = time.monotonic(), _metric(devtools, "TaskDuration")
    time.sleep(BUSY_SECONDS)  # what is measured is what happens meanwhile
    share = (_metric(devtools, "TaskDuration") - before) / (time.monotonic() - begin)
    devtools.send("Performance.disable")
    return Row(name="browser's main thread busy", unit="of time", ours=spread([share]), reach=0.30, figure=share)


# Clicks a button, and gives the milliseconds until it offers what undoes that: the run has paused, or trains again.
PRESS = """([cell, word, other]) => new Promise(resolve => {
    const area = document.querySelectorAll('.jp-Notebook .jp-Cell')[cell].querySelector('.jp-OutputArea');
    const button = [...area.querySelectorAll('button')].find(each => each.innerText.trim() === word);
    const begin = performance.now();
    const timer = setInterval(() => {
        if (button.innerText.trim() !== other) return;
        clearInterval(timer);
        resolve(performance.now() - begin);
    }, 5);
    button.click();
})"""


def _press(lab: LabPage, turn: int) -> float:
    """Pause, and at the next turn resume; in seconds."""
    words = ("Pause", "Resume") if turn % 2 == 0 else ("Resume", "Pause")
    lab.output_area(cell("early")).get_by_role("button", name=words[0]).wait_for(timeout=30_000)
    time.sleep(SETTLE_SECONDS)
    return float(lab.page.evaluate(PRESS, [cell("early"), *words])) / 1e3


def _saved_row(lab: LabPage, path: Path) -> Row:
    lab.save()
    size = os.path.getsize(path) / 1e3
    shown = [output["data"] for output in lab.outputs(cell("fit")) if "data" in output]
    shown += [output["data"] for output in lab.outputs(cell("stop")) if "data" in output]
    has_chart = any("application/vnd.plotly.v1+json" in data for data in shown)
    return Row(
        name="saved notebook after a run",
        unit="kB",
        ours=spread([size]),
        reach=300.0,
        figure=size if has_chart else float("inf"),
        note="" if has_chart else "there is no chart in it",
    )


def _memory_rows(settings: Settings, lab: LabPage, devtools: CDPSession) -> Iterator[Row]:
    lab.run_and_wait(cell("fast"))
    lab.output_area(cell("fast")).locator(POINTS).first.wait_for(timeout=60_000)
    times = QUICK_REFRESHES if settings.is_quick else REFRESHES
    before = _memory_after(lab, devtools, refreshes=WARM_REFRESHES)
    after = _memory_after(lab, devtools, refreshes=WARM_REFRESHES + times)
    lab.run_and_wait(cell("end"))
    for name, old, new in zip(("kernel", "browser"), before, after, strict=True):
        yield Row(
            name=f"{name}'s memory after {times:,} live refreshes / before",
            unit="times",
            ours=spread([new / old]),
            reach=1.05,
            figure=new / old,
            note=f"{old / 1e6:.0f} MB before",
        )


def _memory_after(lab: LabPage, devtools: CDPSession, *, refreshes: int) -> tuple[float, float]:
    """Bytes of the kernel, and of the page's heap after garbage was collected."""

    def said() -> list[int]:
        return [int(word) for word in lab.run_and_wait(cell("say"))[0]["text"].split()]

    _wait(lambda: said()[0] >= refreshes, limit_seconds=600)
    devtools.send("HeapProfiler.collectGarbage")
    return float(said()[1]), float(devtools.send("Runtime.getHeapUsage")["usedSize"])


def _curve(lab: LabPage) -> Any:
    return lab.output_area(cell("fit")).locator(POINTS).first


def _wait_for_step(lab: LabPage, step: int) -> None:
    """Until the first curve under the fit begins at the run's beginning and reaches this step."""
    lab.page.wait_for_function(
        """([cell, step]) => {
            const cells = document.querySelectorAll('.jp-Notebook .jp-Cell');
            const plot = cells[cell]?.querySelector('.js-plotly-plot');
            const xs = plot?.data?.find(trace => trace.type === 'scatter' && trace.x?.length > 1)?.x;
            return xs && xs[0] <= 1 && xs[xs.length - 1] >= step;
        }""",
        arg=[cell("fit"), step],
        timeout=60_000,
    )


def _metric(devtools: CDPSession, name: str) -> float:
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    return float(next(metric["value"] for metric in metrics if metric["name"] == name))


def _seconds_row(name: str, seconds: list[float], *, reach: float | None) -> Row:
    return Row(name=name, unit="s", ours=spread(seconds), reach=reach, figure=statistics.median(seconds))


def _wait(claim: Callable[[], bool], *, limit_seconds: float) -> None:
    limit = time.monotonic() + limit_seconds
    while not claim():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {limit_seconds:g} s")
        time.sleep(2.0)
