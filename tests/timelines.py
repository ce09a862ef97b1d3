"""Timelines as engines would report them, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dnb.protocol.measurements import Action, EngineTimeline, StageTraffic, StepTimeline


def engine_timeline(
    engine: int, actions: Sequence[Action], *, team: int = 0, rank: int = 0, **others: Any
) -> EngineTimeline:
    seconds = sum(action.end - action.begin for action in actions)
    others = {"traffic": (), **others}
    return EngineTimeline(engine=engine, team=team, rank=rank, cpu_seconds=seconds, actions=tuple(actions), **others)


def step_timeline(engines: Sequence[EngineTimeline], **others: Any) -> StepTimeline:
    return StepTimeline(
        **{
            "step": 12,
            "schedule": "gpipe",
            "num_stages": 1 + max(engine.rank for engine in engines),
            "num_micro_batches": 1,
            "engines": tuple(engines),
            "median_bubble": 0.25,
            "median_seconds": 0.010,
            "num_sampled": 5,
            **others,
        }
    )


def gpipe_of_two(*, num_micro_batches: int, seconds: float = 1.0, **others: Any) -> StepTimeline:
    """Two equal stages, forward as long as backward, that exchange nothing's cost: bubble 1 / (m + 1)."""
    number = num_micro_batches
    first = [("forward", 0, i, i) for i in range(number)] + [("backward", 0, i, number + 2 + i) for i in range(number)]
    last = [("forward", 1, i, 1 + i) for i in range(number)] + [
        ("backward", 1, i, number + 1 + i) for i in range(number)
    ]
    engines = [
        engine_timeline(
            rank,
            _with_waits([Action(kind, stage, i, seconds * at, seconds * (at + 1)) for kind, stage, i, at in plan]),  # type: ignore[arg-type]
            rank=rank,
            traffic=(
                StageTraffic(
                    stage=rank,
                    forward_bytes=131_072 * number if rank == 0 else 0,
                    backward_bytes=131_072 * number if rank == 1 else 0,
                ),
            ),
        )
        for rank, plan in enumerate((first, last))
    ]
    return step_timeline(engines, num_micro_batches=number, **others)


def _with_waits(actions: list[Action]) -> list[Action]:
    before = [Action("wait", -1, -1, 0.0, actions[0].begin)] if actions[0].begin > 0 else []
    between = [
        Action("wait", left.stage, left.micro_batch, left.end, right.begin)
        for left, right in pairwise(actions)
        if right.begin > left.end
    ]
    return sorted([*before, *actions, *between], key=lambda action: action.begin)
