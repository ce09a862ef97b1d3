"""What a saved notebook shows where neither kernel, widgets nor network are."""

import base64
import json
import re

import nbformat
import pytest
from nbconvert import HTMLExporter

from dnb.notebook.snapshot import bundle
from tests.fake_runs import FakeEvent, long_run


@pytest.fixture(scope="module")
def saved() -> nbformat.NotebookNode:
    """A notebook whose last output is the end of a run of 100,000 steps."""
    run = long_run()
    run.status, run.elapsed_seconds = "finished", 100.0
    run.events = [FakeEvent(kind="died", text="<script>alert(1)</script>", step=5, engine=1)]
    output = nbformat.v4.new_output("display_data", data=bundle(run, with_image=True))
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%dtrain fit model train", outputs=[output])])


@pytest.fixture(scope="module")
def page(saved) -> str:
    html, _ = HTMLExporter().from_notebook_node(saved)
    return html


def test_a_saved_notebook_is_under_300_kilobytes(saved):
    assert len(nbformat.writes(saved)) < 300_000


def test_as_a_page_of_html_it_shows_the_chart_without_a_network(page):
    (image,) = re.findall(r'<img[^>]*src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image).startswith(b"\x89PNG")


def test_text_of_others_is_not_run_in_that_page(page):
    assert "<script>alert(1)</script>" not in page


def test_the_chart_itself_is_kept_for_front_ends_that_draw_it(saved):
    (output,) = saved.cells[0].outputs
    assert json.dumps(output.data["application/vnd.plotly.v1+json"]["data"])
