"""The rules by which checkpoints are written and kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dnb.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Goal:
    """A column of the history, and which way is better."""

    name: str
    is_larger_better: bool

    def is_better(self, value: float, than: float | None) -> bool:
        """Return whether a value is better than the best so far; NaN never is."""
        if math.isnan(value):
            return False
        return than is None or (value > than if self.is_larger_better else value < than)


def read_goal(text: str) -> Goal:
    """Parse "val_loss" (of losses, lower is better), "max:accuracy" or "min:error".

    Raises:
        ArgumentError: it does not say which way is better.
    """
    way, colon, name = text.partition(":")
    if colon and way in ("max", "min") and name:
        return Goal(name, is_larger_better=way == "max")
    if not colon and (text == "loss" or text.endswith("_loss")):
        return Goal(text, is_larger_better=False)
    raise ArgumentError(
        f"checkpoint_best={text!r} does not say which way is better: 'max:{name or text}' or 'min:{name or text}'; "
        "only of a loss lower is better by itself"
    )


class Retention:
    """Says when a checkpoint is due, and which ones go once a new one is durable.

    Args:
        every: steps between two.
        keep: how many of the last stay.
        goal: the one that is best by this stays too.
    """

    def __init__(self, *, every: int, keep: int, goal: Goal | None) -> None:
        self._every = every
        self._keep = keep
        self._goal = goal
        self._best: float | None = None  # of all evaluations so far
        self._kept: list[tuple[int, float]] = []  # step, value of the goal (NaN: not measured)

    def is_due(self, step: int) -> bool:
        """Return whether a committed step is followed by a checkpoint."""
        return step % self._every == 0

    def is_record(self, measured: dict[str, float]) -> bool:
        """Return whether an evaluation was the best so far, so that a checkpoint is due whatever its step."""
        if self._goal is None or self._goal.name not in measured:
            return False
        value = measured[self._goal.name]
        if not self._goal.is_better(value, self._best):
            return False
        self._best = value
        return True

    def add(self, step: int, measured: dict[str, float]) -> list[int]:
        """Count a durable checkpoint; the steps of those that may go now."""
        value = measured.get(self._goal.name, math.nan) if self._goal is not None else math.nan
        self._kept = [entry for entry in self._kept if entry[0] != step] + [(step, value)]
        stays = {step for step, _ in self._kept[-self._keep :]}
        best = self._best_step()
        if best is not None:
            stays.add(best)
        gone = [step for step, _ in self._kept if step not in stays]
        self._kept = [entry for entry in self._kept if entry[0] in stays]
        return gone

    def release(self, step: int) -> None:
        """Leave a checkpoint to the user: it is not removed any more."""
        self._kept = [entry for entry in self._kept if entry[0] != step]

    def _best_step(self) -> int | None:
        best: tuple[int, float] | None = None
        for step, value in self._kept:
            if self._goal is not None and self._goal.is_better(value, None if best is None else best[1]):
                best = (step, value)
        return None if best is None else best[0]
