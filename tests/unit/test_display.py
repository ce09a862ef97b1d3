import io
from typing import Any

import pytest

from dnb.errors import ArgumentError
from dnb.notebook.display import TextView, show
from dnb.notebook.snapshot import PLOTLY_MIME
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker


class Published(list[tuple[dict[str, Any], str, bool]]):
    def __call__(self, content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
        self.append((content, display_id, update))


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def run() -> FakeRun:
    return FakeRun(step=2, history=FakeHistory(loss=[0.5, 0.25]), workers=[FakeWorker()])


def text_view(run: FakeRun, published: Published) -> TextView:
    return TextView(run, stream=io.StringIO(), publish=published)


def test_a_text_view_shows_a_line_at_once(run, published):
    text_view(run, published)
    assert published[0][0] == {"text/plain": "digits: step 2/496, loss 0.2500"}


def test_a_text_view_leaves_its_display_alone_while_the_run_goes_on(run, published):
    text_view(run, published)(run)
    assert len(published) == 1


def test_at_the_end_the_same_display_gets_chart_image_and_words(run, published):
    view = text_view(run, published)
    run.status = "finished"
    view(run)
    content, display_id, is_update = published[1]
    assert (set(content), display_id, is_update) == (
        {PLOTLY_MIME, "image/png", "text/plain"},
        published[0][1],
        True,
    )


def test_at_a_pause_the_display_gets_the_chart_too(run, published):
    view = text_view(run, published)
    run.status = "paused"
    view(run)
    assert "image/png" in published[1][0]


def test_the_end_is_drawn_once(run, published):
    view = text_view(run, published)
    run.status = "finished"
    view(run)
    view(run)
    assert len(published) == 2


def test_shown_as_text_a_run_reports_to_whoever_waits(run, capsys):
    show(run, display="text")
    run.wait_hooks[0](run)
    assert capsys.readouterr().out.splitlines()[-1] == "digits: step 2/496, loss 0.2500"


def test_shown_as_nothing_a_run_gets_no_hooks(run):
    show(run, display="none")
    assert (run.wait_hooks, run.listeners) == ([], [])


def test_outside_of_ipython_nothing_is_shown(run, capsys):
    show(run)
    assert capsys.readouterr().out == ""


def test_an_unknown_display_is_refused_with_the_choices(run):
    with pytest.raises(ArgumentError, match="display='html' is no display"):
        show(run, display="html")
