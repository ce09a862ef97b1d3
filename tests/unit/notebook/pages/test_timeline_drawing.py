"""A timeline as the value of a cell."""

from dnb.notebook.pages.timeline_drawing import bundle
from dnb.planning.step_timeline import Timeline
from tests.timelines import gpipe_of_two


def test_a_timeline_has_an_image_for_readers_without_plotly():
    content = bundle(Timeline(gpipe_of_two(num_micro_batches=4)))
    assert sorted(content) == ["application/vnd.plotly.v1+json", "image/png", "text/plain"]
    assert content["image/png"].startswith("iVBOR")  # PNG's first bytes, as base64


def test_a_timeline_without_a_step_is_words_alone():
    assert list(bundle(Timeline(None))) == ["text/plain"]
