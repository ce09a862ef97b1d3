"""The meaning of a run's numbers in plain sentences: the first stands above the chart, all in its summary.

Pure functions. A sentence says only what the numbers support; thresholds are constants beside their rules.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from dnb.notebook.formatting import counted, numbered
from dnb.notebook.magic_words import worded
from dnb.notebook.text.engine_text import GONE, heard_words
from dnb.notebook.text.loss_rules import LOSS_RULES
from dnb.notebook.text.run_facts import Rule, RuleFinding, RunFacts, gather_facts, held
from dnb.notebook.text.time_rules import TIME_RULES, overloaded
from dnb.notebook.views import SET_APART, RunView

# A death is reported first for as long.
RECENT_DEATH_SECONDS = 30.0


def diagnosis(run: RunView) -> RuleFinding:
    """Return the one sentence that matters most."""
    return findings(run)[0]


def findings(run: RunView) -> list[RuleFinding]:
    """Return everything worth a sentence, most important first; at least one."""
    facts = gather_facts(run)
    rules = _STANDING if run.status in ("starting", "paused") or not run.step else _GOING
    found = [finding for rule in rules if (finding := rule(facts)) is not None]
    if rules is _GOING:
        # of how the time was spent one sentence is enough: the others would be its consequences
        spent = (finding for rule in TIME_RULES if (finding := rule(facts)) is not None)
        found += islice(spent, 1)
    spend = facts.verb("yet of how the engines spend", "of how the engines spent")
    found = found or [RuleFinding("unknown", f"nothing is known {spend} their time")]
    return [replace(finding, text=worded(finding.text, run)) for finding in found]


# a run that does not go on


def _no_step(facts: RunFacts) -> RuleFinding | None:
    run = facts.run
    if facts.is_over:
        return RuleFinding("no step", f"nothing was trained: the run {_ended(run)} before its first step")
    if run.status == "paused":
        return None
    loading = [worker for worker in run.workers if worker.state not in SET_APART and worker.engine not in facts.hung]
    if not loading:
        return RuleFinding("nobody", "no engine takes part yet, so nothing is computed")
    verb = "is" if len(loading) == 1 else "are"
    step = "the next step" if run.step else "the first step"
    return RuleFinding("loading", f"{counted(len(loading), 'engine')} {verb} getting ready for {step}")


def _paused(facts: RunFacts) -> RuleFinding | None:
    if facts.run.status != "paused":
        return None
    error = (facts.run.error or "").lower()
    if not error:
        return RuleFinding("paused", "nothing is computed while the run is paused; Resume, or run.resume(), goes on")
    if not facts.run.step:
        return RuleFinding("paused", "stopped by an error before the first step: fix it, and fit again")
    if "loss=fixed" in error:
        return RuleFinding(
            "paused", "stopped by an error in your code: fix it, then run.resume(loss=fixed), or run.stop()"
        )
    return RuleFinding("paused", "stopped: nothing is computed until run.resume() or run.stop()")


# engines


def _nobody_left(facts: RunFacts) -> RuleFinding | None:
    workers = facts.run.workers
    if facts.is_over or not workers or any(worker.state not in GONE for worker in workers):
        return None
    return RuleFinding("all gone", "no engine is left, so nothing is computed")


def _silence(facts: RunFacts) -> RuleFinding | None:
    silent = [worker for worker in facts.run.workers if worker.engine in facts.hung]
    if not silent:
        return None
    ids = [worker.engine for worker in silent]
    kind = f"silent {ids}"
    if len(silent) > 1:
        return RuleFinding(kind, f"{numbered(ids)} are silent")
    (worker,) = silent
    ago = heard_words(worker.heartbeat_age_seconds)
    text = f" (last heard {ago})" if ago not in ("", "now") else ""
    return RuleFinding(kind, f"engine {worker.engine} is silent{text}{held(facts, worker.shards)}")


def _recent_death(facts: RunFacts) -> RuleFinding | None:
    run = facts.run
    dead = {worker.engine for worker in run.workers if worker.state == "dead"}
    now = run.started + run.elapsed_seconds
    died = [
        event
        for event in run.events
        if event.kind == "died" and event.engine in dead and now - event.time < RECENT_DEATH_SECONDS
    ]
    if facts.is_over or not died:
        return None
    ids = sorted({event.engine for event in died if event.engine is not None})
    living = [worker for worker in run.workers if worker.state not in SET_APART]
    others = f": {counted(len(living), 'engine')} {'is' if len(living) == 1 else 'are'} left" if living else ""
    return RuleFinding(f"died {ids}", f"{numbered(ids)} died after step {died[-1].step:,}{others}")


def _ended(run: RunView) -> str:
    return {"failed": "failed", "stopped": "was stopped"}.get(run.status, "ended")


_STANDING: tuple[Rule, ...] = (_nobody_left, _no_step, _paused, _silence)
# a loss that is no number goes before engines, the rest of what losses say after them
_GOING: tuple[Rule, ...] = (_nobody_left, LOSS_RULES[0], _silence, _recent_death, overloaded, *LOSS_RULES[1:])
