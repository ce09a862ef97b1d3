"""Strip and chart in JupyterLab: foreign text is shown and never run, and the keyboard reaches everything."""

import pytest

from tests.browser.lab import write_notebook
from tests.browser.test_quickstart import POINTS, keep_picture

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=\"document.title='run'\">"
STRIP = f"""
import sys
sys.path.insert(0, {{root!r}})
from dataclasses import replace
from dnb.notebook.live.controls import Controls
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
from dnb.notebook.live.display import show
run.status = "running"
run.history.set("val_" + evil, [0.5], steps=[9])
run.history.set("seconds", [10.0 * step for step in range(1, 11)])
show(run, display="widget")
"""
ON = """
from dnb.notebook.live.display import dashboard_of
run.step = 11; run.history.append("loss", 11, 0.04); run.history.append("seconds", 11, 110.0); run.tell()
"""
END = "run.end('failed', error=evil)"
# What the page has: which figures stand on the x axis, how far it is zoomed, and how many points the loss has.
AXIS = """
    const plot = cells[argument].node.querySelector('.js-plotly-plot');
    return {
        title: plot.layout.xaxis.title.text,
        ticks: [...plot.querySelectorAll('.xtick text')].map(each => each.textContent),
        ends: plot._fullLayout.xaxis.range,
        points: Math.max(...plot.data.filter(trace => trace.type === 'scatter').map(trace => trace.x.length)),
    };
"""
TITLE = """
    const plot = cells[argument].node.querySelector('.js-plotly-plot');
    return plot.querySelector('.gtitle').getBoundingClientRect().top - plot.getBoundingClientRect().top;
"""
ZOOM = """
    const plot = cells[argument].node.querySelector('.js-plotly-plot');
    const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
    return [box.left, box.right, box.top + box.height / 2];
"""
AGAIN = """
run.workers = [replace(run.workers[0], samples=1234, steps=10), run.workers[1]]
run.step = 10; run.history.append('loss', 10, 0.05); controls._due.clear(); controls.refresh()
"""


def see_time_and_zoom(lab, chart):
    """The x axis becomes one of seconds, with new data, too, and keeps a person's zoom."""
    chart.get_by_role("button", name="time", exact=True).click()
    wait_for_axis(lab, "axis.title.endsWith('(s)')")
    lab.evaluate("cells[argument].node.querySelector('.js-plotly-plot').scrollIntoView({block: 'center'});", 3)
    left, right, middle = lab.evaluate(ZOOM, 3)
    lab.page.mouse.move(left + 0.25 * (right - left), middle)
    lab.page.mouse.down()
    lab.page.mouse.move(left + 0.75 * (right - left), middle, steps=5)
    lab.page.mouse.up()
    wait_for_axis(lab, "axis.ends[1] - axis.ends[0] < 80")
    zoomed = lab.evaluate(AXIS, 3)
    lab.run_and_wait(4)
    wait_for_axis(lab, "axis.points === 11")
    seen = lab.evaluate(AXIS, 3)
    assert seen["ends"] == zoomed["ends"]
    assert {"40", "60"} <= set(seen["ticks"])


def wait_for_axis(lab, claim):
    lab.wait_for(f"const axis = (argument => {{ {AXIS} }})(argument); return {claim};", 3)


def test_the_strip_shows_foreign_text_and_is_reached_by_keyboard(lab, notebook_folder, pytestconfig):
    cells = [STRIP.format(root=str(pytestconfig.rootpath)), AGAIN, WIDE, CHART, ON, END]
    write_notebook(notebook_folder / "strip.ipynb", cells)
    lab.open("strip.ipynb")
    lab.run_and_wait(0)
    area = lab.output_area(0)
    area.locator(".dnb-row").nth(1).wait_for()
    keep_picture(lab, "strip", index=0)
    assert area.inner_text().count(EVIL) >= 4
    assert area.locator("img").count() == 0
    assert "180 % of 200 %" in area.inner_text()

    row, more = area.locator(".dnb-row > button").first, area.locator(".dnb-more").first
    assert (more.is_visible(), row.get_attribute("aria-expanded")) == (False, "false")
    row.focus()
    lab.page.keyboard.press("Enter")
    more.wait_for()
    assert row.get_attribute("aria-expanded") == "true"
    words, opener = area.locator(".dnb-words-text"), area.locator("summary")
    assert not words.is_visible()
    opener.focus()
    lab.page.keyboard.press("Enter")
    words.wait_for()
    lab.run_and_wait(1)
    words.get_by_text("loss 0.0500 at step 10").wait_for()
    more.get_by_text("1.23 k in 10 steps").wait_for()  # as it is now, and still unfolded

    area.get_by_role("button", name="Pause").focus()
    reached = []
    for _ in range(10):
        reached.append(lab.evaluate("return document.activeElement.innerText.trim().split('\\n')[0];"))
        lab.page.keyboard.press("Tab")
    assert reached[:3] == ["Pause", "Stop", "Checkpoint"]
    assert reached[5:] == ["text summary", "log loss", "step", "samples", "time"]
    area.get_by_role("button", name="Checkpoint").focus()
    lab.page.keyboard.press("Enter")
    area.get_by_text("checkpoint written: /work/checkpoints/step-10").wait_for()

    lab.run_and_wait(2)
    area.locator(".dnb-heat td.s4").first.wait_for()
    keep_picture(lab, "strip-of-64", index=0)
    assert area.locator(".dnb-heat td[class^=s]").count() == 64

    lab.run_and_wait(3)
    chart = lab.output_area(3)
    chart.locator(POINTS).first.wait_for()
    assert EVIL in chart.inner_text()
    see_time_and_zoom(lab, chart)
    lab.run_and_wait(5)
    lab.wait_for_picture(3)
    chart.locator("svg.main-svg .gtitle").get_by_text("<img").first.wait_for()
    keep_picture(lab, "chart-of-foreign-text", index=3)
    assert lab.evaluate(TITLE, 3) > 0  # all of its lines can be read
    assert lab.evaluate("return document.title;") != "run"
    assert lab.problems == []
