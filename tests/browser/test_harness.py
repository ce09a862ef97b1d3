"""The harness itself, on notebooks that need no dnb."""

import pytest

from tests.browser.lab import write_notebook

pytestmark = pytest.mark.browser

FIGURE_SECONDS = 60  # the first figure loads plotly's 5 MB; 20 s were seen


def test_a_figure_widget_is_drawn(lab, notebook_folder):
    figure = "import plotly.graph_objects as go\nfigure = go.FigureWidget(go.Scatter(y=[1, 3, 2]))"
    write_notebook(notebook_folder / "widget.ipynb", [figure, "figure"])
    lab.open("widget.ipynb")
    lab.run_all()
    lab.wait(1)
    lab.output_area(1).locator("svg.main-svg .scatterlayer path").first.wait_for(timeout=FIGURE_SECONDS * 1000)


def test_a_plain_plotly_bundle_is_drawn(lab, notebook_folder):
    source = """
        from IPython.display import display
        figure = {"data": [{"y": [1, 3, 2], "type": "scatter"}], "layout": {}}
        display({"application/vnd.plotly.v1+json": figure, "text/plain": "curve"}, raw=True)
    """
    write_notebook(notebook_folder / "bundle.ipynb", [source.replace("\n        ", "\n").strip()])
    lab.open("bundle.ipynb")
    lab.run_and_wait(0)
    lab.output_area(0).locator("svg.main-svg .scatterlayer path").first.wait_for(timeout=FIGURE_SECONDS * 1000)


def test_one_cell_is_run_again(lab, notebook_folder):
    write_notebook(notebook_folder / "again.ipynb", ["n = 0", "n += 1; print(n)"])
    lab.open("again.ipynb")
    lab.run_and_wait(0)
    lab.run_and_wait(1)
    assert lab.run_and_wait(1)[0]["text"] == "2\n"
    assert lab.text(1).strip() == "2"


def test_outputs_survive_save_and_reload(lab, notebook_folder):
    write_notebook(notebook_folder / "kept.ipynb", ["kept = 'kept'", "print(kept)"])
    lab.open("kept.ipynb")
    lab.run_all()
    lab.wait(1)
    assert lab.save().cells[1].outputs[0].text == "kept\n"
    lab.reload()
    assert lab.run_and_wait(1)[0]["text"] == "kept\n"


def test_a_failing_cell_fails_the_wait(lab, notebook_folder):
    write_notebook(notebook_folder / "fails.ipynb", ["1 / 0", "print('never')"])
    lab.open("fails.ipynb")
    lab.run_all()
    with pytest.raises(AssertionError, match=r"(?s)cell 0 failed:.*ZeroDivisionError"):
        lab.wait(1)


def test_a_screenshot_of_an_output_is_a_png(lab, notebook_folder, tmp_path):
    write_notebook(notebook_folder / "picture.ipynb", ["print('hello')"])
    lab.open("picture.ipynb")
    lab.run_and_wait(0)
    lab.screenshot(tmp_path / "output.png", index=0)
    assert (tmp_path / "output.png").read_bytes().startswith(b"\x89PNG")
