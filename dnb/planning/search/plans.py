"""A plan: who computes which layers, what it is predicted to take, and which alternatives are slower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Self

import msgspec

from dnb.errors import PlanError, nearest
from dnb.planning.search.costs import Workload
from dnb.planning.search.plan_checks import check_question, read_cuts, refuse_excess
from dnb.planning.search.plan_search import candidates
from dnb.planning.search.plan_text import describe
from dnb.planning.search.prediction import (
    Candidate,
    Mesh,
    Question,
    Stage,
    candidate,
    data_parallel,
    numbers_of_micro_batches,
    place_groups,
)
from dnb.planning.search.profiles import ParameterShape, Profile, Site
from dnb.protocol.base import Record
from dnb.protocol.measurements import Prediction
from dnb.protocol.run import Partition, ScheduleName
from dnb.units import amount, milliseconds

MOST_ALTERNATIVES = 8
# Editable by `Plan.with_`.
CHANGES = ("batch_size", "cuts", "data", "num_micro_batches", "num_stages", "schedule")


class Alternative(Record, frozen=True):
    """A candidate that was tried and not chosen."""

    mesh: Mesh
    num_micro_batches: int
    step_seconds: float
    why: str
    fits: bool = True


class Plan(Record, frozen=True):
    """A plan of the computation; made by `dnb.plan`, edited by `with_`, passed to `fit` as its strategy."""

    strategy: str  # "data" | "pipeline" | "hybrid"
    mesh: Mesh
    partition: Partition | None  # None: every engine has the whole model
    stages: tuple[Stage, ...]
    num_micro_batches: int
    schedule: ScheduleName
    step_seconds: float  # predicted
    compute_seconds: float  # until the last gradient is there
    hub_seconds: float  # messages, sum of gradients, update
    bubble: float  # predicted share of the engines' time in which they wait for each other
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]
    profile: Profile
    site: Site
    question: Question

    @property
    def batch_size(self) -> int:
        """Samples of the global batch."""
        return self.question.batch_size

    @property
    def num_engines(self) -> int:
        """Engines that have a part."""
        return self.mesh.num_engines

    @property
    def samples_per_second(self) -> float:
        """Predicted."""
        return self.batch_size / self.step_seconds

    @property
    def ideal_bubble(self) -> float:
        """(p - 1) / (m + p - 1): what equal stages without fixed costs, each on a core of its own, would have."""
        num_stages = len(self.stages)
        return (num_stages - 1) / (self.num_micro_batches + num_stages - 1) if num_stages > 1 else 0.0

    @property
    def memory_bytes(self) -> dict[int, int]:
        """By engine: parameters, gradients, activations in flight and input; without what a process needs anyway."""
        return {engine: stage.memory_bytes for stage in self.stages for engine in stage.engines}

    @property
    def prediction(self) -> Prediction:
        """The prediction against which the run's measurements are held."""
        return Prediction(
            batch_size=self.batch_size,
            step_seconds=self.step_seconds,
            compute_seconds=self.compute_seconds,
            bubble=self.bubble,
            stage_bytes=tuple(stage.memory_bytes for stage in self.stages),
        )

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers of each stage."""
        return tuple(
            tuple(layer.name for layer in self.profile.layers[stage.first : stage.last]) for stage in self.stages
        )

    def with_(self, **changes: Any) -> Self:
        """Return the same plan with some things settled, all figures predicted anew.

        Args:
            changes: `cuts` (names of the layers at which stages 1, 2, ... begin), `num_stages`, `num_micro_batches`,
                `schedule` ("gpipe" or "1f1b"), `data` (teams), `batch_size`. What is not named stays, but with more
                stages there are only as many teams as there are engines for, and with another mesh cuts and the number
                of micro-batches are chosen anew.

        Raises:
            PlanError: it cannot be divided so, or does not fit.
        """
        unknown = [name for name in changes if name not in CHANGES]
        if unknown:
            raise PlanError(f"a plan has no {unknown[0]!r} to change: {nearest(unknown[0], CHANGES)}")
        cuts = changes.pop("cuts", None)
        if cuts is not None:
            cuts = read_cuts(cuts, self.profile)
            num_stages = changes.setdefault("num_stages", len(cuts) + 1)
            if num_stages != len(cuts) + 1:
                raise PlanError(f"{len(cuts)} cuts make {len(cuts) + 1} stages, not {num_stages}: leave num_stages out")
        num_teams = len(self.site.engines) // max(changes.get("num_stages", self.mesh.pipeline), 1)
        changes.setdefault("data", min(self.mesh.data, max(num_teams, 1)))
        is_same_mesh = changes["data"] == self.mesh.data
        is_same_mesh &= changes.get("num_stages", self.mesh.pipeline) == self.mesh.pipeline
        settled = {
            "num_stages": self.mesh.pipeline,
            "num_micro_batches": self.num_micro_batches if is_same_mesh else None,
            "schedule": self.schedule if self.partition is not None else None,
        }
        question = msgspec.structs.replace(self.question, strategy="auto", **(settled | changes))
        check_question(question, self.profile, self.site)
        if cuts is None and is_same_mesh and self.partition is not None:
            cuts = [stage.first for stage in self.stages[1:]]
        made = predict(self.profile, self.site, question, cuts=cuts)
        refuse_excess([made], self.profile, self.site, question)
        edited = _plan(made, self.profile, self.site, question, alternatives=(_lost_to_edit(self, made),))
        return type(self)(**(msgspec.structs.asdict(edited) | {"notes": self.notes}))

    def check(self, model: Any) -> None:
        """Refuse a model that this plan was not made for.

        Args:
            model: a torch.nn.Module.

        Raises:
            PlanError: names the first difference.
        """
        found = tuple(
            ParameterShape(name=name, shape=tuple(parameter.shape), dtype=str(parameter.dtype).removeprefix("torch."))
            for name, parameter in model.named_parameters()
        )
        for own, other in zip_longest(self.profile.parameters, found):
            if own != other:
                raise PlanError(
                    f"this plan is for another model: {_difference(own, other)}; "
                    "make one for this model with dnb.plan(model, batch)"
                )

    def __str__(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        return f"<dnb.Plan: {self.strategy}, {self.mesh}, {milliseconds(self.step_seconds)} per step predicted>"


def draw_up(profile: Profile, site: Site, question: Question, *, notes: Iterable[str] = ()) -> Plan:
    """Find the fastest plan that fits, among all that were asked for.

    Raises:
        PlanError: it cannot be divided so, or does not fit however it is divided.
    """
    check_question(question, profile, site)
    found = candidates(profile, site, question)
    refuse_excess(found, profile, site, question)
    best, *others = found
    lost = [_lost(each, best) for each in others[:MOST_ALTERNATIVES]]
    return _plan(best, profile, site, question, alternatives=lost, notes=notes)


def predict(profile: Profile, site: Site, question: Question, *, cuts: Sequence[int] | None) -> Candidate:
    """Predict one settled mesh, with given cuts or the best."""
    assert question.data is not None
    if question.num_stages == 1:
        return data_parallel(profile, site, question, data=question.data)
    if cuts is None:
        return candidates(profile, site, question)[0]
    samples = max(1, question.batch_size // question.data)
    made = [
        candidate(
            Workload(profile, samples / number),
            site,
            question,
            data=question.data,
            cuts=cuts,
            places=range(len(cuts) + 1),
            groups=place_groups(site, data=question.data),
            schedule=question.schedule or "1f1b",
            num_micro_batches=number,
        )
        for number in numbers_of_micro_batches(samples, question)
    ]
    return min(made, key=lambda each: (not each.fits, each.step_seconds))


def _plan(
    best: Candidate,
    profile: Profile,
    site: Site,
    question: Question,
    *,
    alternatives: Iterable[Alternative],
    notes: Iterable[str] = (),
) -> Plan:
    partition = None
    if best.num_stages > 1:
        partition = Partition(
            kind="pipeline",
            num_engines=best.num_stages,
            num_stages=best.num_stages,
            cuts=tuple(profile.layers[stage.first].name for stage in best.stages[1:]),
            schedule=best.schedule,
            num_micro_batches=best.num_micro_batches,
        )
    return Plan(
        strategy=best.strategy,
        mesh=best.mesh,
        partition=partition,
        stages=best.stages,
        num_micro_batches=best.num_micro_batches,
        schedule=best.schedule,
        step_seconds=best.step_seconds,
        compute_seconds=best.compute_seconds,
        hub_seconds=best.hub_seconds,
        bubble=best.bubble,
        alternatives=tuple(alternatives),
        notes=tuple(notes),
        profile=profile,
        site=site,
        question=question,
    )


def _lost(one: Candidate, best: Candidate) -> Alternative:
    return Alternative(
        mesh=one.mesh,
        num_micro_batches=one.num_micro_batches,
        step_seconds=one.step_seconds,
        why=_why(one, best),
        fits=one.fits,
    )


def _why(one: Candidate, best: Candidate) -> str:
    """Explain in one line by how much a candidate lost, and what takes it so long."""
    if not one.fits:
        worst = max(one.stages, key=lambda stage: stage.memory_bytes - (stage.memory_limit or stage.memory_bytes))
        return (
            f"does not fit: engine {worst.engines[0]} would need {amount(worst.memory_bytes)}, "
            f"its limit is {amount(worst.memory_limit or 0)}"
        )
    times = one.step_seconds / best.step_seconds
    if times < 1.005:
        return "as fast; the other takes fewer engines or comes first"
    reason = "the engines have as much to compute, on fewer cores or engines"
    if one.hub_seconds - best.hub_seconds > (one.step_seconds - best.step_seconds) / 2:
        reason = f"hub and optimizer take {milliseconds(one.hub_seconds)}"
    elif one.bubble - best.bubble > 0.05:
        reason = f"engines wait for each other {one.bubble:.0%} of the time"
    elif one.data * one.num_stages > best.data * best.num_stages:
        reason = "more engines bring more fixed costs than they take work off"
    return f"{times:.2f} times as long: {reason}"


def _lost_to_edit(plan: Plan, made: Candidate) -> Alternative:
    times = plan.step_seconds / made.step_seconds
    return Alternative(
        mesh=plan.mesh,
        num_micro_batches=plan.num_micro_batches,
        step_seconds=plan.step_seconds,
        why=f"before the edit: {times:.2f} times as long",
    )


def _difference(own: ParameterShape | None, other: ParameterShape | None) -> str:
    if other is None:
        assert own is not None
        return f"the plan has a parameter {own.name!r}, the model has no more"
    if own is None:
        return f"the model has a parameter {other.name!r}, of which the plan knows nothing"
    if own.name != other.name:
        return f"where the plan has parameter {own.name!r}, the model has {other.name!r}"
    what = "shape" if own.shape != other.shape else "dtype"
    return f"parameter {own.name!r} has {what} {getattr(own, what)} in the plan and {getattr(other, what)} in the model"
