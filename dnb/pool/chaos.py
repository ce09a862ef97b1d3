"""Harm done to a pool on purpose, for teaching and tests; every act is an event of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dnb.errors import ArgumentError
from dnb.protocol.base import Message
from dnb.protocol.client_messages import Done, KillHub
from dnb.protocol.client_messages import InjectFault as ChaosRequest


class Chaos:
    """Kills, stops and slows engines, and kills the hub.

    Only processes of this pool on the hub's host are signalled, by pid and start time; slowing works on every host.

    Args:
        ask: sends a request to the hub and waits for its answer.
    """

    def __init__(self, ask: Callable[[Message, type[Done]], Any]) -> None:
        self._ask = ask

    def kill(self, engine: int) -> None:
        """End an engine by SIGKILL, as the system does when memory runs out."""
        self._ask(ChaosRequest(verb="kill", engine=_id(engine)), Done)

    def stop(self, engine: int, seconds: float) -> None:
        """Let an engine stand still; the hub lets it go on, also when the kernel is gone by then."""
        self._ask(ChaosRequest(verb="stop", engine=_id(engine), amount=_positive(seconds, name="seconds")), Done)

    def slow(self, engine: int, factor: float) -> None:
        """Let an engine compute so many times as long, until the factor is 1 again."""
        amount = _positive(factor, name="factor")
        if amount < 1:
            raise ArgumentError(f"factor must be at least 1, not {factor!r}: pool.chaos.slow(2, 4), and 1 ends it")
        self._ask(ChaosRequest(verb="slow", engine=_id(engine), amount=amount), Done)

    def hub(self) -> None:
        """End the hub by SIGKILL: another one takes its place, and the run goes on after the last committed step."""
        self._ask(KillHub(), Done)


def _id(engine: object) -> int:
    if not isinstance(engine, int) or isinstance(engine, bool):
        raise ArgumentError(f"an engine is named by its id, not {engine!r}: pool.chaos.kill(1)")
    return engine


def _positive(value: object, *, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ArgumentError(f"{name} must be a positive number, not {value!r}: such as pool.chaos.stop(1, 5)")
    return float(value)
