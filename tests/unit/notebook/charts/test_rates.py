import pytest

from dnb.notebook.charts import run_figure
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker
from tests.full_runs import full_run


def trace(run: FakeRun, axis: str, *, x: str = "step") -> dict:
    (found,) = [trace for trace in run_figure.figure(run, x=x)["data"] if trace.get("yaxis") == axis]
    return found


def words(run: FakeRun, axis: str) -> list[str]:
    notes = run_figure.figure(run)["layout"]["annotations"]
    return [note["text"] for note in notes if note["yref"] == f"{axis} domain"]


def test_samples_per_second_are_told_as_their_latest_mean():
    run = FakeRun(step=3, history=FakeHistory(loss=[1.0] * 3, samples_per_second=[100.0, 200.0, 1234.0]))
    assert words(run, "y4") == ["samples/s: 1,234"]


def test_the_learning_rate_is_drawn_and_told():
    run = FakeRun(step=2, history=FakeHistory(loss=[1.0] * 2, lr=[3e-4, 1e-4]))
    assert trace(run, "y5")["y"].tolist() == pytest.approx([3e-4, 1e-4])
    assert words(run, "y5") == ["learning rate: 0.0001"]


def test_gradient_norms_stand_at_the_steps_where_they_were_measured():
    run = FakeRun(step=20, history=FakeHistory(loss=[1.0] * 20))
    run.history.set("grad_norm", [2.0, 0.5], steps=[1, 17])
    assert trace(run, "y6")["x"].tolist() == [1, 17]


@pytest.mark.parametrize(("status", "claim"), [("running", "not measured yet"), ("finished", "not measured")])
def test_gradient_norms_that_were_not_measured_are_said_to_be_missing(status: str, claim: str):
    run = FakeRun(step=1, status=status, history=FakeHistory(loss=[1.0]))
    assert words(run, "y6") == ["gradient norm", claim]


def test_small_panels_of_a_long_run_have_few_points():
    run = full_run(num_steps=50_000)
    assert max(len(trace(run, axis)["x"]) for axis in ("y4", "y5", "y6")) <= 240


def test_by_samples_the_x_axis_counts_them():
    run = FakeRun(step=3, history=FakeHistory(loss=[3.0, 2.0, 1.0]))
    assert run_figure.figure(run, x="samples")["data"][1]["x"].tolist() == [64, 128, 192]


@pytest.mark.parametrize(
    ("elapsed_seconds", "unit", "places"),
    [(119.0, "s", [36.0, 90.0]), (120.0, "min", [0.6, 1.5]), (7200.0, "h", [0.01, 0.025])],
)
def test_by_time_the_x_axis_counts_seconds_minutes_or_hours(elapsed_seconds, unit, places):
    run = FakeRun(step=2, history=FakeHistory(loss=[3.0, 2.0], seconds=[36.0, 90.0]), elapsed_seconds=elapsed_seconds)
    drawn = run_figure.figure(run, x="time")
    assert drawn["data"][1]["x"] == pytest.approx(places)
    assert drawn["layout"]["xaxis"]["title"]["text"] == f"time since it was submitted ({unit})"


def test_an_evaluation_stands_at_the_time_of_its_step():
    run = FakeRun(step=2, history=FakeHistory(loss=[3.0, 2.0], seconds=[0.5, 90.0]))
    run.history.set("val_loss", [2.5], steps=[2])
    assert run_figure.figure(run, x="time")["data"][2]["x"].tolist() == [90.0]


def test_without_times_the_x_axis_says_that_it_counts_steps():
    run = FakeRun(step=2, history=FakeHistory(loss=[3.0, 2.0]), workers=[FakeWorker()])
    figure = run_figure.figure(run, x="time")
    assert figure["layout"]["xaxis"]["title"]["text"] == "step (times were not measured)"


def test_positions_travel_as_four_bytes():
    for kind in ("step", "samples", "time"):
        assert run_figure.figure(full_run(), x=kind)["data"][0]["x"].dtype.itemsize == 4


def test_axes_of_one_quantity_are_matched():
    layout = run_figure.figure(full_run())["layout"]
    assert layout["xaxis7"]["matches"] == "x"


def test_an_unknown_axis_is_refused_with_the_ones_that_there_are():
    with pytest.raises(Exception, match="x='steps' is no x axis"):
        run_figure.figure(full_run(), x="steps")
