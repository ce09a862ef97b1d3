import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dnb.errors import ArgumentError
from dnb.hub.history.run_files import HistoryRow, summarize
from dnb.hub.history.run_folder import RunFolder
from dnb.notebook.charts.svg_image import SVG_MIME
from dnb.notebook.live.display import TextView, dashboard_of, keep, show, show_new, show_value
from dnb.notebook.pages.snapshot import PLOTLY_MIME
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, wait_until
from tests.unit.kept_runs import SPEC


class Published(list[tuple[dict[str, Any], str, bool]]):
    def __call__(self, content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
        self.append((content, display_id, update))


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def run() -> FakeRun:
    return FakeRun(step=2, history=FakeHistory(loss=[0.5, 0.25]), workers=[FakeWorker()])


def kept_run(folder: Path) -> Path:
    """The folder of a run of one step."""
    state = {"status": "finished", "error": "", "remote_traceback": "", "started": 100.0, "elapsed_seconds": 2.5}
    with RunFolder(folder) as kept:
        kept.append_row(HistoryRow(kind="step", step=1, time=101.0, values={"loss": 0.5}))
        kept.write_summary(summarize(SPEC, step=1, **state))
    return folder


def text_view(run: FakeRun, published: Published) -> TextView:
    return TextView(run, stream=io.StringIO(), publish=published)


def test_a_text_view_shows_a_line_at_once(run, published):
    text_view(run, published)
    assert published[0][0] == {"text/plain": "digits: epoch 1 of 31 · step 2 of 496 · loss 0.2500"}


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


def test_shown_as_text_a_run_reports_to_whoever_waits(run, shown, capsys):
    show(run, display="text")
    run.wait_hooks[0](run)
    assert capsys.readouterr().out.splitlines()[-1] == "digits: epoch 1 of 31 · step 2 of 496 · loss 0.2500"


def test_shown_as_nothing_a_run_gets_no_hooks(run):
    show(run, display="none")
    assert (run.wait_hooks, run.listeners) == ([], [])


def test_in_a_plain_script_a_run_is_told_in_words_once(run, capsys):
    show(run)
    assert capsys.readouterr().out.splitlines()[::2][:2] == ["digits: training on 1 engine", "loss 0.2500 at step 2"]
    assert (run.wait_hooks, run.listeners) == ([], [])


def test_in_a_plain_script_nothing_is_shown_if_that_is_wished(run, capsys, monkeypatch):
    monkeypatch.setenv("DNB_DISPLAY", "none")
    show(run)
    assert capsys.readouterr().out == ""


def test_a_run_that_has_ended_is_shown_by_its_name(tmp_path, monkeypatch, capsys):
    kept_run(tmp_path / ".dnb" / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    show("digits")
    assert capsys.readouterr().out.startswith("digits: finished after 1 step")


def test_a_run_that_has_ended_is_shown_by_its_folder(tmp_path, capsys):
    show(kept_run(tmp_path / "kept"))
    assert capsys.readouterr().out.startswith("digits: finished after 1 step")


def test_a_name_of_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="is not the folder of a run"):
        show("nothing")


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
BUNDLE = {PLOTLY_MIME: {}, "text/plain": "words", "image/png": PIXEL}


class Kernel:
    """IPython's shell, as far as its presence counts."""

    kernel = object()
    user_ns: ClassVar[dict[str, object]] = {}


@pytest.fixture
def shown(monkeypatch, published) -> Published:
    """What a kernel shows."""
    monkeypatch.setattr("dnb.notebook.live.display.get_ipython", Kernel)
    monkeypatch.setattr("dnb.notebook.live.display.publish", published)
    monkeypatch.setattr(
        "dnb.notebook.live.display.bundle", lambda _run, *, with_image: dict(BUNDLE) if with_image else {}
    )
    return published


@pytest.mark.parametrize("display", ["display", "text"])
def test_a_run_that_has_ended_shows_its_image_where_there_are_no_widgets(run, shown, display):
    run.status = "finished"
    show(run, display=display)
    assert shown[0][0] == BUNDLE


def test_a_run_that_has_ended_keeps_its_image_behind_the_chart_where_there_are_widgets(run, shown):
    run.status = "finished"
    show(run, display="widget")
    assert set(shown[0][0]) == {PLOTLY_MIME, SVG_MIME, "text/plain"}


def test_shown_again_a_run_has_a_display_of_its_own_in_each_cell(run, shown):
    run.status = "finished"
    show(run)
    show(run)
    assert len({display_id for _, display_id, _ in shown}) == 2


def test_in_a_terminal_a_run_is_told_while_it_is_waited_for(run, monkeypatch, capsys):
    monkeypatch.setattr("dnb.notebook.live.display.get_ipython", lambda: SimpleNamespace(user_ns={}))
    show(run)
    assert (capsys.readouterr().out, len(run.wait_hooks)) == (
        "digits: epoch 1 of 31 · step 2 of 496 · loss 0.2500\n",
        1,
    )


def test_an_unknown_display_is_refused_with_the_choices(run):
    with pytest.raises(ArgumentError, match="display='html' is no display"):
        show(run, display="html")


def test_the_cell_that_sees_the_end_keeps_the_chart_of_a_page_that_was_reloaded(run, shown):
    dashboard = dashboard_of(run)
    wait_until(lambda: dashboard.figure is not None)
    dashboard.figure.get_state()
    keep(run)
    assert shown == []  # it goes on
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    keep(run)
    keep(run)  # another cell that sees the end: once is enough
    assert [PLOTLY_MIME in content for content, _, _ in shown] == [True]
    dashboard._close_widgets()


def test_a_page_that_was_not_reloaded_has_the_chart_where_the_view_was(run, shown):
    dashboard = dashboard_of(run)
    wait_until(lambda: dashboard.figure is not None)
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    keep(run)
    assert shown == []


class Shell:
    """An IPython shell with a kernel, in the cell of this number."""

    def __init__(self) -> None:
        self.kernel = SimpleNamespace(_allow_stdin=True)
        self.execution_count = 1
        self.user_ns: dict[str, Any] = {}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    shell = Shell()
    monkeypatch.setattr("dnb.notebook.live.display.get_ipython", lambda: shell)
    monkeypatch.setenv("DNB_DISPLAY", "display")
    return shell


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Runs that were shown, in order."""
    shown: list[FakeRun] = []
    monkeypatch.setattr("dnb.notebook.live.display._show_as", lambda _, run: shown.append(run))
    return shown


def test_a_run_as_the_value_of_a_cell_is_its_view(shell, views, run):
    show_value(run)
    assert views == [run]


def test_a_cell_that_has_shown_a_run_shows_it_once(shell, views, run):
    show_new(run)
    show_value(run)
    assert views == [run]
    shell.execution_count = 2
    show_value(run)
    assert views == [run, run]


def test_a_run_that_was_shown_is_its_repr_when_it_has_ended(shell, views, run):
    show_new(run)
    shell.execution_count = 2
    run.status = "finished"
    with pytest.raises(NotImplementedError):
        show_value(run)
    assert views == [run]


def test_a_run_that_has_ended_and_was_never_shown_is_its_view(shell, views, run):
    run.status = "finished"
    show_value(run)
    assert views == [run]


def test_where_there_are_no_views_a_run_is_its_repr(shell, views, run, monkeypatch):
    monkeypatch.setenv("DNB_DISPLAY", "text")
    with pytest.raises(NotImplementedError):
        show_value(run)
    assert views == []


def test_in_a_script_a_new_run_tells_whoever_waits_and_nothing_at_once(run, capsys, monkeypatch):
    monkeypatch.setattr("dnb.notebook.live.display.get_ipython", lambda: None)
    show_new(run)
    assert capsys.readouterr().out == ""
    assert len(run.wait_hooks) == 1


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_new_run_that_is_not_to_be_shown_is_not(run, monkeypatch, is_asked):
    monkeypatch.setattr("dnb.notebook.live.display.get_ipython", lambda: None)
    if not is_asked:
        monkeypatch.setenv("DNB_DISPLAY", "none")
    show_new(run, display="none" if is_asked else None)
    assert run.wait_hooks == []
