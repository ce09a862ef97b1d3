"""The log of an engine's actions in one step of a pipeline, with their times."""

from __future__ import annotations

import time
from typing import Literal

from dnb.protocol.measurements import Action, ActionKind, StageTrace, StageTraffic


class ActionLog:
    """Notes each change from one activity to the next, about a microsecond each, and what is sent."""

    def __init__(self) -> None:
        self.is_counting = False  # bytes, in steps that somebody wants to see
        self._marks: list[tuple[ActionKind, int, int, float]] = []
        self._sent: dict[tuple[int, Literal["forward", "backward"]], int] = {}
        self._end = 0.0
        self._cpu_seconds = 0.0
        self._num_micro_batches = 0

    def begin(self, num_micro_batches: int) -> None:
        """Begin a step: earlier actions are forgotten."""
        self._num_micro_batches = num_micro_batches
        self._sent.clear()
        self._cpu_seconds = -time.process_time()
        self._marks = [("wait", -1, -1, time.monotonic())]

    def enter(self, kind: ActionKind, stage: int, micro_batch: int) -> None:
        """Note that the engine does this from now on."""
        if kind != "wait" or self._marks[-1][0] != "wait":
            self._marks.append((kind, stage, micro_batch, time.monotonic()))

    def send(self, stage: int, direction: Literal["forward", "backward"], num_bytes: int) -> None:
        """Count bytes of this stage that leave the engine."""
        self._sent[stage, direction] = self._sent.get((stage, direction), 0) + num_bytes

    def end(self) -> None:
        """End the step."""
        self._end = time.monotonic()
        self._cpu_seconds += time.process_time()

    def actions(self) -> tuple[Action, ...]:
        """Return the actions of the last step, in order, without gaps."""
        ends = [*(mark[3] for mark in self._marks[1:]), self._end]
        return tuple(Action(*mark, end) for mark, end in zip(self._marks, ends, strict=True) if end > mark[3])

    def trace(self) -> StageTrace:
        """Return all that was noted of the last step."""
        sent = self._sent
        return StageTrace(
            begin=self._marks[0][3],
            end=self._end,
            cpu_seconds=self._cpu_seconds,
            num_micro_batches=self._num_micro_batches,
            actions=self.actions(),
            traffic=tuple(
                StageTraffic(
                    stage=stage,
                    forward_bytes=sent.get((stage, "forward"), 0),
                    backward_bytes=sent.get((stage, "backward"), 0),
                )
                for stage in sorted({stage for stage, _ in sent})
            ),
        )
