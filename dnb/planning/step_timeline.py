"""The timeline of a step: the share of the engines' time that was idle, measured and by the formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import overload

from dnb.protocol.measurements import Action, EngineTimeline, StageTraffic, StepTimeline

# Kinds of actions in which an engine computes.
COMPUTING = frozenset({"forward", "backward", "backward-input", "backward-weight"})
# Below this share of its bars, an engine's process got too little of the cores: others had them.
FULL_SHARE = 0.9


def ideal_bubble(num_engines: int, num_micro_batches: int, *, stages_per_engine: int = 1) -> float:
    """Return the idle share of the engines' time with equal stages and without any cost of exchange.

    (p - 1) / (m + p - 1) for GPipe (Huang et al. 2019, section 2.3) and 1F1B; with v stages on each engine
    (p - 1) / (v m + p - 1), which is the (p - 1) / (v m) of computing time in Megatron-LM (Narayanan et al. 2021,
    section 2.2.2) as a share of all time. Zero-bubble schedules are held against the same: they are to undercut it.

    Args:
        num_engines: p, of one pipeline.
        num_micro_batches: m, of one pipeline.
        stages_per_engine: v.
    """
    return (num_engines - 1) / (stages_per_engine * num_micro_batches + num_engines - 1)


def busy_seconds(actions: Iterable[Action]) -> float:
    """Sum the durations of forwards and backwards."""
    return sum(action.end - action.begin for action in actions if action.kind in COMPUTING)


def span_of(engines: Sequence[EngineTimeline]) -> float:
    """Return the seconds from the first action of a pipeline to its last."""
    ends = [action.end for engine in engines for action in engine.actions]
    begins = [action.begin for engine in engines for action in engine.actions]
    return max(ends) - min(begins) if ends else 0.0


def measured_bubble(engines: Sequence[EngineTimeline]) -> float:
    """Return 1 - busy / (engines x span), of the pipelines' mean; 0 if nothing was done."""
    shares = []
    for team in sorted({engine.team for engine in engines}):
        members = [engine for engine in engines if engine.team == team]
        whole = len(members) * span_of(members)
        if whole > 0:
            shares.append(1.0 - sum(busy_seconds(member.actions) for member in members) / whole)
    return mean(shares) if shares else 0.0


class Timeline(Sequence[EngineTimeline]):
    """One step of a run whose model is divided, engine by engine; empty for other runs, and before the first such step.

    Twice a second all engines report one and the same step; this is the newest. All times are in seconds: those of
    actions from the step's begin, by the host's monotonic clock, and without the hub's part. "forward" and "backward"
    (zero-bubble: "backward-input", "backward-weight") are computing, with the copy that makes a gradient fit to be
    sent; "send" is the handing over to the network, and the wait until it has taken it; in "wait" nothing is computed:
    what is needed is not there yet, or on its way. If engines have to share cores, their bars hold time in which
    another one had the core: see `core_share`.
    """

    def __init__(self, record: StepTimeline | None) -> None:
        self.record = record
        self._engines = () if record is None else record.engines

    @overload
    def __getitem__(self, index: int) -> EngineTimeline: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EngineTimeline]: ...
    def __getitem__(self, index: int | slice) -> EngineTimeline | Sequence[EngineTimeline]:
        return self._engines[index]

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def step(self) -> int:
        """The number of the recorded step; 0 if there is none."""
        return 0 if self.record is None else self.record.step

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches of every pipeline in this step."""
        return 0 if self.record is None else self.record.num_micro_batches

    @property
    def seconds(self) -> float:
        """From the first action to the last one."""
        return span_of(self._engines)

    @property
    def bubble(self) -> float:
        """Share of the engines' time in which they did not compute, in this step."""
        return measured_bubble(self._engines)

    @property
    def median_bubble(self) -> float:
        """The same over the last steps that were looked at, up to 64; without the very first, if there are others."""
        return 0.0 if self.record is None else self.record.median_bubble

    @property
    def ideal_bubble(self) -> float:
        """The bubble by the formula: see `dnb.planning.step_timeline.ideal_bubble`."""
        if self.record is None:
            return 0.0
        size = self.num_stage_engines
        return ideal_bubble(size, self.num_micro_batches, stages_per_engine=self.record.num_stages // size)

    @property
    def num_stage_engines(self) -> int:
        """Engines of one pipeline."""
        return 1 + max((engine.rank for engine in self._engines), default=0)

    @property
    def core_share(self) -> float:
        """The share of the bars' time in which engines had a core; below 0.9 where other processes compete."""
        busy = sum(busy_seconds(engine.actions) for engine in self._engines)
        given = sum(engine.cpu_seconds for engine in self._engines)
        return min(1.0, given / busy) if busy > 0 else 1.0

    @property
    def traffic(self) -> tuple[StageTraffic, ...]:
        """Bytes that each stage of a pipeline gave to its neighbours in the step; of several pipelines, the first."""
        found = [each for engine in self._engines if engine.team == 0 for each in engine.traffic]
        return tuple(sorted(found, key=lambda each: each.stage))

    def __repr__(self) -> str:
        if self.record is None:
            return "<dnb.Timeline: empty>"
        return (
            f"<dnb.Timeline: step {self.step} on {len(self)} engines, {1e3 * self.seconds:.3g} ms, "
            f"bubble {self.bubble:.0%} (formula {self.ideal_bubble:.0%})>"
        )
