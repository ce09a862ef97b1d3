"""The timeline of a divided run in JupyterLab, as a person would see it."""

import pytest

from tests.browser.lab import write_notebook
from tests.browser.test_quickstart import keep_picture

pytestmark = [pytest.mark.browser, pytest.mark.engines]

SETUP = """
import torch
from torch import nn

torch.manual_seed(0)
layers = [nn.Linear(64, 512), *(layer for _ in range(10) for layer in (nn.Linear(512, 512), nn.ReLU()))]
model = nn.Sequential(*layers, nn.Linear(512, 10))
train = torch.randn(4096, 64), torch.randint(0, 10, (4096,))
"""
FIT = """
run = %dtrain fit model train --loss cross_entropy --strategy pipeline --batch-size 512 --micro-batch 64 --epochs 200
"""
PICTURE = "img.plot-img"  # Lab shows the picture of a chart that has one, and the chart itself at a click
BARS = "svg.main-svg .xy .barlayer .trace.bars, svg.main-svg .x3y3 .barlayer .trace.bars path"


def test_the_timeline_is_drawn_below_the_loss_and_by_itself(lab, notebook_folder):
    cells = ["%load_ext dnb", "%dtrain start -n 2", SETUP, FIT, "run.timeline", "%dtrain stop", "%dtrain shutdown"]
    write_notebook(notebook_folder / "timeline.ipynb", cells)
    lab.open("timeline.ipynb")
    for index in range(4):
        lab.run_and_wait(index)
    lab.output_area(3).locator("svg.main-svg .x3y3 .barlayer path").first.wait_for()
    lab.output_area(3).locator("svg.main-svg").get_by_text("bubble").first.wait_for()
    keep_picture(lab, "timeline-live", index=3)
    lab.run_and_wait(4)
    lab.output_area(4).locator(PICTURE).first.wait_for()
    keep_picture(lab, "timeline-alone", index=4)
    for index in (5, 6):
        lab.run_and_wait(index)
    lab.wait_for_picture(3)
    outputs = lab.save().cells[3].outputs  # on a slow machine a line on long work is before it
    (saved,) = [output.data for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert "bubble" in saved["text/plain"]
    assert "forward" in [trace["name"] for trace in saved["application/vnd.plotly.v1+json"]["data"]]
    keep_picture(lab, "timeline-end", index=3)
    assert lab.problems == []
