"""The verb `%dtrain plan`: what a pool would make of a model, drawn before anything runs."""

from __future__ import annotations

import inspect
from typing import Any

from dnb import advice
from dnb.notebook.arguments import bind
from dnb.planning.plans import Plan


class PlanVerb:
    """Mixed into the magics."""

    def _names(self) -> dict[str, Any]:
        raise NotImplementedError

    def _do_plan(self, line: str) -> Plan:
        """The flags are those of `dnb.plan`; `--dry-run 64` plans for so many engines, whatever pool there is."""
        options = bind(_plan_with_dry_run, line, names=self._names(), verb="plan", left_out=frozenset({"pool"}))
        dry_run = options.pop("dry_run", None)
        if dry_run is not None:
            options["num_engines"] = dry_run
        return advice.plan(options.pop("model"), options.pop("batch"), **options)


def _plan_with_dry_run() -> None:
    """Stands for `dnb.plan` with one flag more; its signature is what counts."""


_signature = inspect.signature(advice.plan)
_plan_with_dry_run.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        *_signature.parameters.values(),
        inspect.Parameter("dry_run", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None"),
    ]
)
