"""How much is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.table import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Chosen on the command line."""

    pairs: int
    is_quick: bool
    against: str = ""  # a commit, of the group `earlier`

    @property
    def turn_seconds(self) -> float:
        """How long one turn of training should take."""
        return 0.5 if self.is_quick else 1.5

    def steps_for(self, step_seconds: float, *, at_least: int = 12) -> int:
        """Steps that fill a turn."""
        return max(at_least, round(self.turn_seconds / step_seconds))


Group = Callable[[Settings], Iterator[Row]]
