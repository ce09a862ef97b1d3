"""The control panel in JupyterLab: a pool started, a run steered and both ended without typing a line."""

import re

import pytest

from tests.browser.lab import write_notebook
from tests.browser.test_quickstart import POINTS, SETUP, keep_picture

pytestmark = [pytest.mark.browser, pytest.mark.engines]


def test_a_run_is_trained_and_steered_by_clicking(lab, notebook_folder):
    write_notebook(notebook_folder / "panel.ipynb", ["%load_ext dnb\n%dtrain panel", SETUP])
    lab.open("panel.ipynb")
    for index in range(2):
        lab.run_and_wait(index)
    panel = lab.output_area(0)

    def press(name: str) -> None:
        # the live view has buttons of its own, below those of the panel
        panel.get_by_role("button", name=re.compile(rf"\b{name}$")).first.click()

    def wait_for(name: str) -> None:
        panel.get_by_role("button", name=re.compile(rf"\b{name}$")).first.wait_for()

    panel.get_by_label("Engines").fill("2")
    panel.get_by_text("%dtrain start -n 2").wait_for()
    press("Start")
    wait_for("Shut down")
    panel.get_by_label("Loss or step").select_option("cross_entropy")
    panel.get_by_label("Epochs").fill("20000")
    keep_picture(lab, "panel-chosen", index=0)
    press("Fit")
    wait_for("Pause")
    panel.locator(POINTS).first.wait_for()
    keep_picture(lab, "panel-live", index=0)
    press("Pause")
    wait_for("Resume")
    press("Resume")
    wait_for("Pause")
    panel.get_by_label("Learning rate").nth(1).fill("1e-4")
    press("Set")
    panel.get_by_text("Done %dtrain set lr=1e-4").wait_for()
    press("Stop")
    panel.get_by_text("stopped at step").first.wait_for()
    press("Shut down")
    wait_for("Start")
    keep_picture(lab, "panel-end", index=0)
    fit = panel.locator("code").filter(has_text="%dtrain fit")
    assert fit.inner_text() == "%dtrain fit model train --loss cross_entropy --epochs 20000"
    assert "%dtrain panel" in lab.save().cells[0].outputs[0].data["text/plain"]
