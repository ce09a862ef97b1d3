"""The whole training step, against DistributedDataParallel over gloo with the same fused optimizer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks.models import CASES, Case
from benchmarks.ours import Side, open_side
from benchmarks.pairs import alternate, compare
from benchmarks.rivals.gang import Gang
from benchmarks.rivals.messages import Train, Trained, Variant
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

# Most that the ratio may be, by case, for 2 and 4 engines.
REACH = {
    "mlp-17m": (0.75, 0.65),
    "mlp-4m": (0.75, 0.65),
    "gpt-3m": (0.92, 0.92),
    "cnn": (0.98, 0.98),
    "tiny": (0.75, 0.30),
}
NUMBERS_OF_ENGINES = (2, 4)
# DDP rebuilds its buckets after the first step, memory is new, and the tiny model's first steps are slow.
WARM_STEPS = 2
WARM_SHARE = 0.1
VARIANTS: tuple[Variant, ...] = ("bucket_view", "bucket_view_zeroed", "default")
DDP = "benchmarks.rivals.ddp"


def rows(settings: Settings) -> Iterator[Row]:
    """One row per number of engines and case."""
    variants: dict[str, Variant] = {}  # what is best with 2 ranks is taken for 4: the copies that it saves are the same
    for num_engines in NUMBERS_OF_ENGINES:
        with open_side(num_engines) as side, Gang(DDP, num_ranks=num_engines) as gang:
            for name, reaches in REACH.items():
                case = CASES[name]
                if name not in variants:
                    variants[name] = choose_variant(gang, case, rounds=1 if settings.is_quick else 3)
                reach = reaches[NUMBERS_OF_ENGINES.index(num_engines)]
                yield _row(settings, case, side, gang, variant=variants[name], reach=reach)


def _row(settings: Settings, case: Case, side: Side, gang: Gang, *, variant: Variant, reach: float) -> Row:
    steps = choose_steps(settings, gang, case, variant=variant)
    medians: dict[str, list[float]] = {"ours": [], "rival": []}

    def ours_turn() -> float:
        window = after_warm_up(side.train(case, steps=steps).step_seconds)
        medians["ours"].append(statistics.median(window))
        return statistics.fmean(window)

    def rival_turn() -> float:
        window = ddp_window(gang, case, steps=steps, variant=variant)
        medians["rival"].append(statistics.median(window))
        return statistics.fmean(window)

    figures = alternate({"ours": ours_turn, "rival": rival_turn}, rounds=settings.pairs)
    of_medians = compare(medians["ours"], medians["rival"])
    return compared_row(
        f"step {case.name} N={side.num_engines}",
        compare(figures["ours"], figures["rival"]),
        unit="ms",
        scale=1e3,
        reach=reach,
        details={
            "case": case.text,
            "steps_per_turn": steps,
            "rival_variant": variant,
            "ratio_of_median_steps": of_medians.ratio.median,
        },
    )


def choose_variant(gang: Gang, case: Case, *, rounds: int) -> Variant:
    """The setting of DDP that is fastest here."""
    sides = {
        variant: partial(ddp_seconds, gang, case, steps=WARM_STEPS + case.probe_steps, variant=variant)
        for variant in VARIANTS
    }
    figures = alternate(sides, rounds=rounds)
    return min(VARIANTS, key=lambda variant: statistics.median(figures[variant]))


def choose_steps(settings: Settings, gang: Gang, case: Case, *, variant: Variant) -> int:
    """The steps that fill a turn of DDP, those of its warm-up included."""
    steps = settings.steps_for(ddp_seconds(gang, case, steps=WARM_STEPS + case.probe_steps, variant=variant))
    return steps + warm_steps(steps)


def train_ours(side: Side, case: Case, *, steps: int, **options: Any) -> float:
    """Mean step time of one turn of ours, after its warm-up."""
    return statistics.fmean(after_warm_up(side.train(case, steps=steps, **options).step_seconds))


def ddp_seconds(gang: Gang, case: Case, *, steps: int, variant: Variant, gathers: bool = False) -> float:
    """Mean step time of one turn of DDP, after its warm-up."""
    return statistics.fmean(ddp_window(gang, case, steps=steps, variant=variant, gathers=gathers))


def ddp_window(gang: Gang, case: Case, *, steps: int, variant: Variant, gathers: bool = False) -> list[float]:
    """Rank 0's step times of one turn, after its warm-up."""
    first = gang.turn(Train(case=case.name, steps=steps, variant=variant, gathers=gathers))[0]
    assert isinstance(first, Trained)
    differences = [later - earlier for earlier, later in pairwise(first.ends)]
    return after_warm_up([0.0, *differences])


def warm_steps(num_steps: int) -> int:
    """First steps of a turn that do not count."""
    return max(WARM_STEPS, round(WARM_SHARE * num_steps))


def after_warm_up(step_seconds: Sequence[float]) -> list[float]:
    """The steps that count."""
    return list(step_seconds[warm_steps(len(step_seconds)) :])
