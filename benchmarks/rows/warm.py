"""A second fit on a pool that is there, from the call to its first committed step; against a fresh torchrun."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from benchmarks.models import CASES
from benchmarks.ours import Side, open_side
from benchmarks.pairs import alternate, compare
from benchmarks.rivals.gang import Gang
from benchmarks.rivals.messages import Train, Trained
from benchmarks.rows.step import DDP
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

CASE = CASES["mlp-4m"]
NUM_ENGINES = 2
REACH_RATIO = 0.2
REACH_SECONDS = 1.0


def rows(settings: Settings) -> Iterator[Row]:
    """One row for the ratio, one for the seconds."""
    with open_side(NUM_ENGINES) as side:
        side.train(CASE, steps=3)
        figures = alternate({"ours": partial(_ours, side), "rival": fresh_torchrun}, rounds=settings.pairs)
    compared = compare(figures["ours"], figures["rival"])
    name = f"second fit, {CASE.name} N={NUM_ENGINES}"
    yield compared_row(name, compared, unit="s", reach=REACH_RATIO)
    yield Row(name=f"{name}, seconds", unit="s", ours=compared.ours, figure=compared.ours.median, reach=REACH_SECONDS)


def fresh_torchrun() -> float:
    """From the start of torchrun to the end of rank 0's first step."""
    began = time.time()
    with Gang(DDP, num_ranks=NUM_ENGINES) as gang:
        first = gang.turn(Train(case=CASE.name, steps=1))[0]
    assert isinstance(first, Trained)
    return first.first_step_wall - began


def _ours(side: Side) -> float:
    made = CASE.make_model(), CASE.data()
    began = time.time()
    return side.train(CASE, steps=3, made=made).first_commit - began
