"""The facts of a run that the rules of its diagnosis read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dnb.notebook.text.engine_text import hung_engines
from dnb.notebook.views import SET_APART, SHARES, RunView, WorkerView, has_ended, shown_workers
from dnb.planning.utilisation import Utilisation

# Of an engine that computes less, nothing is said by its use of a processor.
LEAST_COMPUTE = 0.15


@dataclass(frozen=True, slots=True)
class RuleFinding:
    """One sentence. While its kind stays, only figures in it have changed."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class EngineShares:
    """One engine's shares of time, and the shards that it holds; None if those are not known."""

    engine: int
    compute: float
    wait: float
    data: float
    idle: float
    shards: tuple[int, ...] | None = None
    core_share: float | None = None  # of the time that it computes on a CPU, the part in which it has a core

    @property
    def busy(self) -> float:
        """The share of the time in which others may have to wait for it."""
        return self.compute + self.data


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The facts of a run, as the rules read them.

    Args:
        run: the run.
        hung: engines that are not heard.
        active: engines that take part, and whose time is known.
        is_over: sentences are about the past.
    """

    run: RunView
    hung: frozenset[int]
    active: Sequence[EngineShares]
    is_over: bool

    def verb(self, now: str, then: str) -> str:
        """Return the form that fits: of now, or of a run that is over."""
        return then if self.is_over else now

    def engines(self, one: str, many: str, then: str) -> str:
        """Name the active engines, or the only one, with their verb."""
        if len(self.active) == 1:
            return f"engine {self.active[0].engine} {self.verb(one, then)}"
        return f"engines {self.verb(many, then)}"

    def mean(self, share: str) -> float:
        """Return a share's mean over the active engines."""
        return fmean(getattr(worker, share) for worker in self.active)


Rule = Callable[[RunFacts], RuleFinding | None]


def gather_facts(run: RunView) -> RunFacts:
    """Gather the facts that the rules need to know of a run."""
    is_over, hung = has_ended(run), hung_engines(run)
    # one that died in the end has spent its time, too: all of a run that has ended count
    apart = {"spare"} if is_over else SET_APART
    active = [
        EngineShares(
            worker.engine, worker.compute, worker.wait, worker.data, worker.idle, worker.shards, _core_share(worker)
        )
        for worker in shown_workers(run)
        if worker.state not in apart and worker.engine not in hung and any(getattr(worker, s) for s in SHARES)
    ]
    return RunFacts(run, hung, active or (_stored_shares(run.utilisation) if is_over else []), is_over)


def _core_share(worker: WorkerView) -> float | None:
    """Return the processor time that an engine had for each second of computing; None where that says nothing."""
    if worker.cpu_percent is None or worker.device != "cpu" or worker.compute < LEAST_COMPUTE:
        return None
    return worker.cpu_percent / 100 / worker.compute


def _stored_shares(utilisation: Utilisation) -> list[EngineShares]:
    """Read the shares of a run that is known from its folder alone, out of its stored utilisation."""
    spans = utilisation.spans(limit=1)
    shares = np.nan_to_num(spans.shares[0]) if len(spans) else np.zeros((0, len(SHARES)))
    return [
        EngineShares(engine, *row.tolist()) for engine, row in zip(spans.engines, shares, strict=False) if row.any()
    ]


def held(facts: RunFacts, shards: tuple[int, ...] | None) -> str:
    """Write the share of a batch that these are as the end of a sentence; empty if it is not known."""
    if shards is None or not facts.run.num_shards:
        return ""
    return f"; its share of the batch is {percent(len(shards) / facts.run.num_shards)}"


def percent(share: float) -> str:
    """Write a share as the sentences do."""
    return f"{share:.0%}".replace("%", " %")
