"""What `exact=True` costs, with 1, 2 and 4 shards per engine, against the default mode and against DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.models import CASES, Case
from benchmarks.ours import NotAvailableError, Side, open_side
from benchmarks.pairs import alternate, compare
from benchmarks.rivals.gang import Gang
from benchmarks.rows.step import DDP, REACH, choose_steps, ddp_seconds, train_ours
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

# With 4, five turns of five sides for every case would take too long.
NUMBERS_OF_ENGINES = (2,)
SHARDS_PER_ENGINE = (1, 2, 4)


def rows(settings: Settings) -> Iterator[Row]:
    """Per case and number of shards, one row against each of the two."""
    for num_engines in NUMBERS_OF_ENGINES:
        with open_side(num_engines) as side, Gang(DDP, num_ranks=num_engines) as gang:
            try:
                train_ours(side, CASES["tiny"], steps=10, exact=True, shards=num_engines)
            except NotAvailableError as lack:
                yield Row(name=f"exact N={num_engines}", unit="ms", is_available=False, note=str(lack))
                continue
            for name in REACH:
                yield from _rows(settings, CASES[name], side, gang)


def _rows(settings: Settings, case: Case, side: Side, gang: Gang) -> Iterator[Row]:
    steps = choose_steps(settings, gang, case, variant="bucket_view")
    train = partial(train_ours, side, case, steps=steps)
    sides: dict[str, Callable[[], float]] = {
        "default": train,
        "DDP": partial(ddp_seconds, gang, case, steps=steps, variant="bucket_view"),
    }
    exact = {f"shards={many * side.num_engines}": many * side.num_engines for many in SHARDS_PER_ENGINE}
    sides |= {name: partial(train, exact=True, shards=shards) for name, shards in exact.items()}
    figures = alternate(sides, rounds=settings.pairs)
    for name in exact:
        for rival in ("default", "DDP"):
            compared = compare(figures[name], figures[rival])
            row_name = f"exact {case.name} N={side.num_engines} {name} / {rival}"
            yield compared_row(row_name, compared, unit="ms", scale=1e3, details={"steps_per_turn": steps})
