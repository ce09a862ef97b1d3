import json
import threading
from collections.abc import Iterator
from typing import Any

import comm
import pytest

from dnb.notebook.charts import run_figure, subplots
from dnb.notebook.charts.loss import with_loss_scale
from dnb.notebook.charts.svg_image import SVG_MIME
from dnb.notebook.live import display
from dnb.notebook.live.browser.live_figure import LiveFigure
from dnb.notebook.live.controls import Controls
from dnb.notebook.live.dashboard import Dashboard
from dnb.notebook.live.live_drawing import TURNS, LiveDrawing
from dnb.notebook.pages.snapshot import PLOTLY_MIME
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, advance, long_run, usage_rows, wait_until
from tests.full_runs import advance_all, full_run

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class Notebook:
    """What a notebook shows, by display id."""

    def __init__(self) -> None:
        self.displays: dict[str, dict[str, Any]] = {}
        self.publishers: set[str] = set()

    def publish(self, content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
        assert update == (display_id in self.displays)
        self.displays[display_id] = content
        self.publishers.add(threading.current_thread().name)

    def shown(self) -> list[dict[str, Any]]:
        return list(self.displays.values())


class Wire:
    """Counts what widgets send to the browser."""

    def __init__(self, *widgets: Any) -> None:
        self.messages: list[tuple[dict[str, Any], int]] = []
        for widget in widgets:
            widget.comm.send = self.send

    def send(self, data: dict[str, Any], buffers: list[Any] | None = None, **_: Any) -> None:
        size = len(json.dumps(data)) + sum(memoryview(buffer).nbytes for buffer in buffers or ())
        self.messages.append((data, size))

    def num_bytes(self) -> int:
        return sum(size for _, size in self.messages)

    def states(self) -> list[dict[str, Any]]:
        return [data["state"] for data, _ in self.messages if data["method"] == "update"]


class BadHistory:
    """A history that cannot be read."""

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def column(self, key: str) -> Any:
        raise OSError(f"no column {key}")


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def run() -> FakeRun:
    run = FakeRun(step=1, workers=[FakeWorker()])
    run.history.set("loss", [0.5])
    return run


@pytest.fixture
def dashboard(run: FakeRun, notebook: Notebook) -> Iterator[Dashboard]:
    dashboard = Dashboard(run, interval_seconds=0.01, publish=notebook.publish)
    yield dashboard
    dashboard.close()
    assert dashboard.join(timeout_seconds=30)


def add_step(run: FakeRun, loss: float) -> None:
    run.step += 1
    run.history.append("loss", run.step, loss)
    run.tell()


def drawn_losses(dashboard: Dashboard) -> list[float]:
    return [] if dashboard.figure is None else [float(y) for y in dashboard.figure.data[1].y]


def test_no_panel_reaches_below_the_figure_which_plotly_would_refuse():
    for num_engines in range(1, 9):
        engines = tuple(range(num_engines))
        run = FakeRun(workers=[FakeWorker(engine=engine) for engine in engines])
        run.utilisation.extend(usage_rows(3, engines=engines))
        axes = [
            part for part in run_figure.figure(run)["layout"].values() if isinstance(part, dict) and "domain" in part
        ]
        assert all(0 <= end <= 1 for axis in axes for end in axis["domain"])


def test_a_page_is_told_of_a_figure_when_it_is_whole(monkeypatch):
    told, make = [], comm.create_comm
    monkeypatch.setattr(comm, "create_comm", lambda **args: told.append(args["data"]["state"]) or make(**args))
    figure = LiveFigure(run_figure.figure(long_run(num_steps=100)))
    whole = next(state for state in told if state["_model_name"] == figure._model_name and "_widget_data" in state)
    assert len(whole["_widget_data"]) == len(figure.data) > 0
    assert whole["_widget_layout"]["height"] == figure.layout.height
    assert not figure.was_asked_again


def test_a_refresh_of_a_long_run_sends_less_than_20_kilobytes():
    run = long_run(num_steps=100_000, num_engines=4)
    figure, controls = LiveFigure(run_figure.figure(run)), Controls(run)
    wire = Wire(figure, *controls.widgets)
    advance(run)
    figure.paint(run_figure.figure(run))
    controls.refresh()
    assert 8_000 < wire.num_bytes() < 20_000


def test_a_refresh_is_one_update_of_the_figure():
    run = long_run(num_steps=5000)
    figure = LiveFigure(run_figure.figure(run))
    wire = Wire(figure)
    advance(run)
    figure.paint(run_figure.figure(run))
    assert sum(bool(state.get("_py2js_update")) for state in wire.states()) == 1


def test_a_refresh_without_news_sends_nothing():
    run = long_run(num_steps=5000)
    figure = LiveFigure(run_figure.figure(run))
    wire = Wire(figure)
    figure.paint(run_figure.figure(run))
    assert wire.messages == []


def test_a_remark_that_no_longer_holds_disappears():
    run = FakeRun(workers=[FakeWorker()])
    figure = LiveFigure(run_figure.figure(run))
    add_step(run, 0.5)
    figure.paint(run_figure.figure(run))
    assert "waiting for the first step" not in [note.text for note in figure.layout.annotations]


def test_a_figure_is_small_and_gives_a_page_that_asks_the_code_that_draws_it():
    figure = LiveFigure(run_figure.figure(FakeRun()))
    assert len(figure._esm) < 5_000
    wire = Wire(figure)
    figure._handle_custom_msg({"dnb": "code"}, [])
    ((data, size),) = wire.messages
    assert (data["method"], data["content"]) == ("custom", {"dnb": "code"})
    assert size > 1_000_000


def test_a_page_that_has_loaded_the_code_is_told_what_was_painted_meanwhile():
    run = long_run(num_steps=50)
    figure = LiveFigure(run_figure.figure(run))
    asked = figure.get_state()
    advance(run)
    figure.paint(run_figure.figure(run))
    wire = Wire(figure)
    figure._handle_custom_msg({"dnb": "loaded"}, [])
    whole = wire.states()[-1]
    assert whole["_widget_layout"] != asked["_widget_layout"]  # else the page would not notice
    assert set(whole) == {"_widget_data", "_widget_layout"}


def test_a_reloaded_page_is_given_the_whole_history():
    run = FakeRun(workers=[FakeWorker()])
    figure = LiveFigure(run_figure.figure(run))
    add_step(run, 0.5)
    figure.paint(run_figure.figure(run))
    assert figure.get_state()["_widget_data"][1]["y"]["shape"] == (1,)


def test_an_axis_can_be_chosen_after_the_end_on_a_page_that_was_reloaded(dashboard, run):
    run.history.set("seconds", [1.5])
    wait_until(lambda: dashboard.figure is not None)
    dashboard.figure.get_state()
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    dashboard.choose_axis("time")
    assert dashboard.figure.layout.xaxis.title.text == "time since it was submitted (s)"


def test_what_the_browser_tells_of_defaults_is_not_sent_back():
    figure = LiveFigure(run_figure.figure(FakeRun()))
    wire = Wire(figure)
    figure.set_state({"_js2py_traceDeltas": {"trace_deltas": [], "trace_edit_id": 1}})
    assert wire.messages == []


def test_a_zoom_of_the_user_is_taken_over():
    figure = LiveFigure(run_figure.figure(FakeRun()))
    relayout = {"relayout_data": {"xaxis.range[0]": 2, "xaxis.range[1]": 5}, "source_view_id": "a"}
    figure.set_state({"_js2py_relayout": relayout})
    assert figure.layout.xaxis.range == (2, 5)


def painted_figure():
    figure = LiveFigure(run_figure.figure(FakeRun()))
    figure.paint(run_figure.figure(FakeRun(step=1, history=FakeHistory(loss=[0.5]))))
    return figure


def answer(figure):
    """What a page sends when it has drawn."""
    figure.set_state({"_js2py_traceDeltas": {"trace_deltas": [], "trace_edit_id": figure._last_trace_edit_id}})


def test_a_slow_page_is_given_time_between_two_paintings():
    figure = painted_figure()
    figure._sent -= 0.2
    answer(figure)
    assert figure.is_resting
    figure._rested -= 0.4
    assert not figure.is_resting


def test_an_answer_that_waited_for_the_kernel_does_not_slow_the_painting_down():
    figure = painted_figure()
    figure._sent -= 20
    answer(figure)
    assert not figure.is_resting


def test_a_page_that_has_not_drawn_yet_is_sent_nothing_more_for_a_while_and_then_less_often():
    figure = painted_figure()
    assert figure.is_resting
    figure._sent -= 1.6
    assert not figure.is_resting
    figure.paint(run_figure.figure(FakeRun(step=2, history=FakeHistory(loss=[0.5, 0.4]))))
    figure._sent -= 1.6
    assert figure.is_resting
    figure._sent -= 1.6
    assert not figure.is_resting
    answer(figure)
    figure.paint(run_figure.figure(FakeRun(step=3, history=FakeHistory(loss=[0.5, 0.4, 0.3]))))
    figure._sent -= 1.6
    assert not figure.is_resting


def test_a_reloaded_page_is_not_waited_for_as_the_one_before():
    figure = painted_figure()
    figure.get_state()
    assert not figure.is_resting


def test_a_figure_in_a_quiet_run_is_fitted_to_the_page():
    figure = LiveFigure(run_figure.figure(FakeRun()))
    wire = Wire(figure)
    figure.fit_to_page()
    assert any(state.get("_py2js_update") for state in wire.states())


def test_the_strip_is_shown_before_the_figure_is_built(dashboard, notebook):
    dashboard.show()
    assert WIDGET_MIME in notebook.shown()[0]


def test_the_words_beside_the_widgets_are_the_progress_line(dashboard, notebook):
    dashboard.show()
    assert notebook.shown()[0]["text/plain"].startswith("digits: epoch 1 of 31 · step 1 of 496 · loss 0.5000")


def test_news_are_painted(dashboard, run):
    add_step(run, 0.25)
    wait_until(lambda: drawn_losses(dashboard) == [0.5, 0.25])


def test_many_news_in_a_short_time_end_in_the_last_state(dashboard, run):
    for step in range(30):
        add_step(run, float(step))
    wait_until(lambda: drawn_losses(dashboard)[-1:] == [29.0])


def test_the_listener_does_not_paint_in_the_thread_that_calls_it(dashboard, run):
    wait_until(lambda: dashboard.figure is not None)
    painters: set[str] = set()
    dashboard.figure.paint = lambda _, **__: painters.add(threading.current_thread().name)
    run.tell()
    wait_until(lambda: bool(painters))
    assert painters == {"dnb-painter-digits"}


def test_at_the_end_plain_output_takes_the_place_of_the_widgets(dashboard, run, notebook):
    dashboard.show()
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    assert [set(content) for content in notebook.shown()] == [{PLOTLY_MIME, SVG_MIME, "text/plain"}]


def test_every_display_of_a_run_is_replaced_at_its_end(dashboard, run, notebook):
    dashboard.show()
    dashboard.show()
    run.end("stopped")
    assert dashboard.join(timeout_seconds=30)
    assert [PLOTLY_MIME in content for content in notebook.shown()] == [True, True]


def test_shown_after_the_end_it_is_plain_output_at_once(dashboard, run, notebook):
    run.end("stopped")
    assert dashboard.join(timeout_seconds=30)
    dashboard.show()
    assert [PLOTLY_MIME in content for content in notebook.shown()] == [True]


def leave(dashboard):
    """What a page says when it no longer shows a view: its output was replaced, or it was closed."""
    dashboard.controls.engines._handle_custom_msg({"dnb": "gone"}, [])


def test_widgets_are_closed_when_a_page_has_put_plain_output_in_their_place(dashboard, run):
    wait_until(lambda: dashboard.figure is not None)
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    assert dashboard.figure.comm is not None
    leave(dashboard)
    assert dashboard.figure.comm is None


def test_a_page_that_was_closed_before_the_end_finds_the_finished_chart_when_it_is_opened(dashboard, run):
    wait_until(lambda: dashboard.figure is not None)
    leave(dashboard)
    add_step(run, 0.25)
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    assert dashboard.figure.get_state()["_widget_data"][1]["y"]["shape"] == (2,)
    leave(dashboard)
    assert dashboard.figure.comm is not None


@pytest.mark.parametrize(("width", "domain"), [(999, (0.0, 1.0)), (1000, (0.0, 0.47))])
def test_a_wide_page_has_losses_and_metrics_beside_each_other(dashboard, run, width, domain):
    run.history.set("accuracy", [0.5])
    dashboard.controls.engines.page_width = width
    wait_until(lambda: dashboard.figure is not None and dashboard.figure.layout.xaxis.domain == domain)


def test_widgets_of_a_reloaded_page_are_kept_at_the_end(dashboard, run):
    wait_until(lambda: dashboard.figure is not None)
    dashboard.figure.get_state()
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    leave(dashboard)
    assert dashboard.figure.comm is not None


def test_at_the_end_the_run_is_no_longer_listened_to(dashboard, run):
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    assert run.listeners == []


def test_after_a_painting_that_failed_the_next_one_is_tried(dashboard, run, caplog):
    good = run.history
    wait_until(lambda: dashboard.figure is not None)
    run.history = BadHistory()
    run.tell()
    wait_until(lambda: "the dashboard of run 'digits' could not be painted" in caplog.text)
    run.history = good
    add_step(run, 0.25)
    wait_until(lambda: drawn_losses(dashboard) == [0.5, 0.25])


def test_a_painting_that_fails_again_and_again_is_logged_once(dashboard, run, caplog):
    run.history = BadHistory()
    for _ in range(20):
        run.tell()
        dashboard.join(timeout_seconds=0.02)
    assert caplog.text.count("could not be painted") == 1


def test_a_run_that_ended_before_is_painted_by_nobody(notebook):
    run = FakeRun(status="finished")
    dashboard = Dashboard(run, publish=notebook.publish)
    assert dashboard.join(timeout_seconds=30)
    assert dashboard.figure is None


def test_a_refresh_of_everything_sends_less_than_20_kilobytes():
    run = full_run(num_steps=100_000, num_engines=4)
    drawing = LiveDrawing(run)
    figure, controls = LiveFigure(drawing.draw()), Controls(run)
    wire = Wire(figure, *controls.widgets)
    sizes = []
    for _ in range(12):
        wire.messages.clear()
        advance_all(run)
        figure.paint(drawing.draw())
        controls.refresh()
        sizes.append(wire.num_bytes())
    assert 8_000 < max(sizes) < 20_000


def without_button(run):
    """The whole figure, as it is below a strip with buttons of its own."""
    return with_loss_scale(run_figure.figure(run), scale="linear", has_button=False)


def test_slow_panels_come_to_what_the_whole_figure_would_be():
    run = full_run(num_steps=3000, num_engines=2)
    drawing = LiveDrawing(run)
    drawing.draw()
    advance_all(run)
    for _ in TURNS:
        live = drawing.draw()
    whole = without_button(run)
    assert subplots.changes(live["layout"], whole["layout"]) == {}
    assert [subplots.changes(a, b) for a, b in zip(live["data"], whole["data"], strict=True)] == [{}] * 14


def test_a_page_that_is_seldom_painted_has_all_panels_up_to_date_as_soon_as_others():
    run = full_run(num_steps=3000, num_engines=2)
    times = iter([0.0, 0.0, 100.0, 100.0])
    drawing = LiveDrawing(run, clock=lambda: next(times))
    drawing.draw()
    advance_all(run)
    assert subplots.changes(drawing.draw()["layout"], without_button(run)["layout"]) == {}


def test_a_column_that_did_not_change_is_not_sent_again():
    run = full_run(num_steps=3000, num_engines=2)
    drawing = LiveDrawing(run)
    figure = LiveFigure(drawing.draw())
    wire = Wire(figure)
    for _ in TURNS:
        figure.paint(drawing.draw())
    assert wire.messages == []


def test_an_engine_that_joins_gets_a_strip():
    run = full_run(num_steps=200, num_engines=2)
    drawing = LiveDrawing(run)
    figure = LiveFigure(drawing.draw())
    run.workers = [*run.workers, FakeWorker(engine=2)]
    advance_all(run)
    figure.paint(drawing.draw())
    assert [trace.yaxis for trace in figure.data[-4:]] == ["y12"] * 4


def test_more_engines_than_eight_turn_the_figure_into_heat_maps_and_back():
    runs = [full_run(num_steps=200, num_engines=n) for n in (8, 9)]
    few, many = (run_figure.figure(run) for run in runs)
    live = LiveFigure(few)
    live.paint(many)
    assert [trace.type for trace in live.data].count("heatmap") == 1
    live.paint(few)
    assert len(live.data) == len(few["data"])


def test_what_is_painted_is_what_a_reloaded_page_is_given():
    run = full_run(num_steps=200, num_engines=2)
    drawing = LiveDrawing(run)
    live = LiveFigure(drawing.draw())
    advance_all(run)
    live.paint(drawing.draw(x="time", is_whole=True))
    state = live.get_state()
    assert state["_widget_layout"]["xaxis"]["title"]["text"].startswith("time")
    assert state["_widget_data"][0]["x"]["shape"] == (len(live.data[0].x),)


def test_a_zoom_is_not_undone_when_the_axis_changes_its_title_or_ticks():
    run = FakeRun(step=8, history=FakeHistory(loss=[0.5] * 8))
    live = LiveFigure(run_figure.figure(run))
    live.set_state(
        {"_js2py_relayout": {"relayout_data": {"xaxis.range[0]": 2, "xaxis.range[1]": 5}, "source_view_id": "a"}}
    )
    add_step(run, 0.25)
    live.paint(run_figure.figure(run))
    assert live.layout.xaxis.range == (2, 5)


def test_another_quantity_along_the_axis_ends_the_zoom():
    run = full_run(num_steps=200)
    live = LiveFigure(run_figure.figure(run))
    zoom = {"relayout_data": {"xaxis.range[0]": 2, "xaxis.range[1]": 5}, "source_view_id": "a"}
    live.set_state({"_js2py_relayout": zoom})
    live.paint(run_figure.figure(run, x="time"))
    assert live.layout.xaxis.range is None
    live.set_state({"_js2py_relayout": zoom})
    run.elapsed_seconds = 7000.0
    live.paint(run_figure.figure(run, x="time"))
    assert live.layout.xaxis.range is None


def test_an_axis_that_was_chosen_is_painted_soon_and_kept_at_the_end(dashboard, run, notebook):
    run.history.set("seconds", [1.5])
    wait_until(lambda: dashboard.figure is not None)
    dashboard.show()
    dashboard.choose_axis("time")
    wait_until(lambda: "time" in dashboard.figure.layout.xaxis.title.text)
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    assert notebook.shown()[0][PLOTLY_MIME]["layout"]["xaxis"]["title"]["text"].startswith("time")


def test_a_logarithmic_loss_is_painted_soon_and_kept_at_the_end(dashboard, run, notebook):
    wait_until(lambda: dashboard.figure is not None)
    dashboard.show()
    dashboard.controls.choices.log_loss.value = True
    wait_until(lambda: dashboard.figure.layout.yaxis.type == "log")
    run.end("finished")
    assert dashboard.join(timeout_seconds=30)
    layout = notebook.shown()[0][PLOTLY_MIME]["layout"]
    assert layout["yaxis"]["type"] == "log"
    assert layout["updatemenus"][0]["buttons"][0]["args"] == [{"yaxis.type": "linear"}]  # what a click is to do next


def test_another_scale_of_the_loss_keeps_the_zoom_along_the_steps():
    run = full_run(num_steps=200)
    drawing = LiveDrawing(run)
    live = LiveFigure(drawing.draw())
    zoom = {"xaxis.range[0]": 2, "xaxis.range[1]": 5, "yaxis.range[0]": 0, "yaxis.range[1]": 1}
    live.set_state({"_js2py_relayout": {"relayout_data": zoom, "source_view_id": "a"}})
    live.paint(drawing.draw(loss_scale="log"))
    assert (live.layout.xaxis.range, live.layout.yaxis.range, live.layout.yaxis.type) == ((2, 5), None, "log")


@pytest.mark.parametrize("which", ["box", "figure"])
def test_a_dashboard_whose_widgets_were_closed_stops_painting_and_leaves_the_run(dashboard, run, caplog, which):
    wait_until(lambda: dashboard.figure is not None)
    getattr(dashboard, which).close()
    run.tell()
    assert dashboard.join(timeout_seconds=30)
    assert (dashboard.is_closed, run.listeners, run.num_stops, caplog.text) == (True, [], 0, "")


def test_a_closed_dashboard_is_made_anew_when_it_is_shown_again(run):
    first = display.dashboard_of(run)
    first.box.close()
    second = display.dashboard_of(run)
    assert second is not first
    for dashboard in (first, second):
        dashboard.close()
        assert dashboard.join(timeout_seconds=30)
