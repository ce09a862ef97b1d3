import pytest

from dnb.notebook.charts import run_figure
from dnb.notebook.charts.metrics import AXIS
from tests.fake_runs import FakeHistory, FakeRun
from tests.full_runs import full_run


def measured(**columns: list[float]) -> FakeRun:
    run = FakeRun(step=4, history=FakeHistory(loss=[1.0] * 4, lr=[0.1] * 4, seconds=[1.0] * 4))
    for name, values in columns.items():
        steps = [2, 4] if name.startswith("val_") else None
        run.history.set(name, values, steps=steps)
    return run


def lines(run: FakeRun) -> dict[str, dict]:
    drawn = run_figure.figure(run)["data"]
    return {trace["name"]: trace for trace in drawn if trace.get("yaxis") == AXIS and len(trace["x"])}


def test_every_metric_is_drawn_of_training_and_of_validation():
    run = measured(accuracy=[0.1, 0.2, 0.3, 0.4], val_accuracy=[0.2, 0.3], val_f1=[0.5, 0.6])
    drawn = lines(run)
    assert list(drawn) == [
        "accuracy", "val_accuracy", "best val_accuracy", "val_f1", "best val_f1",
    ]  # fmt: skip
    assert drawn["val_accuracy"]["x"].tolist() == [2, 4]
    assert drawn["val_f1"]["y"].tolist() == pytest.approx([0.5, 0.6])


def test_the_best_value_is_marked_where_it_is_known_which_end_is_good():
    run = measured(val_accuracy=[0.9, 0.8], val_error=[0.1, 0.2], val_norm=[3.0, 4.0])
    drawn = lines(run)
    assert drawn["best val_accuracy"]["x"].tolist() == [2]
    assert drawn["best val_error"]["x"].tolist() == [2]
    assert "best val_norm" not in drawn


def test_a_run_without_metrics_has_no_room_for_them():
    assert not run_figure.room(measured()).has_metrics
    assert f"yaxis{AXIS[1:]}" not in run_figure.figure(measured())["layout"]


def test_the_subplot_of_metrics_lies_between_loss_and_samples_per_second():
    layout = run_figure.figure(measured(accuracy=[0.1] * 4))["layout"]
    loss, metrics, pace = (layout[name]["domain"] for name in ("yaxis", f"yaxis{AXIS[1:]}", "yaxis4"))
    assert loss[0] > metrics[1] > metrics[0] > pace[1]


def test_metrics_of_a_long_run_have_few_points():
    run = full_run(num_steps=50_000)
    run.history.set("accuracy", [0.5] * 50_000)
    assert len(lines(run)["accuracy, mean of 2048 steps"]["x"]) <= 240
