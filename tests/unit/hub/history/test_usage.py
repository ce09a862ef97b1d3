"""Rows of how engines spent their time, and what a chart makes of them."""

import numpy as np
import pytest

from dnb.hub.history.usage import UsageMeter
from dnb.planning.utilisation import Utilisation
from dnb.protocol.measurements import UsageRow, WorkerTotals
from tests.fake_runs import usage_rows


def totals(engine, *, compute=0.0, wait=0.0, data=0.0, alive=0.0, state="busy"):
    return WorkerTotals(
        engine=engine,
        host="host-a",
        pid=1,
        state=state,
        compute_seconds=compute,
        data_seconds=data,
        wait_seconds=wait,
        alive_seconds=alive,
        cpu_percent=None,
        rss_bytes=None,
        samples=0,
        steps=0,
    )


def test_a_row_holds_what_was_spent_since_the_one_before():
    meter = UsageMeter([], begin_seconds=2.0)
    meter.close_span(3.0, 5, [totals(0, compute=0.5, wait=0.25, data=0.125, alive=1.0)])
    row = meter.close_span(5.0, 9, [totals(0, compute=1.5, wait=0.5, data=0.125, alive=3.0)])
    assert row == UsageRow(
        begin_seconds=3.0,
        end_seconds=5.0,
        step=9,
        engines=(0,),
        compute=(1.0,),
        wait=(0.25,),
        data=(0.0,),
        idle=(0.75,),
    )


def test_engines_that_are_gone_are_left_out_of_a_row():
    meter = UsageMeter([], begin_seconds=0.0)
    row = meter.close_span(1.0, 1, [totals(0, compute=1.0, alive=1.0), totals(1, compute=0.5, alive=0.5, state="dead")])
    assert row is not None
    assert row.engines == (0,)


def test_counts_that_begin_anew_make_no_negative_time():
    meter = UsageMeter([], begin_seconds=0.0)
    meter.close_span(1.0, 1, [totals(0, compute=1.0, alive=1.0)])
    assert meter.close_span(2.0, 2, [totals(0, compute=0.25, alive=0.5)]) is None


@pytest.mark.parametrize(("seconds", "is_due"), [(100.2, False), (100.3, True)])
def test_a_span_lasts_a_quarter_of_a_second_at_least(seconds, is_due):
    assert UsageMeter([], begin_seconds=100.0).is_due(seconds) == is_due


def test_a_day_makes_a_few_thousand_rows():
    meter = UsageMeter([], begin_seconds=0.0)
    num_rows, seconds = 0, 0.0
    while seconds < 86_400:
        seconds += 0.2
        if meter.is_due(seconds):
            meter.skip_to(seconds)
            num_rows += 1
    assert 1_000 < num_rows < 4_000


def test_spans_are_shares_of_each_engines_own_time():
    spans = Utilisation(usage_rows(3)).spans(limit=10)
    assert spans.engines == (0, 1)
    assert spans.edges.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert spans.steps.tolist() == [10, 20, 30]
    assert spans.shares[:, 0, :2].tolist() == [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]


def test_spans_of_a_long_run_are_put_together():
    whole, few = Utilisation(usage_rows(1000)).spans(limit=2000), Utilisation(usage_rows(1000)).spans(limit=60)
    assert len(whole) == 1000
    assert 30 <= len(few) <= 60
    assert few.edges[0] == 0.0
    assert few.edges[-1] == 1000.0
    assert few.shares[0, 0, 0] == pytest.approx(whole.shares[: int(few.edges[1]), 0, 0].mean())


def test_an_engine_that_was_not_there_has_no_shares():
    late = Utilisation(usage_rows(2, engines=(0,)))
    row = UsageRow(
        begin_seconds=2.0,
        end_seconds=3.0,
        step=30,
        engines=(0, 2),
        compute=(1.0, 0.5),
        wait=(0.0, 0.5),
        data=(0.0, 0.0),
        idle=(0.0, 0.0),
    )
    late.extend([row])
    spans = late.spans(limit=10)
    assert spans.engines == (0, 2)
    assert np.isnan(spans.shares[:2, 1]).all()
    assert spans.shares[2, 1].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_nothing_is_known_of_a_run_without_rows():
    spans = Utilisation().spans(limit=10)
    assert len(spans) == 0
    assert spans.engines == ()
