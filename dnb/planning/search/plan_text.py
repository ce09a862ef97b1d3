"""A plan in words: what its drawing shows, for people without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dnb.planning.search.prediction import Mesh, Stage
from dnb.units import amount, milliseconds

if TYPE_CHECKING:
    from dnb.planning.search.plans import Alternative, Plan


def describe(plan: Plan) -> str:
    """Describe in words all that a drawing of the plan shows."""
    lines = [headline(plan)]
    for rank, stage in enumerate(plan.stages):
        lines.append("  " + ", ".join(stage_facts(plan, rank, stage)))
    if plan.alternatives:
        lines.append(f"{alternatives_heading(plan)}:")
        lines += [f"  {lost_line(alternative)}" for alternative in plan.alternatives]
    return "\n".join([*lines, *plan.notes])


def alternatives_heading(plan: Plan) -> str:
    """Call the alternatives of a plan slower, unless one is not: a plan that was edited may be the slower one."""
    are_slower = all(not each.fits or each.step_seconds >= plan.step_seconds for each in plan.alternatives)
    return "slower alternatives" if are_slower else "alternatives"


def headline(plan: Plan) -> str:
    """Summarise the prediction of a plan in one sentence."""
    parts = [f"{milliseconds(plan.step_seconds)} per step of {plan.batch_size} samples predicted"]
    if plan.partition is not None:
        parts.append(f"{plan.num_micro_batches} micro-batches by {plan.schedule}")
        parts.append(f"bubble {plan.bubble:.0%} (formula {plan.ideal_bubble:.0%})")
    elif plan.num_micro_batches > 1:
        parts.append(f"{plan.num_micro_batches} micro-batches one after the other")
    parts.append(f"hub {milliseconds(plan.hub_seconds)}")
    return f"{plan.profile.model}, {division_in_words(plan.mesh)}: {', '.join(parts)}"


def division_in_words(mesh: Mesh) -> str:
    """Tell in words what a mesh divides, and over how many engines."""
    num_engines = mesh.data * mesh.pipeline
    if num_engines == 1:
        return "on one engine"
    if mesh.pipeline == 1:
        return f"data parallel on {num_engines} engines"
    if mesh.data == 1:
        return f"a pipeline of {mesh.pipeline} stages on {num_engines} engines"
    return f"{mesh.data} pipelines of {mesh.pipeline} stages on {num_engines} engines"


def stage_facts(plan: Plan, rank: int, stage: Stage) -> list[str]:
    """Describe one stage: its engines, layers, milliseconds and bytes."""
    plural = "s" if len(stage.engines) > 1 else ""
    limit = "" if stage.memory_limit is None else f" of {amount(stage.memory_limit)}"
    facts = [
        f"stage {rank} on engine{plural} {shortened(stage.engines)}: {layer_span(plan, stage)}",
        f"forward {milliseconds(stage.forward_seconds)}, backward {milliseconds(stage.backward_seconds)}",
        f"parameters {amount(stage.parameter_bytes)}",
        f"memory {amount(stage.memory_bytes)}{limit}",
    ]
    if rank:
        facts.append(f"receives {amount(stage.received_bytes)}, returns {amount(stage.returned_bytes)}")
    return facts


def layer_span(plan: Plan, stage: Stage) -> str:
    """Name the stage's layers, from the first to the last."""
    layers = plan.profile.layers
    first, last = layers[stage.first].name or plan.profile.model, layers[stage.last - 1].name
    count = stage.last - stage.first
    return first if count == 1 else f"{first} to {last} ({count} layers)"


def lost_line(alternative: Alternative) -> str:
    """Describe one alternative in a line."""
    pieces = f", {alternative.num_micro_batches} micro-batches" if alternative.num_micro_batches > 1 else ""
    return f"{alternative.mesh}{pieces}: {milliseconds(alternative.step_seconds)}, {alternative.why}"


def shortened(engines: Sequence[int]) -> str:
    """List engine ids; only the first and the last of many."""
    if len(engines) <= 4:
        return ", ".join(map(str, engines))
    return f"{engines[0]}, {engines[1]}, ... {engines[-1]} ({len(engines)} engines)"
