"""Rules that read the engines' time; the first rule that finds something is enough."""

from __future__ import annotations

from statistics import fmean, median

import numpy as np

from dnb.notebook.formatting import listed, numbered
from dnb.notebook.text.run_facts import Rule, RuleFinding, RunFacts, held, percent
from dnb.notebook.views import SHARES, RunView
from dnb.planning.step_timeline import FULL_SHARE, busy_seconds
from dnb.units import milliseconds

# From here on a share of the engines' time is worth a sentence of its own.
DATA_SHARE = 0.25
WAIT_SHARE = 0.25
IDLE_SHARE = 0.5
BUBBLE_SHARE = 0.2
COMPUTE_SHARE = 0.8
# Less than this is not worth a word.
LEAST_SHARE = 0.05
# An engine is the slowest if it waits less than the others by as much of the time.
SLOWEST_GAP = 0.15
# Nearer than this, a bubble is what the formula says.
BUBBLE_GAP = 0.1
# Stages are unequal if the busiest engine computes as many times as long as the mean.
UNEQUAL_STAGES = 1.25
# Shorter steps are mostly hand-over.
SHORT_STEP_SECONDS = 0.02
# An engine with a core for less of its computing waits for other processes.
FEW_CORES = 0.6
# Steps over which their length is taken.
RECENT_STEPS = 200


def overloaded(facts: RunFacts) -> RuleFinding | None:
    """Find engines that all compute and have no core for it: other processes use them."""
    shares = [worker.core_share for worker in facts.active if worker.core_share is not None]
    if facts.is_over or not shares or len(shares) < len(facts.active) or max(shares) > FEW_CORES:
        return None
    many = len(shares) > 1
    who = "engines have" if many else f"engine {facts.active[0].engine} has"
    when = f"{percent(fmean(shares))} of the time that {'they compute' if many else 'it computes'}"
    return RuleFinding("overloaded", f"this machine is overloaded: {who} a core for only {when}; others use it")


def _bubble(facts: RunFacts) -> RuleFinding | None:
    timeline = facts.run.timeline
    if not timeline or timeline.median_bubble < BUBBLE_SHARE:
        return None
    share, formula = timeline.median_bubble, timeline.ideal_bubble
    text = (
        f"the pipeline's engines {facts.verb('stand', 'stood')} still for {percent(share)} of a step "
        f"(formula: {percent(formula)})"
    )
    if share - formula < BUBBLE_GAP:
        return RuleFinding("bubble", f"{text}: more micro-batches would make that less")
    if timeline.core_share < FULL_SHARE:
        return RuleFinding("bubble, cores", f"{text}: they {facts.verb('share', 'shared')} cores with others")
    busy = {engine.engine: busy_seconds(engine.actions) for engine in timeline}
    slowest = max(busy, key=lambda engine: busy[engine])
    ratio = busy[slowest] / fmean(busy.values())
    if ratio > UNEQUAL_STAGES:
        verb = facts.verb("computes", "computed")
        return RuleFinding(
            f"bubble {slowest}", f"{text}: engine {slowest} {verb} {percent(ratio - 1)} longer than the mean"
        )
    return RuleFinding("bubble", text)


def _nothing_to_do(facts: RunFacts) -> RuleFinding | None:
    empty = [worker.engine for worker in facts.active if worker.shards is not None and not worker.shards]
    if facts.is_over or not empty or len(empty) == len(facts.active) or not facts.run.num_shards:
        return None
    working = [worker.engine for worker in facts.active if worker.engine not in empty]
    verb = "has" if len(empty) == 1 else "have"
    return RuleFinding(
        f"no shards {empty}", f"{numbered(empty)} {verb} no work: all of each batch goes to {numbered(working)}"
    )


def _slowest(facts: RunFacts) -> RuleFinding | None:
    """Find one engine that waits much less than all others: it is the one they wait for."""
    if len(facts.active) < 2:
        return None
    least, *others = sorted(facts.active, key=lambda worker: worker.wait)
    waiting = [worker for worker in others if worker.wait >= WAIT_SHARE]
    # if two of them wait equally little, neither is the one
    if len(waiting) < len(others) or others[0].wait - least.wait < SLOWEST_GAP:
        return None
    # nor is one that does not wait because it is idle
    if least.busy <= max(other.busy for other in others):
        return None
    longest = waiting[-1]
    why = f"engine {least.engine} {facts.verb('is', 'was')} the slowest"
    if least.data >= max(least.compute, DATA_SHARE):
        why += f", as it {facts.verb('loads', 'loaded')} data {percent(least.data)} of the time"
    who = f"engine {longest.engine} {facts.verb('waits', 'waited')} {percent(longest.wait)} of the time"
    if len(waiting) > 1:
        # the median: one of many that waits most would say little of the others
        typical = median(worker.wait for worker in waiting)
        who = f"{len(waiting)} engines {facts.verb('wait', 'waited')} {percent(typical)} of the time"
    shards = "" if facts.is_over else held(facts, least.shards)
    return RuleFinding(f"slowest {least.engine}", f"{who}: {why}{shards}")


def _data(facts: RunFacts) -> RuleFinding | None:
    if not facts.active or facts.mean("data") < DATA_SHARE:
        return None
    text = f"{facts.engines('loads', 'load', 'loaded')} data {percent(facts.mean('data'))} of the time"
    return RuleFinding("data", f"{text}: try a dataset that does less for each sample, or holds ready tensors")


def _exchange(facts: RunFacts) -> RuleFinding | None:
    """Find a run in which even the busiest engine waits."""
    if not facts.active or min(worker.wait for worker in facts.active) < WAIT_SHARE:
        return None
    least = min(worker.wait for worker in facts.active)
    seconds = _step_seconds(facts.run)
    if seconds is not None and seconds < SHORT_STEP_SECONDS:
        reason = f", as steps {facts.verb('are', 'were')} short ({milliseconds(seconds)})"
    else:
        reason = ": waiting for the hub, or for each other" if len(facts.active) > 1 else ": waiting for the hub"
    text = f"{percent(least)} of the time {facts.verb('is', 'was')} overhead{reason}"
    return RuleFinding("exchange", f"{text}; larger batches {facts.verb('help', 'would have helped')}")


def _idle(facts: RunFacts) -> RuleFinding | None:
    if not facts.active or facts.mean("idle") < IDLE_SHARE:
        return None
    many = len(facts.active) > 1
    text = f"{facts.engines('is', 'are', 'were' if many else 'was')} idle {percent(facts.mean('idle'))} of the time"
    return RuleFinding(
        "idle", f"{text}: the run {facts.verb('has', 'had')} no work for {'them' if many else 'it'} then"
    )


def _computing(facts: RunFacts) -> RuleFinding | None:
    if not facts.active or facts.mean("compute") < COMPUTE_SHARE:
        return None
    text = f"{facts.engines('computes', 'compute', 'computed')} {percent(facts.mean('compute'))} of the time"
    return RuleFinding("computing", text)


def _mixed(facts: RunFacts) -> RuleFinding | None:
    """List all shares worth a word, when none stands out."""
    if not facts.active:
        return None
    verbs = {
        "compute": ("computes", "compute", "computed"),
        "wait": ("waits", "wait", "waited"),
        "data": ("loads data", "load data", "loaded data"),
        "idle": ("is idle", "are idle", "idled"),
    }
    one = len(facts.active) == 1
    means = sorted(((facts.mean(share), share) for share in SHARES), reverse=True)
    lines = [
        f"{facts.verb(verbs[share][0 if one else 1], verbs[share][2])} {percent(mean)}"
        for mean, share in means
        if mean >= LEAST_SHARE
    ]
    first, *rest = lines
    who = f"engine {facts.active[0].engine}" if one else "engines"
    return RuleFinding("mixed", f"{who} {listed([f'{first} of the time', *rest])}")


def _step_seconds(run: RunView) -> float | None:
    """Return the median of the last steps, by the times at which they were committed; None if it is not known."""
    _, seconds = run.history.column("seconds")
    return float(np.median(np.diff(seconds[-RECENT_STEPS:]))) if len(seconds) > 2 else None


TIME_RULES: tuple[Rule, ...] = (_bubble, _nothing_to_do, _slowest, _data, _exchange, _idle, _computing, _mixed)
