"""The verb `%dtrain plan`: what a pool would make of a model, drawn before anything runs."""

from __future__ import annotations

from typing import Any

from dnb.api import planner
from dnb.notebook.commands.verbs import verb
from dnb.planning.search.plans import Plan


@verb(
    "plan",
    group="run",
    flags_of=planner.plan,
    more={"dry_run": "int | None"},
    left_out={"pool"},
    example="%dtrain plan model (X, y)",
)
def _plan(model: Any, batch: Any, *, dry_run: int | None = None, **options: Any) -> Plan:
    """Plan who would compute what, before anything runs; `--dry-run 64` plans for so many engines.

    With `--dry-run` it does not matter which pool there is.

    Args:
        dry_run: plan for so many engines, whichever pool there is.
    """
    if dry_run is not None:
        options["num_engines"] = dry_run
    return planner.plan(model, batch, **options)
