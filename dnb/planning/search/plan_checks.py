"""Checks that refuse an impossible plan with the figures and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from dnb.errors import PlanError, nearest
from dnb.planning.search.costs import Workload
from dnb.planning.search.cut_search import CutSearch, EnginePlace
from dnb.planning.search.prediction import MICRO_BATCHES, Candidate, Question
from dnb.planning.search.profiles import Profile, Site
from dnb.units import amount


def check_question(question: Question, profile: Profile, site: Site) -> None:
    """Refuse what no division can be.

    Raises:
        PlanError: with the figures and the way out.
    """
    num_engines, num_layers = len(site.engines), len(profile.layers)
    data, num_stages = question.data or 1, question.num_stages or 1
    if num_stages > num_layers:
        names = ", ".join(layer.name or "the model itself" for layer in profile.layers[:6])
        raise PlanError(
            f"{num_stages} pipeline stages need {num_stages} layers, and {profile.model} has {num_layers} that run "
            f"one after the other ({names}{', ...' if num_layers > 6 else ''}): use at most {num_layers} stages"
        )
    if question.strategy in ("pipeline", "hybrid") and num_layers < 2:
        raise PlanError(
            f"a pipeline needs at least 2 layers, and {profile.model} is one: strategy='data', or write it as modules "
            "that run one after the other"
        )
    needed = max(data * num_stages, {"pipeline": 2, "hybrid": 4}.get(question.strategy, 1))
    if needed > num_engines:
        what = f"mesh data={data},pipeline={num_stages}" if question.data or question.num_stages else question.strategy
        raise PlanError(
            f"{what} needs {needed} engines, and there are {num_engines}: %dtrain add {needed - num_engines}, "
            f"or plan for a pool that does not exist yet with num_engines={needed}"
        )
    number = question.num_micro_batches
    samples = question.batch_size // data
    if number is not None and number > samples:
        raise PlanError(f"{number} micro-batches of {samples} samples: use at most {samples}")


def refuse_excess(found: Sequence[Candidate], profile: Profile, site: Site, question: Question) -> None:
    """Refuse if nothing that was found fits.

    Raises:
        PlanError: what is needed, what the limit is, and how many engines would do.
    """
    if not found:
        raise PlanError(f"no mesh of {len(site.engines)} engines is left to try: leave the mesh open")
    if any(each.fits for each in found):
        return
    closest = min(found, key=lambda each: each.excess_bytes)
    worst = max(closest.stages, key=lambda stage: stage.memory_bytes - (stage.memory_limit or stage.memory_bytes))
    assert worst.memory_limit is not None
    raise PlanError(
        f"{profile.model} does not fit: as {closest.mesh} with {closest.num_micro_batches} micro-batches, engine "
        f"{worst.engines[0]} would need {amount(worst.memory_bytes)} for parameters, gradients and activations, and "
        f"its limit is {amount(worst.memory_limit)}; {_way_out(profile, site, question, limit=worst.memory_limit)}"
    )


def _way_out(profile: Profile, site: Site, question: Question, *, limit: int) -> str:
    """Suggest the number of engines with that much memory that would do."""
    most = len(profile.layers)
    samples = max(1, question.batch_size // (question.data or 1))
    enough = []
    for number in (number for number in MICRO_BATCHES if number <= samples):
        divider = CutSearch(
            Workload(profile, samples / number),
            places=[EnginePlace(1.0, limit)] * most,
            schedule=question.schedule or "1f1b",
            num_micro_batches=number,
            exchange=site.exchange,
        )
        bounds = divider.bounds(most)
        enough += [num_stages for num_stages, bound in enumerate(bounds, 1) if bound < inf][:1]
    if enough:
        return f"a pipeline over {min(enough)} engines would do, or batches of fewer samples"
    largest = max(profile.layers, key=lambda layer: layer.parameter_bytes + layer.gradient_bytes)
    needed = largest.parameter_bytes + largest.gradient_bytes
    return (
        f"no number of engines would do, as {largest.name or 'one layer'} alone has {amount(needed)} of parameters and "
        "gradients: raise memory_limit, or make layers or batch smaller"
    )


def read_cuts(cuts: Any, profile: Profile) -> list[int]:
    """Return the numbers of the layers that are named.

    Raises:
        PlanError: no such layer, not in the order of the layers, or the first one.
    """
    names = [layer.name for layer in profile.layers]
    wanted = [cuts] if isinstance(cuts, str) else list(cuts)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise PlanError(f"no layer {unknown[0]!r} to cut before: {nearest(str(unknown[0]), names[1:])}")
    numbers = [names.index(name) for name in wanted]
    if numbers != sorted(set(numbers)) or 0 in numbers:
        raise PlanError(
            f"cuts name the layers at which stages 1, 2, ... begin, in the order of the layers and without the first "
            f"({names[0]!r}), not {', '.join(map(repr, wanted))}"
        )
    return numbers
