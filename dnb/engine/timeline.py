"""What an engine of a pipeline did in one step, and when."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

ActionKind = Literal["forward", "backward", "backward-input", "backward-weight", "send", "wait"]


class Action(NamedTuple):
    """One bar of a Gantt view; times in seconds of the host's monotonic clock, so that its engines can be compared."""

    kind: ActionKind
    stage: int
    micro_batch: int  # -1: of several
    begin: float
    end: float


class Timeline:
    """Notes each change from one activity to the next, about a microsecond each."""

    def __init__(self) -> None:
        self._marks: list[tuple[ActionKind, int, int, float]] = []
        self._end = 0.0

    def begin(self) -> None:
        """A step begins: what was noted before is forgotten."""
        self._marks = [("wait", -1, -1, time.monotonic())]

    def enter(self, kind: ActionKind, stage: int, micro_batch: int) -> None:
        """From now on the engine does this."""
        if kind != "wait" or self._marks[-1][0] != "wait":
            self._marks.append((kind, stage, micro_batch, time.monotonic()))

    def end(self) -> None:
        """The step is done."""
        self._end = time.monotonic()

    def actions(self) -> tuple[Action, ...]:
        """Of the last step, in order, without gaps."""
        ends = [*(mark[3] for mark in self._marks[1:]), self._end]
        return tuple(Action(*mark, end) for mark, end in zip(self._marks, ends, strict=True) if end > mark[3])
