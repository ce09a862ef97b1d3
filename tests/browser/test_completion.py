"""Help and completion of `%dtrain` as JupyterLab shows them."""

import pytest

import dnb
from tests.browser.lab import write_notebook
from tests.browser.test_quickstart import keep_picture

pytestmark = pytest.mark.browser

SETUP = """\
%load_ext dnb
import torch
import dnb
model = torch.nn.Linear(2, 2)
train = torch.zeros(6, 2), torch.zeros(6).long()"""
ITEM = ".jp-Completer .jp-Completer-match"


def test_tab_offers_what_fits_and_help_is_a_page_of_text(lab, notebook_folder):
    write_notebook(notebook_folder / "completion.ipynb", [SETUP, "%dtrain", "run = %dtrain fit --help", ""])
    lab.open("completion.ipynb")
    for index in range(3):
        lab.run_and_wait(index)
    assert lab.output_area(1).inner_text().startswith("usage: %dtrain VERB")
    assert "--batch-size INT" in lab.output_area(2).inner_text()
    keep_picture(lab, "help-table", index=1)
    keep_picture(lab, "help-fit", index=2)

    def offered(text: str) -> list[str]:
        lab.page.locator(".jp-Notebook .jp-Cell").nth(3).locator(".cm-content").click()
        lab.page.keyboard.press("Control+a")
        lab.page.keyboard.type(text)
        lab.page.keyboard.press("Tab")
        lab.page.locator(ITEM).first.wait_for()
        keep_picture(lab, f"completion-{len(text)}")
        found = lab.page.locator(ITEM).all_inner_texts()
        lab.page.keyboard.press("Escape")
        return found

    # Lab has an order of its own
    assert sorted(offered("run = %dtrain fit model train --l")) == ["--loss", "--loss-over", "--lr"]
    assert {"cross_entropy", "mse_loss"} <= set(offered("%dtrain fit model train --loss "))
    assert sorted(offered("dnb.")) == sorted(dnb.__all__)
