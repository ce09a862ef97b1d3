"""What a run's numbers say about it, in plain sentences: the first is shown above the chart, all are in its summary.

Pure functions. A sentence says only what the numbers support; its thresholds are the constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from dnb.notebook.views import SET_APART, SHARES, RunView, WorkerView, has_ended, shown_workers
from dnb.notebook.wording import counted, listed, number, numbered
from dnb.notebook.worker_words import GONE, heard_words, hung_engines
from dnb.planning.bubbles import FULL_SHARE, busy_seconds
from dnb.planning.plan_words import milliseconds

# From here on a share of the engines' time is worth a sentence of its own.
DATA_SHARE = 0.25
WAIT_SHARE = 0.25
IDLE_SHARE = 0.5
BUBBLE_SHARE = 0.2
COMPUTE_SHARE = 0.8
# An engine is the slowest if it waits less than the others by as much of the time.
SLOWEST_GAP = 0.15
# Nearer than this, a bubble is what the formula says.
BUBBLE_GAP = 0.1
# Stages are unequal if the busiest engine computes as many times as long as the mean.
UNEQUAL_STAGES = 1.25
# Shorter steps are mostly hand-over.
SHORT_STEP_SECONDS = 0.02
# A death is told first for as long.
RECENT_DEATH_SECONDS = 30.0
# A loss is judged by means over eight equal parts of the steps, each of at least as many steps.
NUM_PARTS = 8
STEPS_PER_PART = 25
# A validation loss has turned if as many evaluations since the best are worse by this factor.
NUM_WORSE = 3
WORSE = 1.02


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence. While its kind stays, only figures in it have changed."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """A run as the rules look at it.

    Args:
        run: the run.
        hung: engines that are not heard.
        active: engines that take part, and whose time is known.
        is_over: sentences are about the past.
    """

    run: RunView
    hung: frozenset[int]
    active: Sequence[WorkerView]
    is_over: bool

    def verb(self, now: str, then: str) -> str:
        """The one that fits."""
        return then if self.is_over else now

    def engines(self, one: str, many: str, then: str) -> str:
        """The active engines, or the only one, with their verb."""
        if len(self.active) == 1:
            return f"engine {self.active[0].engine} {self.verb(one, then)}"
        return f"engines {self.verb(many, then)}"

    def mean(self, share: str) -> float:
        """Over the active engines."""
        return fmean(getattr(worker, share) for worker in self.active)


Rule = Callable[[_Seen], Finding | None]


def diagnosis(run: RunView) -> Finding:
    """The one sentence that matters most."""
    return findings(run)[0]


def findings(run: RunView) -> list[Finding]:
    """Everything worth a sentence, most important first; at least one."""
    seen = _look(run)
    rules = _STANDING if run.status in ("starting", "paused") or not run.step else _GOING
    found = [finding for rule in rules if (finding := rule(seen)) is not None]
    # of how the time was spent one sentence is enough: the others would be its consequences
    time = next((finding for rule in _TIME if (finding := rule(seen)) is not None), None) if rules is _GOING else None
    found += [time] if time is not None else []
    return found or [Finding("unknown", "nothing is known yet of how the engines spend their time")]


def _look(run: RunView) -> _Seen:
    hung = hung_engines(run)
    # one that died in the end has spent its time, too: all of a run that has ended count
    apart = {"spare"} if has_ended(run) else SET_APART
    active = [
        worker
        for worker in shown_workers(run)
        if worker.state not in apart and worker.engine not in hung and any(getattr(worker, s) for s in SHARES)
    ]
    return _Seen(run, hung, active, has_ended(run))


# a run that does not go on


def _no_step(seen: _Seen) -> Finding | None:
    run = seen.run
    if seen.is_over:
        return Finding("no step", f"nothing was trained: the run {_ended(run)} before its first step")
    if run.status == "paused":
        return None
    loading = [worker for worker in run.workers if worker.state not in SET_APART and worker.engine not in seen.hung]
    if not loading:
        return Finding("nobody", "no engine takes part yet, so there is no step")
    verb = "is" if len(loading) == 1 else "are"
    return Finding("loading", f"no step yet: {counted(len(loading), 'engine')} {verb} getting ready for it")


def _paused(seen: _Seen) -> Finding | None:
    if seen.run.status != "paused":
        return None
    error = (seen.run.error or "").lower()
    if "run.resume" in error:  # the status already says what to do
        return Finding("paused", "nothing is computed until the run is resumed or stopped")
    return Finding("paused", "nothing is computed while the run is paused; Resume, or run.resume(), goes on")


# engines


def _nobody_left(seen: _Seen) -> Finding | None:
    workers = seen.run.workers
    if seen.is_over or not workers or any(worker.state not in GONE for worker in workers):
        return None
    return Finding("all gone", "no engine is left, so nothing is computed: %dtrain add 1 brings a new one")


def _silence(seen: _Seen) -> Finding | None:
    silent = [worker for worker in seen.run.workers if worker.engine in seen.hung]
    if not silent:
        return None
    ids = [worker.engine for worker in silent]
    kind = f"silent {ids}"
    if len(silent) > 1:
        return Finding(kind, f"{numbered(ids)} are silent: the others can go on without them")
    (worker,) = silent
    ago = heard_words(worker.heartbeat_age_seconds)
    told = f" (last heard {ago})" if ago not in ("", "now") else ""
    return Finding(kind, f"engine {worker.engine} is silent{told}{_held(seen, worker, '; it holds ')}")


def _recent_death(seen: _Seen) -> Finding | None:
    run = seen.run
    dead = {worker.engine for worker in run.workers if worker.state == "dead"}
    now = run.started + run.elapsed_seconds
    died = [
        event
        for event in run.events
        if event.kind == "died" and event.engine in dead and now - event.time < RECENT_DEATH_SECONDS
    ]
    if seen.is_over or not died:
        return None
    ids = sorted({event.engine for event in died if event.engine is not None})
    living = [worker for worker in run.workers if worker.state not in SET_APART]
    others = f": {counted(len(living), 'engine')} {'goes' if len(living) == 1 else 'go'} on" if living else ""
    return Finding(f"died {ids}", f"{numbered(ids)} died after step {died[-1].step:,}{others}")


# the loss


def _not_finite(seen: _Seen) -> Finding | None:
    steps, losses = seen.run.history.column("loss")
    if not len(losses) or np.isfinite(losses[-1]):
        return None
    bad = int(np.flatnonzero(np.isfinite(losses))[-1] + 1) if np.isfinite(losses).any() else 0
    since = f"since step {steps[bad]:,}" if bad else "from the first step on"
    verb = seen.verb("is", "was")
    _, rates = seen.run.history.column("lr")
    rate = f" (now {rates[-1]:.3g})" if len(rates) and not seen.is_over else ""
    return Finding(
        "not finite", f"the loss {verb} not a finite number {since}: try a smaller learning rate{rate}, or clip_norm"
    )


def _no_progress(seen: _Seen) -> Finding | None:
    """The lowest of the parts' means is in the first half: since then nothing was won."""
    steps, losses = seen.run.history.column("loss")
    size = len(losses) // NUM_PARTS
    if size < STEPS_PER_PART or not np.isfinite(losses[-1]):
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        means = losses[len(losses) - NUM_PARTS * size :].reshape(NUM_PARTS, size).mean(axis=1)
    means = np.where(np.isfinite(means), means, np.inf)
    best = int(means.argmin())
    if best >= NUM_PARTS // 2:
        return None
    last = int(steps[len(losses) - (NUM_PARTS - 1 - best) * size - 1])
    verb = seen.verb("has not improved", "did not improve")
    return Finding(
        "no progress",
        f"the loss {verb} since about step {last:,}: on average {number(float(means[best]))} then, "
        f"{number(float(means[-1]))} {seen.verb('now', 'at the end')}",
    )


def _overfitting(seen: _Seen) -> Finding | None:
    steps, values = seen.run.history.column("val_loss")
    if not np.isfinite(values).any():
        return None
    best = int(np.where(np.isfinite(values), values, np.inf).argmin())
    since = values[best + 1 :]
    # by a part of its size, as a loss may be negative
    limit = values[best] + (WORSE - 1) * abs(values[best])
    if len(since) < NUM_WORSE or not (since > limit).all():
        return None
    told = f"the validation loss was best at step {steps[best]:,} ({number(float(values[best]))})"
    verb = seen.verb("has been", "was")
    return Finding("validation turned", f"{told} and {verb} worse in all {len(since)} evaluations since")


# how the time is spent


def _bubble(seen: _Seen) -> Finding | None:
    timeline = seen.run.timeline
    if not timeline or timeline.median_bubble < BUBBLE_SHARE:
        return None
    share, formula = timeline.median_bubble, timeline.ideal_bubble
    told = (
        f"the pipeline's engines {seen.verb('stand', 'stood')} still for {_percent(share)} of a step "
        f"(formula: {_percent(formula)})"
    )
    if share - formula < BUBBLE_GAP:
        return Finding("bubble", f"{told}: more micro-batches would make that less")
    if timeline.core_share < FULL_SHARE:
        return Finding("bubble, cores", f"{told}: they {seen.verb('share', 'shared')} cores with others")
    busy = {engine.engine: busy_seconds(engine.actions) for engine in timeline}
    slowest = max(busy, key=lambda engine: busy[engine])
    ratio = busy[slowest] / fmean(busy.values())
    if ratio > UNEQUAL_STAGES:
        verb = seen.verb("computes", "computed")
        return Finding(
            f"bubble {slowest}", f"{told}: engine {slowest} {verb} {_percent(ratio - 1)} longer than the mean"
        )
    return Finding("bubble", told)


def _nothing_to_do(seen: _Seen) -> Finding | None:
    empty = [worker.engine for worker in seen.active if worker.shards is not None and not worker.shards]
    if seen.is_over or not empty or len(empty) == len(seen.active) or not seen.run.num_shards:
        return None
    verb = "holds" if len(empty) == 1 else "hold"
    return Finding(
        f"no shards {empty}", f"{numbered(empty)} {verb} none of the {counted(seen.run.num_shards, 'shard')} of a batch"
    )


def _slowest(seen: _Seen) -> Finding | None:
    """One engine waits much less than all others: it is the one they wait for."""
    if len(seen.active) < 2:
        return None
    least, *others = sorted(seen.active, key=lambda worker: worker.wait)
    waiting = [worker for worker in others if worker.wait >= WAIT_SHARE]
    # if two of them wait equally little, neither is the one
    if len(waiting) < len(others) or others[0].wait - least.wait < SLOWEST_GAP:
        return None
    longest = waiting[-1]
    why = f"engine {least.engine} {seen.verb('is', 'was')} the slowest"
    if least.data >= max(least.compute, DATA_SHARE):
        why += f", as it {seen.verb('loads', 'loaded')} data {_percent(least.data)} of the time"
    who = f"engine {longest.engine} {seen.verb('waits', 'waited')} {_percent(longest.wait)} of the time"
    if len(waiting) > 1:
        # the median: one of many that waits most would say little of the others
        typical = median(worker.wait for worker in waiting)
        who = f"{len(waiting)} engines {seen.verb('wait', 'waited')} {_percent(typical)} of the time"
    held = "" if seen.is_over else _held(seen, least, "; it holds ")
    return Finding(f"slowest {least.engine}", f"{who}: {why}{held}")


def _data(seen: _Seen) -> Finding | None:
    if not seen.active or seen.mean("data") < DATA_SHARE:
        return None
    told = f"{seen.engines('loads', 'load', 'loaded')} data {_percent(seen.mean('data'))} of the time"
    return Finding("data", f"{told}: try a dataset that does less for each sample, or holds ready tensors")


def _exchange(seen: _Seen) -> Finding | None:
    """Even the busiest engine waits."""
    if not seen.active or min(worker.wait for worker in seen.active) < WAIT_SHARE:
        return None
    least = min(worker.wait for worker in seen.active)
    many = len(seen.active) > 1
    who = "every engine" if many else f"engine {seen.active[0].engine}"
    told = f"{who} {seen.verb('waits', 'waited')} {'at least ' * many}{_percent(least)} of the time"
    seconds = _step_seconds(seen.run)
    if seconds is not None and seconds < SHORT_STEP_SECONDS:
        reason = f"steps {seen.verb('are', 'were')} short ({milliseconds(seconds)})"
    else:
        reason = "for the hub, or for each other in turn" if many else "for the hub"
    return Finding("exchange", f"{told}, {'as ' * reason.startswith('steps')}{reason}: try a larger batch_size")


def _idle(seen: _Seen) -> Finding | None:
    if not seen.active or seen.mean("idle") < IDLE_SHARE:
        return None
    many = len(seen.active) > 1
    told = f"{seen.engines('is', 'are', 'were' if many else 'was')} idle {_percent(seen.mean('idle'))} of the time"
    return Finding("idle", f"{told}: the run {seen.verb('has', 'had')} no work for {'them' if many else 'it'} then")


def _computing(seen: _Seen) -> Finding | None:
    if not seen.active or seen.mean("compute") < COMPUTE_SHARE:
        return None
    told = f"{seen.engines('computes', 'compute', 'computed')} {_percent(seen.mean('compute'))} of the time"
    return Finding("computing", told)


def _mixed(seen: _Seen) -> Finding | None:
    """No share stands out: all that are worth a word."""
    if not seen.active:
        return None
    verbs = {
        "compute": ("computes", "compute", "computed"),
        "wait": ("waits", "wait", "waited"),
        "data": ("loads data", "load data", "loaded data"),
        "idle": ("is idle", "are idle", "idled"),
    }
    one = len(seen.active) == 1
    means = sorted(((seen.mean(share), share) for share in SHARES), reverse=True)
    told = [
        f"{seen.verb(verbs[share][0 if one else 1], verbs[share][2])} {_percent(mean)}"
        for mean, share in means
        if mean >= 0.05
    ]
    first, *rest = told
    who = f"engine {seen.active[0].engine}" if one else "engines"
    return Finding("mixed", f"{who} {listed([f'{first} of the time', *rest])}")


_STANDING: tuple[Rule, ...] = (_nobody_left, _no_step, _paused, _silence)
_GOING: tuple[Rule, ...] = (_nobody_left, _not_finite, _silence, _recent_death, _no_progress, _overfitting)
_TIME: tuple[Rule, ...] = (_bubble, _nothing_to_do, _slowest, _data, _exchange, _idle, _computing, _mixed)


def _held(seen: _Seen, worker: WorkerView, before: str) -> str:
    if worker.shards is None or not seen.run.num_shards:
        return ""
    return f"{before}{len(worker.shards)} of {counted(seen.run.num_shards, 'shard')}"


def _step_seconds(run: RunView) -> float | None:
    """The median of the last steps, by the times at which they were committed; None if that is not known."""
    _, seconds = run.history.column("seconds")
    return float(np.median(np.diff(seconds[-200:]))) if len(seconds) > 2 else None


def _ended(run: RunView) -> str:
    return {"failed": "failed", "stopped": "was stopped"}.get(run.status, "ended")


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
