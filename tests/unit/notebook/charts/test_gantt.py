import base64

import msgspec
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter

from dnb.notebook.charts import gantt, run_figure
from dnb.notebook.pages import snapshot
from dnb.notebook.pages.drawers import register_drawers
from dnb.notebook.text.summary import progress_line, summary, worker_line
from dnb.planning.step_timeline import Timeline
from dnb.protocol.measurements import Action, Prediction
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker
from tests.timelines import engine_timeline, gpipe_of_two, step_timeline


def divided_run(**others) -> FakeRun:
    run = FakeRun(step=4, history=FakeHistory(loss=[1.0, 0.9, 0.8, 0.7], samples_per_second=[6400.0] * 4), **others)
    run.workers = [FakeWorker(engine=0), FakeWorker(engine=1)]
    run.timeline = Timeline(gpipe_of_two(num_micro_batches=4, seconds=0.001))
    return run


def rows(run: FakeRun) -> dict[str, dict]:
    return {trace["name"]: trace for trace in run_figure.figure(run)["data"] if trace.get("xaxis") == "x3"}


def words(run: FakeRun) -> list[str]:
    return [note["text"] for note in run_figure.figure(run)["layout"]["annotations"]]


def test_the_figure_of_a_run_that_is_not_divided_has_no_timeline():
    run = FakeRun(step=2, history=FakeHistory(loss=[1.0, 0.5]), workers=[FakeWorker()])
    assert "xaxis3" not in run_figure.figure(run)["layout"]
    assert rows(run) == {}


def test_every_action_is_a_bar_in_the_row_of_its_engine():
    forward = rows(divided_run())["forward"]
    assert forward["y"].tolist() == [0.0] * 4 + [1.0] * 4
    assert forward["base"].tolist() == pytest.approx([0, 1, 2, 3, 1, 2, 3, 4])
    assert forward["x"].tolist() == pytest.approx([1.0] * 8)  # milliseconds


def test_a_bar_bears_the_number_of_its_micro_batch():
    assert rows(divided_run())["forward"]["text"] == ["0", "1", "2", "3"] * 2


def test_a_bar_that_is_too_narrow_bears_no_number():
    actions = [Action("forward", 0, 0, 0.0, 0.001), Action("wait", 0, 0, 0.001, 1.0)]
    run = divided_run()
    run.timeline = Timeline(step_timeline([engine_timeline(0, actions)]))
    assert rows(run)["forward"]["text"] == [""]


def test_kinds_differ_in_colour_and_in_width_or_pattern():
    found = [
        (trace["marker"]["color"], trace["width"], trace["marker"]["pattern"]["shape"])
        for trace in rows(divided_run()).values()
    ]
    assert len({color for color, _, _ in found}) == len(found)
    assert len({(width, shape) for _, width, shape in found}) == len(found)


def test_later_stages_of_an_engine_are_paler():
    actions = [Action("forward", 0, 0, 0.0, 1.0), Action("forward", 2, 0, 1.0, 2.0)]
    engines = [engine_timeline(rank, actions, rank=rank) for rank in range(2)]
    run = divided_run()
    run.timeline = Timeline(step_timeline(engines, num_stages=4))
    assert rows(run)["forward"]["marker"]["opacity"] == [1.0, 0.45, 1.0, 0.45]


def test_what_is_not_in_the_step_is_not_in_the_legend():
    shown = {name for name, trace in rows(divided_run()).items() if trace["showlegend"]}
    assert shown == {"forward", "backward", "wait"}


def test_the_panel_says_the_bubble_beside_the_formula_and_the_bytes_between_stages():
    told = words(divided_run())
    assert told[-3:] == [
        "step 12: 10 ms until the last gradient, bubble 20% (formula 20%, median of 5 steps 25%)",
        "between stages, per micro-batch: 0 to 1 131 kB, 1 back to 0 131 kB; 1.05 MB in the step's 4",
        "micro-batches",  # what a narrow page has no room for, goes on below
    ]


def test_engines_that_share_cores_are_told_of():
    run = divided_run()
    engine = engine_timeline(0, [Action("forward", 0, 0, 0.0, 1.0)])
    run.timeline = Timeline(step_timeline([msgspec.structs.replace(engine, cpu_seconds=0.5)]))
    assert any(line.startswith("engines had a core for 50% of their forwards and backwards") for line in words(run))


def test_predicted_stands_beside_measured():
    prediction = Prediction(
        batch_size=64, step_seconds=0.012, compute_seconds=0.01, bubble=0.18, stage_bytes=(30_000_000, 28_000_000)
    )
    run = divided_run(prediction=prediction)
    assert "predicted 18%" in " ".join(words(run))
    assert "step 12: 10 ms (10 ms predicted) until the last gradient" in " ".join(words(run))
    assert "12 ms per step predicted, 10 ms measured (median), hub included" in summary(run)


def test_memory_of_each_stage_is_predicted_and_measured():
    prediction = Prediction(
        batch_size=64, step_seconds=0.012, compute_seconds=0.01, bubble=0.18, stage_bytes=(30_000_000,)
    )
    run = divided_run(prediction=prediction)
    run.timeline = Timeline(
        step_timeline([engine_timeline(7, [Action("forward", 0, 0, 0.0, 1.0)], grown_bytes=41_000_000)])
    )
    assert "peak memory of the run: engine 7 41 MB (30 MB predicted)" in summary(run)


def test_the_line_of_a_running_divided_run_has_its_bubble():
    assert "loss 0.7000 · bubble 20%" in progress_line(divided_run())


def test_an_engine_tells_the_most_memory_that_it_held():
    worker = FakeWorker(start_rss_bytes=200_000_000, peak_rss_bytes=350_000_000)
    assert worker_line(worker).endswith("; peak 350 MB of memory, 150 MB more than before the run")


def test_of_very_many_bars_all_that_compute_are_drawn():
    computing = [Action("forward", 0, i, float(i), i + 0.5) for i in range(1000)]
    waiting = [Action("wait", 0, i, i + 0.5, i + 1.0) for i in range(1000)]
    run = divided_run()
    run.timeline = Timeline(step_timeline([engine_timeline(0, [*computing, *waiting])]))
    assert (len(rows(run)["forward"]["x"]), len(rows(run)["wait"]["x"])) == (1000, 200)


def test_numbers_travel_as_float32():
    trace = rows(divided_run())["forward"]
    assert {trace[key].dtype for key in ("x", "y", "base")} == {np.dtype("float32")}


def test_the_stored_image_has_the_timeline_too():
    pytest.importorskip("matplotlib")
    alone = snapshot.bundle(FakeRun(step=1, history=FakeHistory(loss=[1.0]), workers=[FakeWorker()]), with_image=True)
    both = snapshot.bundle(divided_run(), with_image=True)
    assert png_height(both["image/png"]) > png_height(alone["image/png"]) + 100


def png_height(image: str) -> int:
    return int.from_bytes(base64.b64decode(image)[20:24], "big")


def shown(timeline: Timeline) -> dict:
    """As the value of a cell."""
    formatter = DisplayFormatter()
    register_drawers(formatter)
    return formatter.format(timeline)[0]


def test_a_timeline_is_drawn_in_a_cell():
    bundle = shown(Timeline(gpipe_of_two(num_micro_batches=4, seconds=0.001)))
    drawn = bundle["application/vnd.plotly.v1+json"]
    assert [trace["name"] for trace in drawn["data"]] == [kind[0] for kind in gantt.KINDS]
    assert bundle["text/plain"].startswith("step 12: 10 ms until the last gradient, bubble 20%")


def test_an_empty_timeline_says_so_in_a_cell():
    assert shown(Timeline(None))["text/plain"].startswith("no timeline")


def test_the_live_figure_takes_the_timeline_in_when_it_comes():
    pytest.importorskip("plotly")
    from dnb.notebook.live.browser.live_figure import LiveFigure

    run = divided_run()
    timeline, run.timeline = run.timeline, Timeline(None)
    live = LiveFigure(run_figure.figure(run))
    run.timeline = timeline
    live.paint(run_figure.figure(run))
    live.paint(run_figure.figure(run))
    assert len(live.data) == 10 + len(gantt.KINDS)
    assert live.layout.height > run_figure.PlotLayout().upper_pixels
    live.close()
