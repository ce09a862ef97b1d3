"""The words that a flag of `%dtrain` takes, such as the names of losses: as those know them who read the flag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from dnb.api import planner, pools
from dnb.api.arguments.checks import PRECISIONS, STRATEGIES
from dnb.api.arguments.losses import LOSS_OVERS
from dnb.notebook.charts.x_axis import KINDS
from dnb.notebook.control_panel.choices import loss_words, optimizer_words
from dnb.notebook.live.frontend import Display
from dnb.protocol.run import ScheduleName, TransportKind

_WORDS: Mapping[str, Callable[[], Sequence[str]]] = {
    "loss": loss_words,
    "optimizer": optimizer_words,
    "metrics": lambda: ("accuracy",),
    "strategy": lambda: STRATEGIES,
    "schedule": lambda: get_args(ScheduleName),
    "precision": lambda: PRECISIONS,
    "loss_over": lambda: LOSS_OVERS,
    "scheduler_every": lambda: ("step", "epoch"),
    "checkpoint_best": lambda: ("loss", "val_loss", "max:val_accuracy"),
    "transport": lambda: get_args(TransportKind),
    "sync": lambda: ("hub",),
    "restart": lambda: pools.RESTARTS,
    "launcher": lambda: ("local",),
    "display": lambda: get_args(Display),
    "x": lambda: KINDS,
}
# Where a verb takes other words than `fit` does.
_OF_VERBS: Mapping[tuple[str, str], Callable[[], Sequence[str]]] = {
    ("plan", "strategy"): lambda: planner.STRATEGIES_PLANNED,
    ("plan", "schedule"): lambda: planner.SCHEDULES,
}


def words_of(verb: str, flag: str) -> tuple[str, ...]:
    """Return the known words of a verb's flag, the usual ones first; empty if it takes something else."""
    found = _OF_VERBS.get((verb, flag)) or _WORDS.get(flag)
    return () if found is None else tuple(found())
