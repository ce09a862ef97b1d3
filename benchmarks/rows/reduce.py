"""The mean of a flat float32 gradient, from when all have theirs in place until all may read it; against gloo."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.ours_reduce import Turn, open_reduce
from benchmarks.pairs import alternate, collective_seconds, compare
from benchmarks.rivals.gang import Gang
from benchmarks.rivals.messages import AllReduce, Reduced
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

ROUNDS_BY_MEGABYTES = {0.25: 300, 4: 60, 40: 10, 200: 3}
# First rounds meet new pages.
WARM_ROUNDS = 2
REACH_FROM_4_MB, REACH_BELOW = 0.30, 0.50


def rows(settings: Settings) -> Iterator[Row]:
    """One row per number of engines and size."""
    for num_engines in (2, 4):
        with open_reduce(num_engines) as ours, Gang("benchmarks.rivals.gloo", num_ranks=num_engines) as gang:
            for megabytes, rounds in ROUNDS_BY_MEGABYTES.items():
                yield _row(settings, ours, gang, num_engines=num_engines, megabytes=megabytes, rounds=rounds)


def _row(settings: Settings, ours: Turn, gang: Gang, *, num_engines: int, megabytes: float, rounds: int) -> Row:
    num_elements = round(megabytes * 1e6) // 4
    num_rounds = WARM_ROUNDS + (max(2, rounds // 4) if settings.is_quick else rounds)

    def ours_turn() -> float:
        return statistics.fmean(ours(num_elements, num_rounds)[WARM_ROUNDS:])

    def rival_turn() -> float:
        replies = gang.turn(AllReduce(num_elements=num_elements, rounds=num_rounds))
        done = [reply for reply in replies if isinstance(reply, Reduced)]
        seconds = collective_seconds([reply.starts for reply in done], [reply.ends for reply in done])
        return statistics.fmean(seconds[WARM_ROUNDS:])

    figures = alternate({"ours": ours_turn, "rival": rival_turn}, rounds=settings.pairs)
    return compared_row(
        f"reduce {megabytes:g} MB N={num_engines}",
        compare(figures["ours"], figures["rival"]),
        unit="ms",
        scale=1e3,
        reach=REACH_FROM_4_MB if megabytes >= 4 else REACH_BELOW,
        details={"rounds_per_turn": num_rounds - WARM_ROUNDS},
    )
