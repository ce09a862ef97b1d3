from types import SimpleNamespace

import pytest

from dnb.errors import ArgumentError
from dnb.notebook.charts.compare_figure import comparison
from dnb.notebook.live import compare
from dnb.notebook.pages.snapshot import PLOTLY_MIME
from dnb.planning.utilisation import Utilisation
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, usage_rows, wait_until
from tests.unit.notebook.live.test_dashboard import WIDGET_MIME, Notebook


def run_of(*losses: float, **others) -> FakeRun:
    history = FakeHistory(loss=list(losses), samples_per_second=[100.0] * len(losses), lr=[1e-3] * len(losses))
    facts = {"status": "finished", "step": len(losses), "num_steps": len(losses), "elapsed_seconds": 2.0}
    return FakeRun(**{**facts, "history": history, "workers": [FakeWorker(samples=640)], **others})


def named(**runs: FakeRun) -> dict[str, FakeRun]:
    return runs


def losses(figure: dict) -> list[dict]:
    return [trace for trace in figure["data"] if "yaxis" not in trace]


def test_each_run_has_its_training_and_its_validation():
    names = [trace["name"] for trace in losses(comparison(named(a=run_of(2.0, 1.0), b=run_of(3.0))))]
    assert names == ["a: training", "a: no validation", "b: training", "b: no validation"]


def test_runs_differ_in_colour_dash_and_marker():
    looks = {
        (trace["line"]["color"], trace["line"]["dash"], trace["marker"]["symbol"])
        for trace in losses(comparison(named(a=run_of(1.0), b=run_of(2.0), c=run_of(3.0))))
    }
    assert [len(set(column)) for column in zip(*looks, strict=True)] == [3, 3, 3]


def test_a_name_with_markup_is_shown_and_not_run():
    trace = losses(comparison({"<b>x</b>$y$": run_of(1.0)}))[0]
    assert trace["name"] == "&lt;b&gt;x&lt;/b&gt;&#36;y&#36;: training"


def test_runs_are_compared_by_samples():
    figure = comparison(named(a=run_of(2.0, 1.0), b=run_of(2.0, 1.0, batch_size=32)), x="samples")
    assert [trace["x"].tolist() for trace in losses(figure)[::2]] == [[64, 128], [32, 64]]


def test_runs_without_a_step_are_said_to_have_none():
    notes = [note["text"] for note in comparison(named(a=run_of(), b=run_of()))["layout"]["annotations"]]
    assert "no step was committed in any of these runs" in notes


def test_the_table_has_a_line_for_each_run():
    run = run_of(2.0, 1.0)
    run.history.set("val_loss", [1.5, float("nan"), 1.25, 1.75], steps=[1, 1, 2, 2])
    assert compare.table_text(named(a=run, b=run_of())).splitlines() == [
        "run  status    steps  loss    best val_loss  samples/s  duration  engines",
        "a    finished  2      1.0000  1.2500         320        2.0 s     1",
        "b    finished  0      none    none           320        2.0 s     1",
    ]


def test_the_table_has_the_metrics_on_validation_data_or_else_of_the_training():
    run = run_of(2.0, 1.0)
    run.history.set("accuracy", [0.5, 0.6])
    run.history.set("val_accuracy", [0.7], steps=[2])
    run.history.set("perplexity", [3.0, 2.0])
    assert compare.table_text(named(a=run, b=run_of(3.0))).splitlines() == [
        "run  status    steps  loss    best val_loss  val_accuracy  perplexity  samples/s  duration  engines",
        "a    finished  2      1.0000  none           0.7000        2.0000      320        2.0 s     1",
        "b    finished  1      3.0000  none           none          none        320        2.0 s     1",
    ]


def engines_of(**facts) -> str:
    return compare.table_text(named(a=run_of(1.0, **facts))).splitlines()[1].rpartition("2.0 s     ")[2]


def test_engines_are_those_at_the_end_and_all_that_ever_took_part():
    workers = [FakeWorker(engine=0), FakeWorker(engine=1, state="dead"), FakeWorker(engine=2, state="spare")]
    assert engines_of(workers=workers) == "1 (of 3)"


def test_engines_of_a_run_that_was_read_from_its_folder_are_those_of_its_last_span():
    ran = Utilisation([*usage_rows(2, engines=(0, 1, 2)), *usage_rows(1, engines=(0, 2))])
    assert engines_of(workers=[], utilisation=ran) == "2 (of 3)"


def test_the_bundle_holds_chart_and_table_under_100_kilobytes():
    content = compare.bundle(named(a=run_of(2.0, 1.0), b=run_of(3.0)), with_image=True)
    assert set(content) == {PLOTLY_MIME, "text/plain", "image/png"}


def test_runs_of_one_name_are_told_apart():
    assert list(compare.labelled([run_of(1.0), run_of(2.0)])) == ["digits", "digits (2)"]


def test_an_unknown_run_is_refused_with_the_runs_that_there_are(tmp_path):
    (tmp_path / "digits-1").mkdir()
    with pytest.raises(ArgumentError, match=r"'digts' is no run; there are in .*: digits-1"):
        compare.find_run("digts", names={}, folder=tmp_path)


def test_a_variable_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="'a' is a SimpleNamespace, not a run; there are no runs yet"):
        compare.find_run("a", names={"a": SimpleNamespace()}, folder=tmp_path)


def test_without_runs_nothing_is_compared():
    with pytest.raises(ArgumentError, match="compare which runs"):
        compare.show_runs([])


def test_a_live_comparison_grows_and_becomes_plain_output_at_the_end():
    notebook, going = Notebook(), run_of(2.0, status="running")
    live = compare.Comparison(named(a=run_of(1.0), b=going), interval_seconds=0.01, publish=notebook.publish)
    assert WIDGET_MIME in notebook.shown()[0]
    wait_until(lambda: live.figure is not None)
    going.history.append("loss", 2, 1.5)
    going.tell()
    wait_until(lambda: len(live.figure.data[2].y) == 2)
    going.end("finished")
    assert live.join(timeout_seconds=30)
    assert [set(content) for content in notebook.shown()] == [{PLOTLY_MIME, "text/plain"}]
    assert going.listeners == []


def test_a_comparison_that_was_closed_leaves_the_runs_alone():
    notebook, going = Notebook(), run_of(2.0, status="running")
    live = compare.Comparison(named(a=going), interval_seconds=0.01, publish=notebook.publish)
    live.box.close()
    going.tell()
    assert live.join(timeout_seconds=30)
    assert (going.listeners, going.num_stops) == ([], 0)
