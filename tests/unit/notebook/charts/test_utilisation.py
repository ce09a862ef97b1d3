import json

import numpy as np
import pytest

from dnb.notebook.charts import run_figure
from dnb.notebook.pages.snapshot import plotly_json
from dnb.planning.utilisation import Utilisation
from tests.fake_runs import FakeHistory, FakeRun, FakeWorker, usage_rows
from tests.full_runs import full_run


def run_with(*, num_engines: int = 2, num_rows: int = 4, **others) -> FakeRun:
    run = FakeRun(step=10 * num_rows, history=FakeHistory(loss=[0.5] * 10 * num_rows), **others)
    run.workers = [FakeWorker(engine=engine) for engine in range(num_engines)]
    run.utilisation = Utilisation(usage_rows(num_rows, engines=tuple(range(num_engines))))
    return run


def areas(run: FakeRun, *, x: str = "step") -> list[dict]:
    return [trace for trace in run_figure.figure(run, x=x)["data"] if "stackgroup" in trace]


def heat(run: FakeRun) -> list[dict]:
    return [trace for trace in run_figure.figure(run)["data"] if trace["type"] == "heatmap"]


def test_each_engine_has_a_strip_with_an_area_for_each_share():
    assert [(trace["yaxis"], trace["name"]) for trace in areas(run_with())] == [
        (axis, share) for axis in ("y10", "y11") for share in ("compute", "wait", "data", "idle")
    ]


def test_shares_over_the_run_are_whole_percents_up_to_the_last_edge():
    compute = areas(run_with())[0]
    assert (compute["y"].dtype, compute["y"].tolist()) == (np.uint8, [20, 40, 60, 80, 80])
    assert compute["x"].tolist() == [0, 10, 20, 30, 40]


def test_percents_of_an_engine_add_up_to_a_hundred():
    parts = areas(full_run(num_engines=1))
    assert set(sum(trace["y"].astype(int) for trace in parts).tolist()) == {100}


def test_where_an_engine_did_not_take_part_its_strip_is_empty():
    parts = areas(full_run(num_engines=2))[4:]
    heights = sum(trace["y"].astype(int) for trace in parts)
    assert set(heights.tolist()) == {0, 100}


def test_each_share_has_its_colour_its_pattern_and_one_entry_in_the_legend():
    parts = areas(run_with())
    assert len({(area["fillcolor"], area["fillpattern"]["shape"]) for area in parts}) == 4
    assert [area["name"] for area in parts if area["showlegend"]] == ["compute", "wait", "data", "idle"]


def test_up_to_eight_engines_have_strips_and_nine_a_heat_map():
    assert (len(heat(run_with(num_engines=8))), len(heat(run_with(num_engines=9)))) == (0, 1)


def test_a_heat_map_has_a_row_for_each_engine():
    (over_time,) = heat(run_with(num_engines=64))
    assert len(over_time["z"]) == 64


def test_a_heat_map_of_64_engines_is_small():
    run = full_run(num_engines=64)
    assert len(json.dumps(plotly_json({"data": heat(run), "layout": {}}))) < 20_000


def test_an_engine_that_is_gone_leaves_a_gap_in_a_heat_map():
    (over_time,) = heat(full_run(num_engines=9))
    assert None in over_time["z"][-1]


def test_beside_64_rows_stand_as_many_names_as_have_room():
    layout = run_figure.figure(run_with(num_engines=64))["layout"]
    assert layout["yaxis10"]["ticktext"][:2] == ["engine 0", "engine 8"]


def test_without_spans_the_panel_says_so_in_its_own_place():
    run = FakeRun(step=1, history=FakeHistory(loss=[0.5]), workers=[FakeWorker()])
    notes = {note["text"]: (note["xref"], note["yref"]) for note in run_figure.figure(run)["layout"]["annotations"]}
    assert notes["not recorded yet"] == ("x7 domain", "y10 domain")
    assert len(areas(run)) == 4  # plotly makes no panel that has no trace


def test_a_strip_keeps_its_place_while_the_run_grows():
    few, many = (run_figure.figure(run_with(num_rows=n))["layout"]["yaxis10"]["domain"] for n in (3, 30))
    assert few == many


@pytest.mark.parametrize(("num_engines", "pixels"), [(1, 62), (8, 112), (16, 80), (64, 200)])
def test_more_engines_have_more_room_up_to_a_limit(num_engines: int, pixels: int):
    assert run_figure.room(run_with(num_engines=num_engines)).slim_pixels == pixels
