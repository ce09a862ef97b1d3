"""Rules that read a run's losses."""

from __future__ import annotations

import numpy as np

from dnb.notebook.formatting import number
from dnb.notebook.text.run_facts import Rule, RuleFinding, RunFacts

# A loss is judged by means over eight equal parts of the steps, each of at least as many steps.
NUM_PARTS = 8
STEPS_PER_PART = 25
# A validation loss has turned if as many evaluations since the best are worse by this factor.
NUM_WORSE = 3
WORSE = 1.02


def _not_finite(facts: RunFacts) -> RuleFinding | None:
    steps, losses = facts.run.history.column("loss")
    if not len(losses) or np.isfinite(losses[-1]):
        return None
    bad = int(np.flatnonzero(np.isfinite(losses))[-1] + 1) if np.isfinite(losses).any() else 0
    since = f"since step {steps[bad]:,}" if bad else "from the first step on"
    verb = facts.verb("is", "was")
    _, rates = facts.run.history.column("lr")
    rate = f" (now {rates[-1]:.3g})" if len(rates) and not facts.is_over else ""
    return RuleFinding(
        "not finite", f"the loss {verb} not a finite number {since}: try a smaller learning rate{rate}, or clip_norm"
    )


def _no_progress(facts: RunFacts) -> RuleFinding | None:
    """Find a run whose lowest mean of a part is in its first half: since then nothing was won."""
    steps, losses = facts.run.history.column("loss")
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
    verb = facts.verb("has not improved", "did not improve")
    return RuleFinding(
        "no progress",
        f"the loss {verb} since about step {last:,}: on average {number(float(means[best]))} then, "
        f"{number(float(means[-1]))} {facts.verb('now', 'at the end')}",
    )


def _overfitting(facts: RunFacts) -> RuleFinding | None:
    steps, values = facts.run.history.column("val_loss")
    if not np.isfinite(values).any():
        return None
    best = int(np.where(np.isfinite(values), values, np.inf).argmin())
    since = values[best + 1 :]
    # by a part of its size, as a loss may be negative
    limit = values[best] + (WORSE - 1) * abs(values[best])
    if len(since) < NUM_WORSE or not (since > limit).all():
        return None
    text = f"overfitting: the validation loss was best at step {steps[best]:,} ({number(float(values[best]))})"
    verb = facts.verb("has been", "was")
    return RuleFinding("validation turned", f"{text} and {verb} worse in all {len(since)} evaluations since")


LOSS_RULES: tuple[Rule, ...] = (_not_finite, _overfitting, _no_progress)
