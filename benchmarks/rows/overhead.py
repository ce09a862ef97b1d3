"""What being ready for every fault costs while there is none: the journal of each step, and all that beats and looks.

None of it can be switched off in a pool, so it is measured in two parts. The hub's commit, with the journal and
without, in turns in this process, is held against the step of a whole run. An idle pool does nothing but beat and
look: its CPU time, as a share of the host's cores, is what a training pool lacks.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from benchmarks.models import CASES, LEARNING_RATE, NUM_SAMPLES, Case
from benchmarks.ours import Side, open_side
from benchmarks.pairs import alternate, compare, spread
from benchmarks.rows.step import train_ours
from benchmarks.settings import Settings
from benchmarks.table import Row
from dnb.hub.parameters.master import Contribution, Master
from dnb.job import Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.measurements import Sums

NAMES = ("tiny", "cnn", "gpt-3m", "mlp-4m", "mlp-17m")
NUM_ENGINES = 2
REACH = 1.02
TURN_SECONDS = 0.5
ROUNDS_FACTOR = 4  # short turns, so many times as often as others
PROBE_STEPS = {"tiny": 300, "cnn": 15, "gpt-3m": 8, "mlp-4m": 25, "mlp-17m": 12}
IDLE_ENGINES, IDLE_SECONDS = 4, 5.0


def rows(settings: Settings) -> Iterator[Row]:
    """A row per model, and one of the idle pool."""
    with open_side(NUM_ENGINES) as side:
        for name in NAMES:
            seconds = [train_ours(side, CASES[name], steps=PROBE_STEPS[name]) for _ in range(settings.pairs)]
            yield _journal_row(settings, CASES[name], step_seconds=statistics.median(seconds))
    with open_side(IDLE_ENGINES) as side:
        yield _idle_row(settings, side)


def _journal_row(settings: Settings, case: Case, *, step_seconds: float) -> Row:
    with_journal, without = Hub(case), Hub(case)
    with_journal.master.keep_journal(step=0, evaluated=0)
    if with_journal.master.journal_ref is None:
        raise RuntimeError(with_journal.master.notes[-1])
    num_commits = max(3, round(TURN_SECONDS / min(hub.warm_up() for hub in (with_journal, without))))
    try:
        turns = alternate(
            {
                "with": partial(with_journal.commit, num_commits),
                "without": partial(without.commit, num_commits),
            },
            rounds=ROUNDS_FACTOR * settings.pairs,
        )
    finally:
        with_journal.close()
        without.close()
    compared = compare(turns["with"], turns["without"])
    extra = statistics.median(mine - theirs for mine, theirs in compared.pairs)
    return Row(
        name=f"journal {case.name} N={NUM_ENGINES}: the hub's commit with it / without",
        unit="ms",
        ours=spread([1e3 * seconds for seconds in turns["with"]]),
        rival=spread([1e3 * seconds for seconds in turns["without"]]),
        figure=step_seconds / (step_seconds - extra),
        reach=REACH,
        note=f"{extra * 1e3:.3g} ms of a step of {step_seconds * 1e3:.3g} ms",
        details={"step_seconds": step_seconds, "extra_seconds": extra},
    )


class Hub:
    """A master copy and the slabs of its engines, filled once.

    Args:
        case: what is trained.
    """

    def __init__(self, case: Case) -> None:
        job = Job(
            model=case.make_model(),
            loss=case.loss,
            step=None,
            metrics={},
            optimizer=case.optimizer,
            lr=LEARNING_RATE,
            scheduler=None,
            order=BatchOrder(num_samples=NUM_SAMPLES, batch_size=case.batch_per_engine),
        )
        self.master = Master(job, folders=[Path("/dev/shm")], prefix=f"bench-{os.getpid()}-{id(self)}", clip_norm=None)

    def warm_up(self) -> float:
        """Put small gradients into the slabs, and commit them a few times; seconds per commit."""
        for engine in range(NUM_ENGINES):
            self.master.add_slabs(engine, 1, kind="memory")
            for tensor in self.master.slabs_of(engine)[0].gradients:
                tensor.fill_(1e-3)
        self.commit(3)
        return self.commit(3)

    def commit(self, number: int) -> float:
        """Seconds per commit; what the journal leaves for later is done in between, as the hub does."""
        began = time.perf_counter()
        for _ in range(number):
            self.master.commit([self._brought_by(engine) for engine in range(NUM_ENGINES)])
            self.master.settle()
        return (time.perf_counter() - began) / number

    def close(self) -> None:
        """Give all memory back."""
        self.master.drop_slabs()
        self.master.close()

    def _brought_by(self, engine: int) -> Contribution:
        sums = Sums(loss_total=8.0, loss_weight=16, metric_totals={}, metric_weights={}, num_samples=16)
        return Contribution(engine=engine, slab=0, shard=engine, sums=sums, is_sum=False, unused=())


def _idle_row(settings: Settings, side: Side) -> Row:
    facts = side.pool.facts
    processes = [psutil.Process(process.pid) for process in (facts.hub, facts.supervisor, facts.controller)]
    processes += [psutil.Process(engine.process.pid) for engine in facts.engines]
    shares = []
    for _ in range(settings.pairs):
        before, began = _cpu_seconds(processes), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        shares.append((_cpu_seconds(processes) - before) / (time.perf_counter() - began) / (os.cpu_count() or 1))
    return Row(
        name=f"an idle pool of {IDLE_ENGINES}: hearts, looks and ipyparallel, share of the host's CPU",
        unit="%",
        ours=spread([100 * share for share in shares]),
        figure=1 / (1 - statistics.median(shares)),
        reach=REACH,
        note=f"{os.cpu_count()} cores",
    )


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)
