"""`transport="socket"`, where gradients travel as they would between hosts, against gloo, which uses sockets too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.models import CASES, Case
from benchmarks.ours import NotAvailableError, Side, open_side
from benchmarks.pairs import alternate, compare
from benchmarks.rivals.gang import Gang
from benchmarks.rows.step import DDP, choose_steps, ddp_seconds, train_ours
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

NUMBERS_OF_ENGINES = (2, 4)
# The exchange alone first; with shared memory too, as a yardstick.
NAMES = ("exchange-40mb", "mlp-17m")
REACH = 1.0
OVER_SOCKETS = {"transport": "socket"}


def rows(settings: Settings) -> Iterator[Row]:
    """Per number of engines: the exchange of 40 MB and a whole step over sockets."""
    for num_engines in NUMBERS_OF_ENGINES:
        with open_side(num_engines) as side, Gang(DDP, num_ranks=num_engines) as gang:
            for name in NAMES:
                yield from _rows(settings, CASES[name], side, gang)


def _rows(settings: Settings, case: Case, side: Side, gang: Gang) -> Iterator[Row]:
    steps = choose_steps(settings, gang, case, variant="bucket_view")
    ours: dict[str, dict[str, Any]] = {"socket": OVER_SOCKETS}
    if case.name == "exchange-40mb":
        ours["shared memory"] = {}
    try:
        train_ours(side, case, steps=steps, **OVER_SOCKETS)
    except NotAvailableError as lack:
        del ours["socket"]
        yield Row(name=f"{case.name} N={side.num_engines} socket", unit="ms", is_available=False, note=str(lack))
    if not ours:
        return
    sides: dict[str, Callable[[], float]] = {
        name: partial(train_ours, side, case, steps=steps, **options) for name, options in ours.items()
    }
    sides["DDP"] = partial(ddp_seconds, gang, case, steps=steps, variant="bucket_view")
    figures = alternate(sides, rounds=settings.pairs)
    for name in ours:
        yield compared_row(
            f"{case.name} N={side.num_engines} {name}",
            compare(figures[name], figures["DDP"]),
            unit="ms",
            scale=1e3,
            reach=REACH if name == "socket" else None,
            details={"steps_per_turn": steps},
        )
