"""Strip and chart in JupyterLab: foreign text is shown and never run, and the keyboard reaches everything."""

import pytest

from tests.browser.lab import write_notebook
from tests.browser.test_quickstart import FIGURE_MILLISECONDS, POINTS, keep_picture

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=\"document.title='run'\">"
STRIP = f"""
import sys
sys.path.insert(0, {{root!r}})
from dataclasses import replace
from dnb.notebook.controls import Controls
from tests.fake_runs import FakeEvent, FakeRun, FakeWorker

evil = {EVIL!r}
run = FakeRun(name=evil, step=9, num_steps=20, samples_per_second=100.0)
run.history.set("loss", [1.0 / step for step in range(1, 10)])
run.workers = [
    FakeWorker(engine=0, host=evil, device="cpu", cores=2, cpu_percent=181.0, shards=(0, 1), samples=900, steps=9),
    FakeWorker(engine=1, host="$x$", device=evil, state="dead"),
]
run.events = [FakeEvent(kind="died", text=evil, step=3, engine=1)]
controls = Controls(run)
controls.box
"""
WIDE = """
run.workers = [FakeWorker(engine=i, compute=i / 64, host=evil) for i in range(64)]
controls._due.clear(); controls.refresh()
"""
CHART = """
from dnb.notebook.display import show
run.status = "running"
run.history.set("val_" + evil, [0.5], steps=[9])
show(run, display="widget")
"""
END = "run.end('failed', error=evil)"
AGAIN = "run.step = 10; run.history.append('loss', 10, 0.05); controls._due.clear(); controls.refresh()"


def test_the_strip_shows_foreign_text_and_is_reached_by_keyboard(lab, notebook_folder, pytestconfig):
    cells = [STRIP.format(root=str(pytestconfig.rootpath)), AGAIN, WIDE, CHART, END]
    write_notebook(notebook_folder / "strip.ipynb", cells)
    lab.open("strip.ipynb")
    lab.run_and_wait(0)
    area = lab.output_area(0)
    area.locator(".dnb-cards li").first.wait_for()
    keep_picture(lab, "strip", index=0)
    assert area.inner_text().count(EVIL) >= 4
    assert area.locator("img").count() == 0
    assert "CPU\n180 % of 200 %" in area.inner_text()

    words, opener = area.locator(".dnb-words-text"), area.locator("summary")
    assert not words.is_visible()
    opener.focus()
    lab.page.keyboard.press("Enter")
    words.wait_for()
    lab.run_and_wait(1)
    words.get_by_text("loss 0.0500 at step 10").wait_for()

    area.get_by_role("button", name="Pause").focus()
    reached = []
    for _ in range(7):
        reached.append(lab.evaluate("return document.activeElement.innerText.trim();"))
        lab.page.keyboard.press("Tab")
    assert reached == ["Pause", "Stop", "Checkpoint", "this chart in words", "step", "samples", "time"]
    area.get_by_role("button", name="Checkpoint").focus()
    lab.page.keyboard.press("Enter")
    area.get_by_text("checkpoint written: /work/checkpoints/step-10").wait_for()

    lab.run_and_wait(2)
    area.locator(".dnb-heat td.s4").first.wait_for()
    keep_picture(lab, "strip-of-64", index=0)
    assert area.locator(".dnb-heat td[class^=s]").count() == 64

    lab.run_and_wait(3)
    chart = lab.output_area(3)
    chart.locator(POINTS).first.wait_for(timeout=FIGURE_MILLISECONDS)
    assert EVIL in chart.inner_text()
    lab.run_and_wait(4)
    lab.wait_for_picture(3)
    chart.locator("svg.main-svg .gtitle").get_by_text("<img").first.wait_for(timeout=FIGURE_MILLISECONDS)
    keep_picture(lab, "chart-of-foreign-text", index=3)
    assert lab.evaluate("return document.title;") != "run"
    assert lab.problems == []
