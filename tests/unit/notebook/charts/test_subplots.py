import itertools

import numpy as np
import pytest

from dnb.notebook.charts import curves, run_figure, subplots
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, long_run
from tests.full_runs import full_run


def run_with(losses: list[float], **columns: list[float]) -> FakeRun:
    run = FakeRun(step=len(losses), history=FakeHistory(loss=losses, **columns))
    run.workers = [FakeWorker(engine=0), FakeWorker(engine=1)]
    return run


def curve(values: list[float]) -> curves.Curve:
    return curves.Curve(steps=np.arange(1, len(values) + 1, dtype=np.int32), values=np.array(values, dtype=np.float32))


def traces(run: FakeRun) -> dict[str, dict]:
    keys = ["raw", "smooth", "validation"]
    return dict(zip(keys, run_figure.figure(run)["data"], strict=False))


def remarks(run: FakeRun) -> list[str]:
    """The words in the subplots, but for their names and what is missing in the small ones."""
    return [
        note["text"]
        for note in run_figure.figure(run)["layout"]["annotations"]
        if note["yanchor" if "yanchor" in note else "y"] != "bottom" and note["yref"] == "y domain"
    ]


def brightness(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_decimating_a_short_column_keeps_every_point():
    assert curves.decimate(np.arange(1000.0)).tolist() == list(range(1000))


@pytest.mark.parametrize("size", [1001, 1003, 4999, 100_000])
def test_decimating_keeps_no_more_than_the_limit(size):
    assert len(curves.decimate(np.random.default_rng(0).random(size))) <= 1000


@pytest.mark.parametrize("size", [1001, 1003, 4999, 100_000])
def test_decimating_with_gaps_keeps_no_more_than_the_limit(size):
    values = np.random.default_rng(0).random(size)
    values[::3] = np.nan
    assert len(curves.decimate(values)) <= 1000


def test_decimating_keeps_the_first_and_the_last_point():
    assert curves.decimate(np.zeros(12_345))[[0, -1]].tolist() == [0, 12_344]


def test_decimating_keeps_a_spike_up_and_a_spike_down():
    values = np.ones(50_000)
    values[31_234], values[17] = 9.0, -9.0
    assert {31_234, 17} <= set(curves.decimate(values).tolist())


def test_decimating_keeps_a_point_that_is_not_a_number():
    values = np.ones(50_000)
    values[31_234] = np.nan
    assert 31_234 in curves.decimate(values).tolist()


def test_decimating_gives_ascending_indices_without_repeats():
    kept = curves.decimate(np.random.default_rng(0).random(7777))
    assert (np.diff(kept) > 0).all()


def test_a_running_mean_of_a_constant_is_that_constant():
    means, _ = curves.running_mean(curve([2.0] * 3000))
    assert means.values.tolist() == [2.0] * len(means)


def test_a_running_mean_is_of_the_values_around_it():
    means, window = curves.running_mean(curve([float(i) for i in range(1, 161)]))
    assert (window, means.values[80]) == (4, 80.5)  # (79 + 80 + 81 + 82) / 4, at step 81


def test_a_running_mean_ends_at_the_last_step():
    means, _ = curves.running_mean(curve([1.0] * 1777))
    assert means.last_step == 1777


def test_a_huge_loss_leaves_no_trace_in_later_means():
    means, _ = curves.running_mean(curve([1e30] + [1.0] * 999))
    assert means.values[-1] == 1.0


def test_a_running_mean_leaves_out_what_is_not_a_number():
    means, _ = curves.running_mean(curve([1.0] * 500 + [float("nan")] + [1.0] * 1499))
    assert np.isfinite(means.values).all()


def test_a_running_mean_of_nothing_is_empty():
    means, window = curves.running_mean(curve([]))
    assert (len(means), window) == (0, 1)


def test_the_raw_loss_is_drawn_step_by_step():
    raw = traces(run_with([0.5] * 60 + [0.25]))["raw"]
    assert (raw["x"][-1], raw["y"][-1]) == (61, 0.25)


def test_numbers_travel_as_small_binary_types():
    raw = traces(long_run())["raw"]
    assert (raw["x"].dtype, raw["y"].dtype) == (np.int32, np.float32)


def test_no_trace_of_a_long_run_has_more_than_1000_points():
    assert max(len(trace["x"]) for trace in traces(long_run()).values()) <= 1000


def test_one_step_is_drawn_with_a_marker():
    smooth = traces(run_with([0.5]))["smooth"]
    assert (smooth["mode"], smooth["x"].tolist()) == ("lines+markers", [1])


def test_a_short_run_has_one_training_line_in_the_legend():
    shown = [trace["name"] for trace in traces(run_with([0.5] * 5)).values() if trace["showlegend"]]
    assert shown == ["training"]


def test_validation_losses_stand_at_their_steps():
    run = run_with([0.5] * 124)
    run.history.set("val_loss", [0.7, 0.6], steps=[62, 124])
    assert traces(run)["validation"]["x"].tolist() == [62, 124]


def test_without_validation_there_is_no_such_entry_in_the_legend():
    assert traces(run_with([0.5, 0.4]))["validation"]["showlegend"] is False


def test_validation_differs_from_training_by_dash_and_marker():
    validation = traces(run_with([0.5, 0.4]))["validation"]
    assert (validation["line"]["dash"], validation["marker"]["symbol"]) == ("dash", "diamond")


def test_a_loss_that_is_nan_is_named_with_its_step():
    assert remarks(run_with([0.5, 0.4, float("nan")])) == ["loss is nan at step 3"]


def test_an_infinite_loss_is_named_with_its_step():
    assert remarks(run_with([0.5, float("inf"), 0.4])) == ["loss is infinite at step 2"]


def test_further_losses_that_are_no_numbers_are_counted():
    assert remarks(run_with([float("nan")] * 4)) == ["loss is nan at step 1 and in 3 more"]


def test_a_loss_beyond_single_precision_counts_as_infinite():
    assert remarks(run_with([1.0, 1e200])) == ["loss is infinite at step 2"]


def test_a_loss_that_is_nan_stays_a_gap_in_the_line():
    smooth = traces(run_with([0.5, float("nan"), 0.25]))["smooth"]
    assert np.isnan(smooth["y"]).tolist() == [False, True, False]


def test_before_the_first_step_the_figure_says_that_it_waits():
    run = FakeRun(status="starting", workers=[FakeWorker()])
    assert remarks(run) == ["waiting for the first step"]


def test_a_run_that_was_stopped_by_an_error_does_not_seem_to_wait():
    run = FakeRun(status="paused", error="step 1: ValueError: no", workers=[FakeWorker()])
    assert remarks(run) == ["no step was made"]


def test_subplots_do_not_lie_on_each_other_in_one_column_or_two():
    run = full_run(num_engines=8)
    run.history.set("accuracy", [0.5] * run.step)
    for is_wide in (False, True):
        layout = run_figure.figure(run, is_wide=is_wide)["layout"]
        areas = {
            name: (*layout[f"xaxis{layout[name]['anchor'][1:]}"]["domain"], *layout[name]["domain"])
            for name in layout
            if name.startswith("yaxis")
        }
        for one, other in itertools.combinations(areas.values(), 2):
            assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]


def test_metrics_are_beside_the_loss_on_a_wide_page_and_below_it_on_a_narrow_one():
    run = run_with([0.5] * 4, accuracy=[0.5] * 4)
    narrow, wide = (run_figure.figure(run, is_wide=is_wide)["layout"] for is_wide in (False, True))
    assert (narrow["xaxis"]["domain"], narrow["xaxis8"]["domain"]) == ([0.0, 1.0], [0.0, 1.0])
    assert wide["yaxis"]["domain"] == wide["yaxis90"]["domain"]


def test_without_metrics_the_loss_has_the_whole_width():
    assert run_figure.figure(run_with([0.5]), is_wide=True)["layout"]["xaxis"]["domain"] == [0.0, 1.0]


def test_the_zoom_survives_because_uirevision_is_constant():
    layouts = [run_figure.figure(run)["layout"] for run in (run_with([0.5]), long_run())]
    assert layouts[0]["uirevision"] == layouts[1]["uirevision"]


def test_text_has_contrast_on_white_and_on_the_dark_theme():
    ink = brightness(subplots.INK) + 0.05
    assert min(1.05 / ink, ink / (brightness("#111111") + 0.05)) > 4.2


def test_changes_of_equal_figures_are_empty():
    old, new = (run_figure.figure(run_with([0.5, float("nan")])) for _ in range(2))
    assert subplots.changes(old["layout"], new["layout"]) == {}
    assert [subplots.changes(a, b) for a, b in zip(old["data"], new["data"], strict=True)] == [{}] * 10


def test_changes_after_a_step_leave_styles_out():
    old, new = (run_figure.figure(run_with([0.5] * size))["data"][1] for size in (2, 3))
    assert set(subplots.changes(old, new)) == {"x", "y"}
