"""A null object in the place of a run, so that a hub need not ask whether it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnb.protocol.engine_messages import EngineMessage
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import RunStatus

if TYPE_CHECKING:
    from dnb.hub.scheduling.events import EngineLost
    from dnb.transport.sockets.wires import Wire


class NoRun:
    """The run of a pool that has none: it computes nothing, and whatever happens to engines is nothing to it."""

    is_active = False
    has_deferred = False
    has_advanced = False
    status: RunStatus | None = None
    working: frozenset[int] = frozenset()

    def attach(self, engine: int, wire: Wire) -> None:
        """Ignore the wire of an engine, which has nothing to load."""

    def take(self, engine: int, message: EngineMessage, raw: memoryview) -> None:
        """Ignore a message: it is about a run of before."""

    def add_engine(self, facts: EngineFacts) -> None:
        """Ignore an engine that has joined."""

    def make_spare(self, engine: int) -> None:
        """Ignore that an engine is a spare."""

    def activate_spare(self, engine: int) -> None:
        """Ignore that a spare is to work."""

    def retire_engine(self, engine: int) -> None:
        """Ignore that an engine is to leave."""

    def lose_engine(self, loss: EngineLost) -> None:
        """Ignore that an engine is gone."""

    def expect_loss(self, engine: int) -> None:
        """Ignore that an engine is about to be gone."""

    def silence_engine(self, engine: int, reason: str, *, is_asleep: bool = False) -> None:
        """Ignore that an engine is silent."""

    def miss_engine(self, engine: int) -> None:
        """Ignore that the heartbeats of an engine are missing."""

    def hear_engine(self, engine: int) -> None:
        """Ignore that an engine is heard again."""

    def tell(self, kind: str, text: str, engine: int | None = None) -> None:
        """Tell nobody: there is no history to write it into."""

    def run_deferred(self) -> None:
        """Do nothing: nothing was put off."""

    def tick(self) -> None:
        """Do nothing: nothing is due."""

    def close(self) -> None:
        """Let go of nothing."""
