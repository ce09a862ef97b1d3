"""A model divided over engines, against the same schedule driven by torchrun and bare torch.distributed.pipelining."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise

from benchmarks.models import CASES, Case
from benchmarks.ours import Side, open_side
from benchmarks.pairs import alternate, compare, spread
from benchmarks.rivals.gang import Gang
from benchmarks.rivals.messages import Trained, TrainPipeline
from benchmarks.rows.step import after_warm_up, warm_steps
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from dnb.partitioning.pipeline.partitions import pipelines
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.planning.step_timeline import ideal_bubble

# Samples per second may be 3 % less than the rival's.
REACH = 1 / 0.97
# The share in which engines wait for each other may differ so much from (p - 1) / (m + p - 1), where stages are equal
# and every engine has a core.
REACH_BUBBLE = 0.10
EQUAL_STAGES = {"mlp-17m": 2, "gpt-3m": 2}
RIVAL = "benchmarks.rivals.pipeline"
MICRO_BATCHES = 8
PROBE_STEPS = 4
# By the number of engines. With the CNN in four stages a rank of the rival failed.
NAMES = {2: ("mlp-17m", "gpt-3m", "cnn"), 4: ("mlp-17m", "gpt-3m")}
SCHEDULES = {2: ("1f1b", "gpipe"), 4: ("1f1b",)}


def rows(settings: Settings) -> Iterator[Row]:
    """One row per number of engines, case and schedule."""
    for num_engines, schedules in SCHEDULES.items():
        with open_side(num_engines) as side, Gang(RIVAL, num_ranks=num_engines) as gang:
            for name in NAMES[num_engines]:
                for schedule in schedules:
                    yield from _rows(settings, CASES[name], side, gang, schedule=schedule)


def _rows(settings: Settings, case: Case, side: Side, gang: Gang, *, schedule: str) -> Iterator[Row]:
    batch_size = 2 * case.batch_per_engine
    cuts = _cuts(case, side.num_engines, batch_size=batch_size)
    bubbles: list[float] = []

    def rival_turn(steps: int) -> float:
        replies = gang.turn(
            TrainPipeline(
                case=case.name,
                steps=steps,
                batch_size=batch_size,
                micro_batches=MICRO_BATCHES,
                schedule=schedule,
                cuts=cuts,
            )
        )
        last = replies[-1]
        assert isinstance(last, Trained)
        differences = [later - earlier for earlier, later in pairwise(last.ends)]
        return statistics.fmean(after_warm_up([0.0, *differences]))

    def ours_turn(steps: int) -> float:
        training = side.train(
            case,
            steps=steps,
            batch_size=batch_size,
            micro_batch=batch_size // MICRO_BATCHES,
            strategy="pipeline",
            schedule=schedule,
        )
        bubbles.append(training.run.timeline.median_bubble)
        return statistics.fmean(after_warm_up(training.step_seconds))

    steps = settings.steps_for(rival_turn(PROBE_STEPS), at_least=6)
    steps += warm_steps(steps)
    figures = alternate(
        {"ours": lambda: ours_turn(steps), "rival": lambda: rival_turn(steps)},
        rounds=settings.pairs,
    )
    yield compared_row(
        f"pipelines {case.name} {schedule} N={side.num_engines}",
        compare(figures["ours"], figures["rival"]),
        unit="ms",
        scale=1e3,
        reach=REACH,
        details={"case": case.text, "steps_per_turn": steps, "micro_batches": MICRO_BATCHES, "cuts": cuts},
    )
    if case.name in EQUAL_STAGES and side.num_engines == EQUAL_STAGES[case.name]:
        ideal = ideal_bubble(side.num_engines, MICRO_BATCHES)
        yield Row(
            name=f"bubble {case.name} {schedule} N={side.num_engines}",
            unit="of the engines' time",
            ours=spread(bubbles),
            figure=abs(statistics.median(bubbles) - ideal),
            reach=REACH_BUBBLE,
            note=f"the formula says {ideal:.3f}; held against reach is how far it is from that",
            details={"each": bubbles},
        )


def _cuts(case: Case, num_engines: int, *, batch_size: int) -> list[str]:
    """Where `fit` cuts."""
    inputs, targets = case.data()
    partitions, _ = pipelines(
        case.make_model(),
        Inputs.of((inputs[:8], targets[:8])),
        most_engines=num_engines,
        num_samples=batch_size,
        micro_batch=batch_size // MICRO_BATCHES,
        schedule="1f1b",
    )
    return list(partitions[-1].cuts)
