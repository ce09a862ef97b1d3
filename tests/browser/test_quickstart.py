"""The quickstart in JupyterLab, as a person would run it."""

import os
import platform
import shutil
from pathlib import Path

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.engines]

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
POINTS = "svg.main-svg .scatterlayer path.js-line"

# Samples that come from a slow disk: engines wait for them, and page and kernel have the processors to themselves.
SETUP = """
import time
import torch
from sklearn.datasets import load_digits
from torch import nn

pixels, targets = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(targets)

class Digits(torch.utils.data.Dataset):
    def __len__(self):
        return len(images)

    def __getitem__(self, index):
        time.sleep(0.001)
        return images[index], labels[index]

train, val = Digits(), (images[:300], labels[:300])
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
"""
LONG_FIT = "%dtrain fit model train --val val --loss cross_entropy --epochs 20000"


def cell_numbers(notebook: Path) -> dict[str, int]:
    """Where the code cells are, by how they begin."""
    cells = nbformat.read(notebook, as_version=4).cells
    return {cell.source.split("\n")[0]: index for index, cell in enumerate(cells) if cell.cell_type == "code"}


def keep_picture(lab, name: str, *, index: int | None = None) -> None:
    """Leave a picture where a person asked for it."""
    folder = os.environ.get("DNB_PICTURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lab.screenshot(Path(folder) / f"{name}.png", index=index)


def starting_with(numbers: dict[str, int], text: str) -> int:
    return next(index for source, index in numbers.items() if source.startswith(text))


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_stored_notebook_is_clean_on_opening(path, lab, notebook_folder):
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info.version = platform.python_version()  # the one part that another Python changes
    nbformat.write(notebook, notebook_folder / path.name)
    lab.open(path.name)
    lab.wait_for(
        "return panel.context.model.getMetadata('language_info')?.version === argument;",
        notebook.metadata.language_info.version,
    )
    assert lab.evaluate("return panel.context.model.dirty;") is False


def test_the_quickstart_runs_with_a_live_chart_that_stays(lab, notebook_folder):
    shutil.copy(QUICKSTART, notebook_folder / "quickstart.ipynb")
    numbers = cell_numbers(QUICKSTART)
    fit, wait = starting_with(numbers, "run = %dtrain fit"), starting_with(numbers, "%dtrain wait")
    lab.open("quickstart.ipynb")
    lab.run_all()
    lab.wait(fit)
    lab.output_area(fit).locator(POINTS).first.wait_for()
    keep_picture(lab, "quickstart-live", index=fit)
    lab.wait(wait)
    lab.wait(max(numbers.values()))
    saved = lab.save().cells[fit].outputs
    assert "validation accuracy 0.9" in lab.text(starting_with(numbers, "model.eval()"))
    assert "application/vnd.plotly.v1+json" in saved[0].data
    assert "finished after 675 steps" in saved[0].data["text/plain"]
    lab.output_area(fit).locator(POINTS).first.wait_for()
    keep_picture(lab, "quickstart-end", index=fit)
