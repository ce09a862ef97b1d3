from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from dnb.notebook.charts import run_figure, subplots
from dnb.notebook.charts.event_markers import MAX_MARKERS, MOST_EVERYWHERE, MarkerRange, marker_part
from dnb.notebook.charts.x_axis import abscissa
from dnb.notebook.pages.snapshot import bundle
from tests.fake_runs import FakeEvent, FakeHistory, FakeRun, FakeWorker


def event(kind: str, step: int, engine: int | None = None, text: str = "") -> FakeEvent:
    return FakeEvent(kind=kind, step=step, engine=engine, text=text or f"engine {engine} {kind}")


def event_markers(events: Sequence[FakeEvent], *, last_step: int, x: str = "step") -> tuple[list[dict], list[dict]]:
    run = FakeRun(step=last_step, events=list(events))
    part = marker_part(run, abscissa(run, x), ranges=[MarkerRange("x", (0.0, 1.0))])
    return part.notes, part.shapes


def labels(*events: FakeEvent, last_step: int = 20) -> list[tuple[int, str]]:
    notes, _ = event_markers(events, last_step=last_step)
    return [(note["x"], note["text"]) for note in notes]


def run_with(events: list[FakeEvent], *, num_steps: int = 10) -> FakeRun:
    run = FakeRun(step=num_steps, history=FakeHistory(loss=[0.5] * num_steps), events=events)
    run.workers = [FakeWorker()]
    return run


@pytest.mark.parametrize("kind", ["joined", "left", "died"])
def test_engines_that_come_and_go_are_marked_at_their_step(kind: str):
    assert labels(event(kind, 7, 2)) == [(7, f"{kind} 2")]


@pytest.mark.parametrize("kind", ["paused", "checkpoint"])
def test_pauses_and_checkpoints_are_marked_at_their_step(kind: str):
    assert labels(event(kind, 7)) == [(7, kind)]


@pytest.mark.parametrize("kind", ["running", "reassigned", "memory", "finished"])
def test_other_events_are_not_marked(kind: str):
    assert labels(event(kind, 7)) == []


@pytest.mark.parametrize(
    ("kind", "text", "label"),
    [
        ("set", "lr=0.001 from step 8", "lr=0.001"),
        ("mended", "loss or step function replaced from step 8", "new loss"),
        ("recovered", "the hub has restarted", "hub restarted"),
        ("chaos", "the hub is killed on purpose", "fault"),
    ],
)
def test_what_people_change_and_a_hub_that_restarts_are_marked(kind: str, text: str, label: str):
    assert labels(event(kind, 7, text=text)) == [(7, label)]


def test_a_fault_is_told_by_what_came_of_it():
    assert labels(event("chaos", 7, 1), event("died", 7, 1)) == [(7, "died 1")]


def test_engines_that_a_restarted_hub_hears_anew_have_not_joined():
    before = [event("joined", 0, engine) for engine in (0, 3)]
    again = [event("joined", 7, engine) for engine in (0, 3)]
    assert labels(*before, event("recovered", 7), *again) == [(7, "hub restarted")]


def test_an_engine_that_died_and_comes_back_has_joined():
    assert labels(event("joined", 0, 1), event("died", 5, 1), event("joined", 15, 1)) == [
        (5, "died 1"),
        (15, "joined 1"),
    ]


def test_few_markers_go_through_all_subplots_and_many_through_the_large_ones():
    for number, num_subplots in ((1, 4), (MOST_EVERYWHERE + 1, 1)):
        run = run_with([event("died", 2 + place, place) for place in range(number)], num_steps=20)
        assert len(run_figure.figure(run)["layout"]["shapes"]) == number * num_subplots


def test_engines_that_join_before_the_first_step_are_not_marked():
    assert labels(event("joined", 0, 1)) == []


def test_events_of_one_step_share_a_marker():
    assert labels(event("joined", 7, 2), event("joined", 7, 3)) == [(7, "joined 2, 3")]


def test_a_marker_of_several_kinds_counts_them_with_the_gravest_first():
    assert labels(event("joined", 7, 2), event("died", 7, 0), event("joined", 7, 3)) == [(7, "1 died, 2 joined")]


def test_a_marker_looks_like_the_gravest_of_its_events():
    _, shapes = event_markers([event("joined", 7, 2), event("died", 7, 0)], last_step=20)
    assert shapes[0]["line"]["color"] == subplots.VERMILION


def test_kinds_differ_by_more_than_colour():
    _, shapes = event_markers([event(kind, n) for n, kind in enumerate(("died", "joined", "paused"), 1)], last_step=9)
    assert len({shape["line"]["dash"] for shape in shapes}) == 3


def test_the_pointer_is_told_step_and_text():
    notes, _ = event_markers([event("died", 1207, 1, "engine 1 died")], last_step=2000)
    assert notes[0]["hovertext"] == "step 1,207: engine 1 died"


def test_text_of_unknown_origin_is_shown_as_it_is():
    notes, _ = event_markers([event("paused", 3, text="<b>$x$</b>\nnext")], last_step=9)
    assert notes[0]["hovertext"] == "step 3: &lt;b&gt;&#36;x&#36;&lt;/b&gt; next"


@pytest.mark.parametrize("last_step", [1, 23, 24, 25, 1000, 99_999])
def test_many_events_share_a_few_markers(last_step: int):
    events = [event("died", 1 + n * last_step // 5000, n) for n in range(5000)]
    notes, shapes = event_markers(events, last_step=last_step)
    assert len(notes) == len(shapes) <= MAX_MARKERS


def test_of_many_events_in_one_marker_a_few_are_told_and_the_rest_counted():
    notes, _ = event_markers([event("died", 5, n) for n in range(100)], last_step=9)
    assert notes[0]["hovertext"].endswith("step 5: engine 5 died<br>and 94 more")


def test_markers_stay_where_they_are_while_the_curve_grows():
    events = [event("died", 3, 1), event("joined", 90, 2)]
    assert labels(*events, last_step=100) == labels(*events, last_step=110) == [(3, "died 1"), (90, "joined 2")]


def test_a_marker_changes_the_layout_and_no_trace():
    plain, marked = (run_figure.figure(run_with(events)) for events in ([], [event("died", 4, 1)]))
    assert [subplots.changes(a, b) for a, b in zip(plain["data"], marked["data"], strict=True)] == [{}] * 10
    assert set(subplots.changes(plain["layout"], marked["layout"])) == {"annotations", "shapes"}


def test_without_a_step_there_is_no_axis_to_mark():
    figure = run_figure.figure(run_with([event("died", 4, 1)], num_steps=0))
    assert figure["layout"]["shapes"] == []


def test_markers_of_a_thousand_events_are_under_40_kilobytes():
    events = [event("died", 1 + n, n, "engine died " + "x" * 500) for n in range(1000)]
    layout = run_figure.figure(run_with(events, num_steps=1000))["layout"]
    assert len(json.dumps([layout["annotations"], layout["shapes"]])) < 40_000


def test_a_stored_picture_shows_the_markers():
    plain, marked = (bundle(run_with(events), with_image=True)["image/png"] for events in ([], [event("died", 4, 1)]))
    assert plain != marked
