"""The engines that beat, those at work although they do not, and those that are silent; the time is passed in.

A call that holds the interpreter's lock stops every Python thread of an engine, its heartbeat, too: who is not heard is
looked at, and is silent only if it does not use the processor either. An engine of another host has a watcher there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dnb.transport.system.processes import Activity, has_worked

# Five beats. A stopped local process is seen on the next tick; this is for what hangs elsewhere or otherwise.
SILENT_SECONDS = 0.5
# What is said of an engine of another host may be on its way for longer.
FAR_SILENT_SECONDS = 2.0


@dataclass(slots=True)
class _SilentEngine:
    """An engine that is not heard, as it was seen before."""

    since: float
    activity: Activity  # then
    is_at_work: bool | None = None  # None: seen only once
    last_at_work: float = float("-inf")


class HeartbeatMonitor:
    """When each engine was last heard, or seen at work.

    Args:
        limit_seconds: an engine that was neither heard nor seen at work for longer is silent.
        far_limit_seconds: the same for those that cannot be looked at.
        poll: looks at an engine's process; None if it cannot. It is called only for engines whose beats are missing.
    """

    def __init__(
        self,
        *,
        limit_seconds: float = SILENT_SECONDS,
        far_limit_seconds: float = FAR_SILENT_SECONDS,
        poll: Callable[[int], Activity | None],
    ) -> None:
        self._limit_seconds = limit_seconds
        self._far_limit_seconds = far_limit_seconds
        self._poll = poll
        self._heard: dict[int, float] = {}
        self._watches: dict[int, _SilentEngine] = {}
        self._silent: set[int] = set()
        self._busy: set[int] = set()
        self._ticked: float | None = None

    @property
    def silent(self) -> frozenset[int]:
        """Engines that are neither heard nor at work now."""
        return frozenset(self._silent)

    @property
    def busy(self) -> frozenset[int]:
        """Engines that are not heard, but are at work."""
        return frozenset(self._busy)

    def ages(self, now: float) -> dict[int, float]:
        """Seconds since each was last heard, or seen at work."""
        return {engine: max(now - self._last_sign(engine, heard), 0.0) for engine, heard in self._heard.items()}

    def begin(self, engine: int, now: float) -> None:
        """Count the silence of an engine that has joined from now on."""
        self._forget(engine)
        self._heard[engine] = now

    def drop(self, engine: int) -> None:
        """Forget an engine that is gone."""
        self._forget(engine)
        self._heard.pop(engine, None)

    def beat(self, engine: int, now: float) -> bool:
        """Count a heartbeat of an engine; return True if it was missed before."""
        if engine not in self._heard:
            return False
        self._heard[engine] = now
        if engine not in self._watches and engine not in self._silent:
            return False
        was_missed = engine in self._silent or engine in self._busy
        self._forget(engine)
        return was_missed

    def see_at_work(self, engine: int, now: float) -> None:
        """Note an engine at work that cannot be observed from here, by its watcher's word."""
        if engine in self._heard and engine not in self._silent:
            watch = self._watches.setdefault(engine, _SilentEngine(now, Activity(0.0)))
            watch.last_at_work = now

    def declare_silent(self, engine: int) -> bool:
        """It is known otherwise that an engine hangs; whether that is news."""
        if engine not in self._heard or engine in self._silent:
            return False
        self._silent.add(engine)
        self._busy.discard(engine)
        return True

    def tick(self, now: float) -> list[int]:
        """Look at those who are not heard; who of them has become silent.

        If this call comes late, it was the hub that slept, and beats may still lie unread: all counts start again.
        """
        late = self._ticked is not None and now - self._ticked > self._limit_seconds
        self._ticked = now
        if late:
            self._heard = dict.fromkeys(self._heard, now)
            self._watches.clear()
        missing = now - self._limit_seconds / 2
        missed = [e for e, heard in self._heard.items() if heard < missing and e not in self._silent]
        return [engine for engine in missed if not self._is_alive(engine, now) and self.declare_silent(engine)]

    def _is_alive(self, engine: int, now: float) -> bool:
        """Look at one whose beats are missing; False if it has given no sign of life for too long."""
        activity, heard = self._poll(engine), self._heard[engine]
        is_seen_enough, limit = True, self._far_limit_seconds
        if activity is not None:
            is_seen_enough, limit = self._watch(engine, activity, now), self._limit_seconds
        last_sign = self._last_sign(engine, heard)
        if now - heard > self._limit_seconds and last_sign > heard:
            self._busy.add(engine)
        return not is_seen_enough or now - last_sign <= limit

    def _watch(self, engine: int, activity: Activity, now: float) -> bool:
        """Note what an engine does; whether it was seen twice by now."""
        watch = self._watches.setdefault(engine, _SilentEngine(now, activity))
        seconds = now - watch.since
        if seconds >= self._limit_seconds / 2:
            watch.is_at_work = has_worked(watch.activity, activity, seconds=seconds)
            watch.since, watch.activity = now, activity
        if activity.waits_for_disk or watch.is_at_work:
            watch.last_at_work = now
        return watch.is_at_work is not None

    def _last_sign(self, engine: int, heard: float) -> float:
        watch = self._watches.get(engine)
        return heard if watch is None else max(heard, watch.last_at_work)

    def _forget(self, engine: int) -> None:
        """Forget all that was noted of an engine while it was not heard."""
        self._watches.pop(engine, None)
        self._silent.discard(engine)
        self._busy.discard(engine)
