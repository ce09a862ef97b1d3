"""What plans predict against what runs take, and the plan that is chosen against all that were run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import product

import dnb
from benchmarks.models import CASES, Case
from benchmarks.ours import Side, open_side
from benchmarks.pairs import alternate, spread
from benchmarks.rows.step import after_warm_up, warm_steps
from benchmarks.settings import Settings
from benchmarks.table import Row

NAMES = ("mlp-17m", "gpt-3m", "cnn")
NUM_ENGINES = 2
NUMBERS_OF_MICRO_BATCHES = (2, 4, 8)
SCHEDULES = ("1f1b", "gpipe")
MOST_CUTS = 4
REACH_CHOICE, REACH_ERROR = 1.05, 0.15
TURNS = 1  # of each plan: what counts is the median over all of them


def rows(settings: Settings) -> Iterator[Row]:
    """Per model: the chosen plan's measured time to the best one's, and the median error of all predictions."""
    for name in NAMES:
        with open_side(NUM_ENGINES) as side:
            yield from _rows(settings, CASES[name], side)


def _rows(settings: Settings, case: Case, side: Side) -> Iterator[Row]:
    batch_size = NUM_ENGINES * case.batch_per_engine
    inputs, targets = case.data()
    chosen = dnb.plan(
        case.make_model(),
        (inputs[:batch_size], targets[:batch_size]),
        loss=case.loss,
        optimizer=case.optimizer,
        pool=side.pool,
    )
    plans = {_text(plan): plan for plan in (chosen, *_others(chosen))}
    if settings.is_quick:
        plans = dict(list(plans.items())[:4])
    figures = alternate(
        {text: (lambda plan=plan: _measure(settings, case, side, plan)) for text, plan in plans.items()},
        rounds=TURNS,
    )
    measured = {text: statistics.median(seconds) for text, seconds in figures.items()}
    errors = {text: plan.step_seconds / measured[text] - 1 for text, plan in plans.items()}
    best = min(measured, key=lambda text: measured[text])
    details = {text: {"predicted": plan.step_seconds, "measured": figures[text]} for text, plan in plans.items()}
    yield Row(
        name=f"choice {case.name}",
        unit="times the best",
        figure=measured[_text(chosen)] / measured[best],
        reach=REACH_CHOICE,
        ours=spread([seconds / measured[best] for seconds in figures[_text(chosen)]]),
        note=f"chosen: {_text(chosen)}; best of {len(plans)} that were run: {best}",
        details=details,
    )
    yield Row(
        name=f"prediction {case.name}",
        unit="of the measured step",
        figure=statistics.median(map(abs, errors.values())),
        reach=REACH_ERROR,
        ours=spread(list(errors.values())),
        note=f"median of |predicted / measured - 1| over {len(plans)} plans",
        details=details,
    )


def _others(plan: dnb.Plan) -> Iterator[dnb.Plan]:
    """Data parallel, and pipelines of two stages with cuts in the middle of the work."""
    yield plan.with_(data=NUM_ENGINES, num_stages=1)
    for cut, number, schedule in product(_cuts(plan), NUMBERS_OF_MICRO_BATCHES, SCHEDULES):
        yield plan.with_(data=1, num_stages=2, cuts=[cut], num_micro_batches=number, schedule=schedule)


def _cuts(plan: dnb.Plan) -> list[str]:
    """The layers nearest to where half of the work is done."""
    seconds = [layer.forward_seconds[-1] + layer.backward_seconds[-1] for layer in plan.profile.layers]
    whole = sum(seconds)
    away = {index: abs(sum(seconds[:index]) / whole - 0.5) for index in range(1, len(seconds))}
    nearest = sorted(away, key=lambda index: away[index])[:MOST_CUTS]
    return [plan.profile.layers[index].name for index in sorted(nearest)]


def _text(plan: dnb.Plan) -> str:
    if plan.partition is None:
        return str(plan.mesh)
    return f"{plan.mesh} cut at {', '.join(plan.partition.cuts)}, {plan.num_micro_batches} x {plan.schedule}"


def _measure(settings: Settings, case: Case, side: Side, plan: dnb.Plan) -> float:
    steps = settings.steps_for(plan.step_seconds, at_least=4)
    training = side.train(case, steps=steps + warm_steps(steps), batch_size=plan.batch_size, strategy=plan)
    return statistics.fmean(after_warm_up(training.step_seconds))
