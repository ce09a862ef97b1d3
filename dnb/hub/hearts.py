"""Which engines beat and which are silent; the time is passed in."""

from __future__ import annotations

# Five beats. A stopped local process is seen on the next tick; this is for what hangs elsewhere or otherwise.
SILENT_SECONDS = 0.5


class Hearts:
    """When each engine was last heard.

    Args:
        limit_seconds: an engine that was not heard for longer is silent.
    """

    def __init__(self, *, limit_seconds: float = SILENT_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._heard: dict[int, float] = {}
        self._silent: set[int] = set()
        self._ticked: float | None = None

    @property
    def silent(self) -> frozenset[int]:
        """Engines that are not heard now."""
        return frozenset(self._silent)

    def ages(self, now: float) -> dict[int, float]:
        """Seconds since each was last heard."""
        return {engine: max(now - heard, 0.0) for engine, heard in self._heard.items()}

    def begin(self, engine: int, now: float) -> None:
        """An engine has joined: its silence counts from now."""
        self._heard[engine] = now
        self._silent.discard(engine)

    def drop(self, engine: int) -> None:
        """An engine is gone."""
        self._heard.pop(engine, None)
        self._silent.discard(engine)

    def beat(self, engine: int, now: float) -> bool:
        """An engine is heard; whether it was silent before."""
        if engine not in self._heard:
            return False
        self._heard[engine] = now
        was_silent = engine in self._silent
        self._silent.discard(engine)
        return was_silent

    def declare_silent(self, engine: int) -> bool:
        """It is known otherwise that an engine hangs; whether that is news."""
        if engine not in self._heard or engine in self._silent:
            return False
        self._silent.add(engine)
        return True

    def tick(self, now: float) -> list[int]:
        """Those who have become silent.

        If this call comes late, it was the hub that slept, and beats may still lie unread: all counts start again.
        """
        late = self._ticked is not None and now - self._ticked > self._limit_seconds
        self._ticked = now
        if late:
            self._heard = dict.fromkeys(self._heard, now)
        limit = now - self._limit_seconds
        return [engine for engine, heard in self._heard.items() if heard < limit and self.declare_silent(engine)]
