import base64
import io
import json
import sys

import numpy as np
import pytest

from dnb.notebook.charts.subplots import SHARE_COLORS
from dnb.notebook.pages.snapshot import PLOTLY_MIME, bundle
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, long_run
from tests.full_runs import full_run


def finished(**properties) -> FakeRun:
    history = FakeHistory(loss=[0.5, 0.25, 0.125])
    history.set("val_loss", [0.2], steps=[3])
    history.set("val_accuracy", [0.975], steps=[3])
    facts = {"status": "finished", "step": 3, "num_steps": 3, "history": history, "elapsed_seconds": 2.0}
    return FakeRun(**{**facts, "workers": [FakeWorker()], **properties})


def drawing(run: FakeRun) -> dict:
    return bundle(run, with_image=False)[PLOTLY_MIME]


def pixels(run: FakeRun) -> np.ndarray:
    import matplotlib.image

    png = base64.b64decode(bundle(run, with_image=True)["image/png"])
    return matplotlib.image.imread(io.BytesIO(png), format="png")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return pixels(finished())


def contains(image: np.ndarray, color: str) -> bool:
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return bool((np.abs(image[..., :3] - rgb).max(axis=-1)[image[..., 3] > 0.9] < 0.01).any())


def test_without_an_image_there_are_chart_and_words():
    assert set(bundle(finished(), with_image=False)) == {PLOTLY_MIME, "text/plain"}


def test_with_an_image_there_is_one():
    assert bundle(finished(), with_image=True)["image/png"].startswith("iVBORw0KGgo")


def test_without_matplotlib_the_image_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert set(bundle(finished(), with_image=True)) == {PLOTLY_MIME, "text/plain"}


def test_pyplot_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "image/png" in bundle(finished(), with_image=True)


def test_the_chart_holds_the_numbers_as_plain_lists():
    assert drawing(finished())["data"][1]["y"] == [0.5, 0.25, 0.125]


def test_the_chart_of_a_long_run_is_under_100_kilobytes():
    assert len(json.dumps(drawing(long_run()))) < 100_000


def test_a_stored_run_is_under_100_kilobytes_with_its_picture():
    run = full_run(num_steps=100_000, num_engines=4)
    run.history.set("accuracy", [0.5 + step / 200_000 for step in range(100_000)])
    run.status = "finished"
    assert len(json.dumps(bundle(run, with_image=True), indent=1)) < 100_000


def test_long_columns_are_packed_and_a_loss_that_is_no_number_is_a_gap():
    losses = [0.5, float("nan"), *[0.25] * 98]
    chart = drawing(finished(step=100, history=FakeHistory(loss=losses)))["data"]
    (steps, seen) = next((trace["x"], trace["y"]) for trace in chart if "bdata" in trace.get("x", ()))
    assert (steps["dtype"], seen["dtype"]) == ("i4", "f4")
    assert np.frombuffer(base64.b64decode(steps["bdata"]), "<i4").tolist() == list(range(1, 101))
    assert np.array_equal(np.frombuffer(base64.b64decode(seen["bdata"]), "<f4"), np.float32(losses), equal_nan=True)


def test_a_long_title_has_all_of_its_lines_in_the_picture():
    title = drawing(finished(name="a-name-" * 12))["layout"]["title"]
    assert ("<br>" in title["text"], title["pad"]["t"]) == (True, 19)


def test_the_chart_is_valid_json_when_a_loss_is_nan():
    run = finished(history=FakeHistory(loss=[0.5, float("nan")]))
    assert json.loads(json.dumps(drawing(run), allow_nan=False))["data"][1]["y"] == [0.5, None]


def test_the_chart_carries_no_template():
    assert "template" not in drawing(finished())["layout"]


def test_plotly_accepts_the_chart():
    import plotly.graph_objects as go

    chart = drawing(finished())
    assert len(go.Figure(data=chart["data"], layout=chart["layout"]).data) == 13


def test_the_title_tells_how_the_run_ended():
    assert drawing(finished())["layout"]["title"]["text"] == (
        "digits: finished after 3 steps in 2.0 s, loss 0.1250, val_loss 0.2000, val_accuracy 0.9750"
    )


def test_text_from_an_engine_is_shown_in_the_title_and_not_run():
    run = finished(status="failed", error="step 3 on engine 1: <a href='javascript:x'> $x_1$")
    assert "&lt;a href='javascript:x'&gt; &#36;x_1&#36;" in drawing(run)["layout"]["title"]["text"]


def test_a_long_title_makes_the_figure_higher():
    short, long = finished(), finished(status="failed", error="word " * 50)
    assert drawing(long)["layout"]["height"] > drawing(short)["layout"]["height"]


@pytest.mark.parametrize("color", ["#1E80C8", "#D55E00", *SHARE_COLORS.values()])
def test_the_image_has_the_colours_of_the_chart(image, color):
    assert contains(image, color)


def test_the_image_is_transparent_around_the_chart(image):
    assert image[0, 0, 3] == 0


@pytest.mark.parametrize(
    "run",
    [
        FakeRun(status="failed", error="loading on engine 0: OSError: <no $ data>"),
        finished(history=FakeHistory(loss=[float("nan")])),
        finished(workers=[]),
        finished(workers=[FakeWorker(engine=i, state="dead") for i in range(64)]),
    ],
    ids=["no step", "only nan", "no workers", "64 dead engines"],
)
def test_every_run_can_be_drawn(run):
    assert "image/png" in bundle(run, with_image=True)


def test_the_words_are_the_summary():
    words = bundle(finished(), with_image=False)["text/plain"]
    assert words.splitlines()[0] == "digits: finished after 3 steps in 2.0 s"
