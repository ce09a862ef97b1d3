"""The speeds of engines in one kind of task, from the times between lease and answer, and the shares by them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

# The last answers that count, without the slowest of them: one hiccup is nobody's speed.
NUM_TIMES = 6
NUM_TIMES_AT_LEAST = 3
NUM_TIMES_TO_JUDGE = 5
# Shares become unequal when nearly every time of the slowest engine was so much longer than most of the fastest's, at
# so many tasks running: else a busy host would make healthy engines look slow by turns. It still takes less than 10.
UNEQUAL_RATIO = 1.5
NUM_VOTES = 3
# And equal again when speeds differ less than this.
EQUAL_RATIO = 1.25
# And never for less than the operating system takes away in one slice: by so much must the slowest part be longer.
UNEQUAL_SECONDS = 0.005
# An engine with few shards may be held for slower than it is, as every part costs something besides its shards: it is
# tried with twice its share after so many tasks, then more and more rarely, unless it is not too slow for that.
TRIAL_TASKS, TRIAL_TASKS_AT_MOST = 16, 64
# Whoever has joined takes so many times as long for its first part: it touches all its memory for the first time.
FIRST_RATIO = 2.0
# A batch with fewer samples than this part of the usual says little: the last one of an epoch.
FULL_ENOUGH = 0.4


@dataclass(slots=True)
class _EngineSpeed:
    """One engine's times."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TIMES))  # seconds per shard
    last: float = 0.0  # seconds of its part in the task under way
    rest: int = TRIAL_TASKS
    until_trial: int = TRIAL_TASKS

    @property
    def seconds(self) -> float:
        """Per shard, smoothed."""
        if len(self.times) < NUM_TIMES_AT_LEAST:
            return sum(self.times) / len(self.times)
        return (sum(self.times) - max(self.times)) / (len(self.times) - 1)

    @property
    def low(self) -> float:
        """Per shard; all times but one were at least that."""
        return sorted(self.times)[1]

    @property
    def median(self) -> float:
        """Per shard."""
        return sorted(self.times)[len(self.times) // 2]


class Speeds:
    """The seconds that each engine takes per shard.

    Args:
        num_shards: of every task.
    """

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._paces: dict[int, _EngineSpeed] = {}
        self._fullest = 0.0  # samples per shard
        self._longest = 0.0  # part of the last task, in seconds
        self._is_unequal = False
        self._num_votes = 0  # running
        self._on_trial: int | None = None

    def add(self, engine: int, *, seconds: float, num_shards: int, num_samples: int | None) -> None:
        """Count an answer of an engine."""
        if num_samples is not None:
            per_shard = num_samples / num_shards
            if per_shard > self._fullest:
                self._fullest = per_shard
            elif per_shard < FULL_ENOUGH * self._fullest:
                return
        pace = self._paces.get(engine)
        if pace is None:
            pace = self._paces[engine] = _EngineSpeed()
        pace.last = seconds
        pace.times.append(seconds / num_shards)
        if seconds > self._longest:
            self._longest = seconds

    def forget(self, engine: int) -> None:
        """Forget an engine: another machine may come back under its number."""
        self._paces.pop(engine, None)

    def expect(self, engine: int, num_shards: int) -> float | None:
        """Return the seconds that a part should take this engine; None if nobody has been measured."""
        pace = self._paces.get(engine)
        if pace is not None:
            return pace.seconds * num_shards
        paces = self._paces.values()
        return sum(pace.seconds for pace in paces) / len(paces) * num_shards if paces else None

    def costs(self, engines: Sequence[int]) -> dict[int, float] | None:
        """Seconds per shard by engine, to be dealt by; None deals equally."""
        if not self._is_unequal:
            return None
        known = [self._paces[engine].seconds for engine in engines if engine in self._paces]
        typical = sorted(known)[len(known) // 2] if known else 1.0
        return {engine: self._paces[engine].seconds if engine in self._paces else typical for engine in engines}

    def costs_with_new(self, engines: Sequence[int]) -> dict[int, float] | None:
        """Return `costs`, with less for those who have joined and not answered yet, so that nobody waits for them."""
        paces = self._paces
        if not paces or all(engine in paces for engine in engines):
            return self.costs(engines)
        costs = self.costs(engines)
        if costs is None:
            known = [paces[engine].seconds for engine in engines if engine in paces]
            if not known:
                return None
            costs = dict.fromkeys(engines, sum(known) / len(known))
        return {engine: cost if engine in paces else FIRST_RATIO * cost for engine, cost in costs.items()}

    def plan(self, engines: Sequence[int]) -> dict[int, float] | None:
        """Return `costs` for a task that is about to begin; at times one engine is tried with more than its share."""
        longest, self._longest = self._longest, 0.0
        if not self._is_unequal and longest < UNEQUAL_SECONDS:  # as with small models: no share would be worth it
            self._num_votes = 0
            return None
        self._judge_trial()
        self._compare(engines)
        costs = self.costs_with_new(engines)
        if self._is_unequal and costs is not None:
            self._try_one(costs)
        return costs

    def _compare(self, engines: Sequence[int]) -> None:
        paces = [self._paces[engine] for engine in engines if engine in self._paces]
        if not self._is_unequal:
            paces = [pace for pace in paces if len(pace.times) >= NUM_TIMES_TO_JUDGE]
        if len(paces) < 2:
            self._is_unequal, self._num_votes = False, 0
            return
        slowest = max(paces, key=lambda pace: pace.seconds)
        fastest = min(paces, key=lambda pace: pace.seconds)
        share = self._num_shards / len(engines)
        if self._is_unequal:
            ratio_holds = slowest.seconds > EQUAL_RATIO * fastest.seconds
            self._is_unequal = ratio_holds and (slowest.seconds - fastest.seconds) * share > UNEQUAL_SECONDS / 2
            return
        low, median = slowest.low, fastest.median
        differs = low > UNEQUAL_RATIO * median and (low - median) * share > UNEQUAL_SECONDS
        self._num_votes = self._num_votes + 1 if differs else 0
        self._is_unequal = self._num_votes >= NUM_VOTES

    def _try_one(self, costs: dict[int, float]) -> None:
        """Let one slow engine, if its time has come, have twice its share, or one shard at least."""
        fastest = min(costs.values())
        for engine, cost in costs.items():
            pace = self._paces.get(engine)
            if pace is None or cost <= EQUAL_RATIO * fastest:
                continue
            pace.until_trial -= 1
            if pace.until_trial < 0 and self._on_trial is None:
                self._on_trial = engine
                rate = sum(1 / other for number, other in costs.items() if number != engine)
                costs[engine] = max(fastest, min(cost / 2, 0.9 * self._num_shards / rate))

    def _judge_trial(self) -> None:
        engine, self._on_trial = self._on_trial, None
        pace = None if engine is None else self._paces.get(engine)
        if pace is not None:
            others = max((other.last for number, other in self._paces.items() if number != engine), default=0.0)
            if 0.0 < pace.last <= others * 1.1:
                newest = pace.times[-1]
                pace.times.clear()
                pace.times.append(newest)
                pace.rest, pace.until_trial = TRIAL_TASKS, 0
            else:
                pace.rest = pace.until_trial = min(2 * pace.rest, TRIAL_TASKS_AT_MOST)
        for other in self._paces.values():
            other.last = 0.0
