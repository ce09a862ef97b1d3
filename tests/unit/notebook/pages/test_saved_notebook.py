"""What a saved notebook shows where neither kernel, widgets nor network are."""

import base64
import re
from xml.etree import ElementTree

import nbformat
import pytest
from nbconvert import HTMLExporter

from dnb.notebook.charts.svg_image import SVG_MIME, behind_chart
from dnb.notebook.pages.snapshot import PLOTLY_MIME, bundle
from tests.fake_runs import FakeEvent, long_run

EVIL = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def content() -> dict:
    """What is left of a run of 100,000 steps."""
    run = long_run()
    run.status, run.error = "failed", EVIL
    run.events = [FakeEvent(kind="died", text=EVIL, step=5, engine=1)]
    return bundle(run, with_image=True)


def notebook(data: dict) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("display_data", data=data)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%dtrain fit model train", outputs=[output])])


@pytest.fixture(scope="module")
def page(content) -> str:
    html, _ = HTMLExporter().from_notebook_node(notebook(behind_chart(content)))
    return html


def test_a_saved_notebook_is_under_150_kilobytes_as_jupyterlab_adds_a_picture_of_its_own(content):
    assert len(nbformat.writes(notebook(behind_chart(content)))) < 150_000


def test_the_image_costs_less_than_30_kilobytes(content):
    assert len(behind_chart(content)[SVG_MIME]) < 30_000


def test_beside_a_chart_no_image_is_left_that_jupyterlab_would_prefer(content):
    assert set(behind_chart(content)) == {PLOTLY_MIME, SVG_MIME, "text/plain"}


def test_without_an_image_nothing_is_added():
    assert behind_chart({"text/plain": "words"}) == {"text/plain": "words"}


def test_a_page_of_html_has_the_image_in_itself(page, content):
    (encoded,) = re.findall(r'<img[^>]*src="data:image/svg\+xml;base64,([^"]+)"', page)
    svg = base64.b64decode(encoded).decode()
    (image,) = re.findall(r'<image[^>]*href="data:image/png;base64,([^"]+)"', svg)
    assert base64.b64decode(image).startswith(b"\x89PNG")


def test_the_image_has_its_own_size_and_says_in_words_what_it_shows(content):
    svg = ElementTree.fromstring(behind_chart(content)[SVG_MIME])
    image = base64.b64decode(content["image/png"])
    assert (svg.get("width"), svg.get("height")) == tuple(str(int.from_bytes(image[at : at + 4])) for at in (16, 20))
    assert svg[0].text == content["text/plain"]


def test_text_of_others_is_not_run_in_that_page(page):
    assert EVIL not in page


def test_a_notebook_that_nobody_looked_at_becomes_a_page_with_an_image(content):
    html, _ = HTMLExporter().from_notebook_node(notebook(content))
    assert re.search(r'<img[^>]*src="data:image/png;base64,', html)
