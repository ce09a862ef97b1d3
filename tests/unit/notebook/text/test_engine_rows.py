import json
from dataclasses import replace
from typing import Any

import pytest

from dnb.notebook.text.engine_rows import crowd_html, engine_rows
from dnb.planning.step_timeline import Timeline
from tests.fake_runs import FakeEvent, FakeRun, FakeWorker
from tests.timelines import gpipe_of_two

WHOLE = FakeWorker(
    engine=1,
    host="node-a",
    device="cpu",
    cores=2,
    cpu_percent=181.3,
    rss_bytes=512_000_000,
    peak_rss_bytes=600_000_000,
    memory_bytes=8_000_000_000,
    heartbeat_age_seconds=0.08,
    shards=(2, 3),
    samples=12_812,
    steps=200,
)


def row(worker: FakeWorker = WHOLE, **facts: Any) -> dict[str, Any]:
    (found,) = engine_rows(FakeRun(workers=[worker], num_shards=8, **facts))
    return found


def test_a_row_tells_everything_that_is_known_of_an_engine():
    assert row() == {
        "engine": 1,
        "kind": "busy",
        "mark": "●",
        "word": "busy",
        "is_news": False,
        "place": "node-a · cpu, 2 cores",
        "shares": [60, 10, 25, 5],
        "cpu": "180 % of 200 %",
        "memory": "512 MB",
        "share": "25 %",
        "more": [
            ["host", "node-a · cpu, 2 cores, process 4711"],
            ["CPU", "180 % of 200 %"],
            ["memory", "512 MB of 8 GB"],
            ["peak", "600 MB"],
            ["samples", "12.8 k in 200 steps"],
            ["share of the batch", "25 %"],
        ],
    }


def test_what_is_not_known_is_not_zero():
    assert (row(replace(WHOLE, cpu_percent=0.0))["cpu"], row(replace(WHOLE, cpu_percent=None))["cpu"]) == (
        "0 % of 200 %",
        "",
    )
    assert ["CPU", "not known"] in row(replace(WHOLE, cpu_percent=None))["more"]


def test_an_engine_without_shards_has_no_share_and_one_whose_shards_are_not_known_no_figure():
    assert (row(replace(WHOLE, shards=()))["share"], row(replace(WHOLE, shards=None))["share"]) == ("0 %", "")


@pytest.mark.parametrize(
    ("state", "mark", "is_news"),
    [("busy", "●", False), ("ready", "○", False), ("spare", "◇", True), ("dead", "✕", True), ("left", "←", True)],
)
def test_every_state_has_a_mark_and_unusual_ones_are_told(state: str, mark: str, is_news: bool):
    found = row(replace(WHOLE, state=state, compute=0.0))
    assert (found["kind"], found["mark"], found["word"], found["is_news"]) == (state, mark, state, is_news)


def test_an_engine_between_two_steps_is_at_work():
    assert row(replace(WHOLE, state="ready"))["kind"] == "busy"


def test_an_engine_that_is_gone_has_no_figures_of_now():
    found = row(replace(WHOLE, state="dead"))
    assert (found["cpu"], found["memory"], found["share"]) == ("", "", "")
    assert [name for name, _ in found["more"]] == ["host", "peak", "samples"]


def test_a_heartbeat_is_told_only_when_it_is_late():
    assert row(replace(WHOLE, heartbeat_age_seconds=1.9))["place"] == "node-a · cpu, 2 cores"
    late = row(replace(WHOLE, heartbeat_age_seconds=3.4), events=[FakeEvent(kind="hung", engine=1)])
    assert (late["place"], late["kind"], late["word"]) == ("no word for 3 s", "hung", "hung")


def test_nobody_beats_for_a_run_that_has_ended_and_its_figures_are_final():
    found = row(replace(WHOLE, heartbeat_age_seconds=99.0), status="finished")
    assert ["samples", "12,812 in 200 steps"] in found["more"]
    assert found["place"] == "node-a · cpu, 2 cores"


def test_an_engine_of_a_pipeline_is_told_by_its_stage():
    run = FakeRun(
        workers=[FakeWorker(engine=0), FakeWorker(engine=1)], timeline=Timeline(gpipe_of_two(num_micro_batches=4))
    )
    assert [found["share"] for found in engine_rows(run)] == ["stage 0 of 2", "stage 1 of 2"]


def test_rows_do_not_change_with_every_look():
    later = replace(WHOLE, cpu_percent=180.9, heartbeat_age_seconds=0.31, samples=12_831, rss_bytes=512_090_000)
    assert row(later) == row()


def test_four_rows_are_less_than_3_kilobytes():
    workers = [replace(WHOLE, engine=engine, host="node-0123456789") for engine in range(4)]
    assert len(json.dumps(engine_rows(FakeRun(workers=workers))).encode()) < 3000


def test_a_very_long_name_is_cut_and_control_characters_are_not_shown():
    found = row(replace(WHOLE, host="a\x1b[31m\nb" + "h" * 5000, device="c\u202ed", state="e\x00f"))
    assert found["place"].startswith("a [31m bh")
    assert len(found["place"]) < 100
    assert (found["mark"], found["word"], found["kind"]) == ("?", "e f", "busy")


def test_twelve_engines_have_rows_and_thirteen_a_heat_map():
    few, many = (FakeRun(workers=[FakeWorker(engine=engine) for engine in range(number)]) for number in (12, 13))
    assert (len(engine_rows(few)), crowd_html(few)) == (12, "")
    assert engine_rows(many) == []
    assert "<table>" in crowd_html(many)


def test_a_run_without_engines_says_so():
    assert "no engine yet" in crowd_html(FakeRun(status="starting"))
    assert "nothing is known of its engines" in crowd_html(FakeRun(status="finished"))
