"""The live view on narrow and wide pages: no words on other words, the chart as wide as its page, and not too high."""

import pytest

from tests.browser.lab import write_notebook
from tests.browser.test_quickstart import POINTS, keep_picture

pytestmark = pytest.mark.browser

VIEW = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from dnb.notebook.live.display import show
from tests.full_runs import full_run

run = full_run(num_engines=4)
run.history.set("accuracy", [step / 4000 for step in range(2000)])
run.history.set("val_accuracy", [0.3, 0.5], steps=[1000, 2000])
run.workers = [
    replace(worker, device="cpu", cores=1, cpu_percent=95.0, rss_bytes=312_000_000, shards=(0, 1))
    for worker in run.workers
]
show(run, display="widget")
"""
# Pairs of words whose boxes cover more of each other than a pixel, and how wide chart and page are.
WORDS = """
    const node = cells[0].node;
    const plot = node.querySelector('.js-plotly-plot');
    const texts = [...node.querySelectorAll(
        '.legendtext, .xtick text, .ytick text, .annotation-text, .xtitle, .ytitle, .dnb-engines span, .dnb-engines b'
    )].filter(each => each.textContent.trim() && each.getBoundingClientRect().width > 2 && !each.children.length);
    const boxes = texts.map(each => [each.textContent, each.getBoundingClientRect()]);
    const pairs = [];
    for (const [place, [text, box]] of boxes.entries()) {
        for (const [other, its] of boxes.slice(place + 1)) {
            const wide = Math.min(box.right, its.right) - Math.max(box.left, its.left);
            const high = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
            if (wide > 1 && high > 1) pairs.push([text, other]);
        }
    }
    const width = plot.querySelector('.main-svg').getBoundingClientRect().width;
    const room = node.querySelector('.dnb-engines').parentElement.getBoundingClientRect().width;
    const height = node.querySelector('.jp-OutputArea').getBoundingClientRect().height;
    return {pairs, width, room, height, beside: plot._fullLayout.xaxis.domain[1] < 1};
"""


def test_words_do_not_lie_on_each_other_on_pages_of_any_width(lab, notebook_folder, pytestconfig):
    write_notebook(notebook_folder / "widths.ipynb", [VIEW.format(root=str(pytestconfig.rootpath))])
    lab.open("widths.ipynb")
    lab.command("application:toggle-left-area")
    lab.run_and_wait(0)
    lab.output_area(0).locator(POINTS).first.wait_for()
    for width in (700, 1000, 1400, 2400):
        lab.page.set_viewport_size({"width": width, "height": 1300})
        fits = f"const seen = (() => {{ {WORDS} }})(); "
        beside = str(width >= 1200).lower()
        lab.wait_for(fits + f"return Math.abs(seen.width - seen.room) < 2 && seen.beside === {beside};")
        seen = lab.evaluate(WORDS)
        keep_picture(lab, f"view-{width}", index=0)
        assert seen["pairs"] == [], width
        if width == 1400:
            assert seen["height"] < 700
    assert lab.problems == []
