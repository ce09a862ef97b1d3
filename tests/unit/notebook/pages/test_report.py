from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from dnb.api.runs.run import Run
from dnb.errors import ArgumentError
from dnb.hub.history.run_files import HistoryRow, RunSummary, summarize
from dnb.hub.history.run_folder import RunFolder
from dnb.notebook.pages import report as module
from dnb.notebook.pages.report import report
from dnb.protocol.measurements import Prediction, RunEvent
from tests.fake_runs import FakeEvent, FakeHistory, FakeRun, FakeWorker
from tests.unit.kept_runs import SPEC

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link"}
STATE = {
    "status": "finished",
    "error": "",
    "remote_traceback": "",
    "started": 1_000_000.0,
    "elapsed_seconds": 2.5,
    "step": 2,
}


class Page(HTMLParser):
    """What of a page a reader without JavaScript sees, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " | ".join(word for word in self.words if word.strip())


@pytest.fixture(autouse=True)
def _cheap_pictures(monkeypatch, request):
    """Drawing an image takes half a second: only where the claim is about it."""
    if "image" not in request.node.name:
        real = module.bundle
        monkeypatch.setattr(module, "bundle", lambda run, **_: real(run, with_image=False))


def run_of(**properties) -> FakeRun:
    history = FakeHistory(loss=[0.5, 0.25])
    history.set("val_loss", [0.3], steps=[2])
    facts = {"status": "finished", "step": 2, "num_steps": 2, "history": history, "elapsed_seconds": 2.5}
    return FakeRun(**{**facts, "workers": [FakeWorker(samples=128, steps=2)], **properties})


def saved(**changes) -> RunSummary:
    return msgspec.structs.replace(summarize(SPEC, **STATE), **changes)


def page(run: FakeRun | None = None, **changes) -> Page:
    return Page(source(run, **changes))


def source(run: FakeRun | None = None, **changes) -> str:
    return report(run or run_of(), **{"saved": saved(), "plotlyjs": "/* plotly */", "now": NOW, **changes})


def kept(folder: Path) -> Run:
    """A run of two steps, read from its folder."""
    with RunFolder(folder) as files:
        for step, loss in ((1, 0.5), (2, 0.25)):
            files.append_row(HistoryRow(kind="step", step=step, time=1.0, values={"loss": loss}))
        files.append_event(RunEvent(kind="died", text="engine 1 died", step=1, time=1_000_001.0, engine=1))
        files.write_summary(summarize(SPEC, **STATE))
    return Run.open(folder)


def test_the_page_says_when_the_run_was_and_when_it_was_written():
    assert "Submitted 1970-01-12 13:46:40 UTC, 2.5 s in all. Report of 2026-11-23 12:00 UTC." in page().text


def test_the_page_has_the_summary_in_words():
    assert "digits: finished after 2 steps in 2.5 s\n" in page().text
    assert "\nloss 0.2500 at step 2" in page().text


def test_the_page_has_the_chart_as_json_that_a_script_draws():
    drawing = json.loads(page().scripts[0])
    assert drawing["data"][1]["y"] == [0.5, 0.25]


def test_the_page_holds_plotly_itself_and_fetches_nothing():
    found = page()
    policy = dict(found.elements)["meta"]
    addresses = [value for _, attrs in found.elements for name, value in attrs.items() if name in ("src", "href")]
    assert ("/* plotly */" in found.scripts, addresses) == (True, [])
    assert "default-src 'none'" in next(a["content"] for t, a in found.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None


def test_the_image_is_there_without_javascript_and_says_in_words_what_it_shows():
    (image,) = [attrs for tag, attrs in page().elements if tag == "img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "finished after 2 steps" in image["alt"]


def test_without_matplotlib_the_page_says_that_the_chart_needs_javascript():
    assert "The chart needs JavaScript" in page().text


def test_the_page_has_a_row_for_every_column_of_the_history():
    assert "loss | 2 | 2 | 0.25 | 0.25 | 0.5" in page().text


def test_a_loss_that_is_no_number_is_told_without_extremes():
    run = run_of(history=FakeHistory(loss=[float("nan")]))
    assert "loss | 1 | 1 | nan | not known | not known" in page(run).text


def test_the_page_has_every_engine_with_what_is_not_known_said_so():
    run = run_of(workers=[FakeWorker(engine=3, cores=2, samples=128, steps=2)])
    expected = "3 | host-a | 4711 | busy | not known | 2 | 60% | 25% | 10% | 5% | 128 | 2 | not known"
    assert expected in page(run).text


def test_an_engine_that_did_nothing_has_no_shares():
    run = run_of(workers=[FakeWorker(compute=0.0, wait=0.0, data=0.0, idle=0.0)])
    assert "busy | not known | not known | not known | not known | not known | not known | 0" in page(run).text


def test_the_page_has_every_event_with_its_time():
    event = FakeEvent(kind="died", text="engine 1 died", step=7, time=1_000_000.0, engine=1)
    assert "1970-01-12 13:46:40 | 7 | died | 1 | engine 1 died" in page(run_of(events=[event])).text


def test_of_thousands_of_events_the_first_and_last_are_there():
    events = [FakeEvent(kind="died", text=f"death {number}", step=number, time=1.0) for number in range(1000)]
    text = page(run_of(events=events)).text
    assert ("death 199 " in text, "death 200 " in text, "600 events are left out" in text, "death 999" in text) == (
        True,
        False,
        True,
        True,
    )


def test_the_page_has_the_options_of_the_run():
    assert "batch size | 4" in page().text


def test_an_option_that_was_not_given_is_none():
    assert "clip norm | none" in page().text


def described(**words) -> RunSummary:
    return summarize(msgspec.structs.replace(SPEC, described=words), **STATE)


def test_the_page_has_model_loss_learning_rate_and_epochs():
    told = page(saved=described(model="Net, 8 parameters", loss="my_loss", lr="0.1", epochs="3")).text
    assert "model | Net, 8 parameters" in told
    assert "loss | my_loss" in told
    assert "lr | 0.1" in told
    assert "epochs | 3" in told


def test_options_begin_with_what_a_reader_asks_for_first():
    told = page(saved=described(model="Net, 8 parameters", loss="my_loss", epochs="3")).text
    assert "value | model | Net, 8 parameters | loss | my_loss | epochs | 3 | batch size | 4 | num samples" in told


def test_the_page_has_layers_and_code_in_sections_of_their_own():
    told = page(saved=described(layers="Net(\n  (0): ReLU()\n)", code="run = dnb.fit(model, train)")).text
    assert "Model | Net(\n  (0): ReLU()\n)" in told
    assert "Code of the cell | run = dnb.fit(model, train)" in told


def test_the_page_has_no_section_for_code_that_is_not_known():
    assert "Code of the cell" not in page().text


def test_the_page_has_the_versions_that_trained_beside_those_that_wrote_it():
    import torch

    changed = saved(versions={"torch": "1.0.0"})
    assert f"torch | 1.0.0 | {torch.__version__.partition('+')[0]}" in page(saved=changed).text


def test_without_run_json_there_are_no_options():
    assert "Options" not in page(saved=None).text


def test_the_prediction_of_a_plan_is_there():
    told = Prediction(
        batch_size=64, step_seconds=0.02, compute_seconds=0.015, bubble=0.2, stage_bytes=(1_000_000, 2_000_000)
    )
    assert "bubble | 20%" in page(run_of(prediction=told)).text


def test_without_a_plan_there_is_no_prediction():
    assert "Prediction" not in page().text


@pytest.mark.parametrize(
    "run",
    [
        run_of(name=EVIL),
        run_of(status="failed", error=EVIL),
        run_of(events=[FakeEvent(kind=EVIL, text=EVIL, step=1)]),
        run_of(workers=[FakeWorker(host=EVIL, device=EVIL, state=EVIL)]),
        run_of(history=FakeHistory(**{EVIL: [1.0], "loss": [1.0], f"val_{EVIL}": [1.0]})),
    ],
    ids=["name", "error", "event", "engine", "metric"],
)
def test_text_of_others_is_shown_and_not_run(run):
    found = page(run)
    assert ([tag for tag, _ in found.elements if tag in ("img", "b")], len(found.scripts)) == ([], 3)


def test_every_element_is_closed():
    assert page(run_of(events=[FakeEvent(kind="died", text="x", step=1)])).open == []


def test_a_run_in_progress_has_a_page_of_what_is_there():
    assert "digits: training on 1 engine" in page(run_of(status="running")).text


def test_a_run_without_a_step_has_a_page():
    run = FakeRun(status="starting", history=FakeHistory())
    assert "no step yet" in page(run, saved=None).text


def test_a_run_from_its_folder_has_a_page_with_plotly_in_it(tmp_path):
    from plotly.offline import get_plotlyjs

    path = kept(tmp_path / "digits").export(tmp_path / "a.html")
    text = path.read_text(encoding="utf-8")
    assert (get_plotlyjs() in text, "engine 1 died" in text, re.search(r"<script[^>]*src=", text)) == (True, True, None)


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="there is no folder"):
        kept(tmp_path / "digits").report(tmp_path / "missing" / "a.html")
