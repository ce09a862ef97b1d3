"""The division of a model's layers by columns and by rows, over two engines, over three, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dnb.errors import USER_ERRORS, PlanError
from dnb.partitioning.pipeline.dry_run import first_line, users_line
from dnb.partitioning.tensor.flow import FlowWatch, LayerGroup, head_counts, uneven
from dnb.partitioning.tensor.plan_input import WAY_OUT, plan_of_model, read_tensor_plan
from dnb.partitioning.tensor.simulated_ranks import WholeResult, fault_of, moved_copy, whole_of
from dnb.partitioning.tensor.trial import ModelTrial
from dnb.protocol.run import Partition

# Engines of a team that may come later are planned for, too; with more of them messages outweigh what is saved.
MOST_ENGINES = 8
KINDS_SHOWN = 3
# Of larger models a copy in doubles may not find room beside the notebook's own; single precision shows mistakes, too.
MOST_DOUBLES = 1 << 27

UserPlan = Mapping[str, Any] | None


def tensor_partitions(
    model: nn.Module, trial: ModelTrial, *, wanted: int | None = None, plan: UserPlan = None
) -> tuple[Partition, ...]:
    """Find the partitions over 1, 2, ... engines; all but the first were tried on simulated ranks.

    Args:
        model: what is divided; it stays as it is.
        trial: calls copies of it.
        wanted: engines of one team, if the user has said so.
        plan: the user's own, as given to `fit`.

    Raises:
        ArgumentError: the plan names what is not there.
        PlanError: nothing can be divided, or not as the plan says, or not over so many engines.
    """
    styles = plan_of_model(model) if plan is None else read_tensor_plan(model, plan)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        planner = _Planner(model, trial)
        if styles is None:
            return planner.partitions(None, wanted=wanted)
        origin = "tensor_plan" if plan is not None else "the model's own tp_plan"
        return planner.partitions(LayerGroup(styles, (), head_counts(model, styles)), wanted=wanted, origin=origin)


class _Planner:
    """Tries divisions of one model."""

    def __init__(self, model: nn.Module, trial: ModelTrial) -> None:
        self._model = model
        self._whole, self._found = _computed(model, trial)
        self._faults: dict[str, None] = {}  # what was wrong with what was left out
        self._known: dict[Any, str] = {}

    def partitions(self, asked: LayerGroup | None, *, wanted: int | None, origin: str = "") -> tuple[Partition, ...]:
        """Return the partition over one engine, and over all numbers of them that divide what can be divided."""
        groups = _by_kind(self._found) if asked is None else [asked]
        if not groups:
            raise PlanError(
                "tensor parallelism divides nn.Linear and nn.Embedding, and this model has none that are large enough "
                f"or whose outputs come together in another: use strategy='data', or {WAY_OUT}"
            )
        if wanted == 1:
            return (_partition(1, LayerGroup({})),)
        most = wanted or MOST_ENGINES
        chosen = self._choose(groups, [wanted] if wanted else range(2, most + 1), origin=origin)
        fitting = [number for number in range(2, most + 1) if not self._fault(chosen, number)]
        if not fitting or wanted not in (None, *fitting):
            raise PlanError(f"these layers cannot be divided together: {self._fault(chosen, wanted or 2)}; {WAY_OUT}")
        return tuple(_partition(number, chosen) for number in (1, *fitting))

    def _choose(self, groups: Sequence[LayerGroup], numbers: Sequence[int], *, origin: str) -> LayerGroup:
        """Return the layers that can be divided over the first number of engines over which any can be."""
        for number in numbers:
            if not self._fault(_merged(groups), number):
                return _merged(groups)  # the usual case, for one rehearsal
            passing = [found for group in groups for found in self._best(group, number)]
            if passing:
                if len(numbers) == 1:
                    self._refuse_what_fewer_could(groups, passing, number)
                return _merged(passing)
        raise PlanError(
            f"{f'{origin} cannot be carried out' if origin else 'nothing of this model can be divided'}: "
            f"{self._list_faults()}; {self._nearest(groups, numbers)}"
        )

    def _best(self, group: LayerGroup, number: int) -> list[LayerGroup]:
        own = self._passing(group, number)
        others = [self._passing(other, number) for other in group.otherwise] if own is None else [own]
        return [found for found in others if found is not None]

    def _passing(self, group: LayerGroup, number: int) -> LayerGroup | None:
        """Return a group as it can be divided: with the model's own numbers of heads, or an engine's share of them."""
        plain = replace(group, counts={})
        if not self._fault(plain, number):
            return plain
        if group.counts and not self._fault(group, number):
            return group
        self._faults[self._why_not(group, number)] = None
        return None

    def _refuse_what_fewer_could(
        self, groups: Sequence[LayerGroup], passing: Sequence[LayerGroup], wanted: int
    ) -> None:
        """Refuse a number of engines that leaves layers whole which a smaller number would divide."""
        kinds = {group.kind for group in passing}
        for group in groups:
            if group.kind in kinds:
                continue
            fitting = [number for number in range(2, wanted) if self._passing(group, number) is not None]
            if fitting:
                raise PlanError(
                    f"{_listed(group.styles)} can be divided over {_numbers(fitting)} engines, not over {wanted}: "
                    f"{self._why_not(group, wanted)}; mesh='tensor={fitting[-1]}', or name the others in tensor_plan="
                )

    def _why_not(self, group: LayerGroup, number: int) -> str:
        """Return the figure that does not divide, if one says it all."""
        return uneven(self._model, group, number) or self._fault(replace(group, counts={}), number)

    def _fault(self, group: LayerGroup, number: int) -> str:
        key = tuple(group.styles.items()), tuple(group.counts), number
        if key not in self._known:
            shares = shares_of(group, number)
            uneven_one = uneven(self._model, group, number)
            self._known[key] = uneven_one or fault_of(self._whole, group.styles, shares, number)
        return self._known[key]

    def _list_faults(self) -> str:
        faults = list(self._faults)
        more = f", and {len(faults) - KINDS_SHOWN} more" if len(faults) > KINDS_SHOWN else ""
        return "; ".join(faults[:KINDS_SHOWN]) + more

    def _nearest(self, groups: Sequence[LayerGroup], numbers: Sequence[int]) -> str:
        if len(numbers) == 1:
            fitting = [
                number
                for number in range(2, MOST_ENGINES + 1)
                if all(self._passing(group, number) is not None for group in groups)
            ]
            if fitting:
                best = min(fitting, key=lambda number: abs(number - numbers[0]))
                return f"{best} engines can: mesh='tensor={best}'"
        return WAY_OUT


def _computed(model: nn.Module, trial: ModelTrial) -> tuple[WholeResult, list[LayerGroup]]:
    """Compute the whole model, in doubles if it can be, and the flow of its values."""
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    dtypes = (torch.float64, torch.float32) if num_elements <= MOST_DOUBLES else (torch.float32,)
    for dtype in dtypes:
        try:
            trial.convert(dtype)
            moved = moved_copy(model, dtype)
            watch = FlowWatch(moved)
            value = trial.evaluate(moved)
            groups = watch.groups(value)
            watch.close()
            return whole_of(moved, value, trial.evaluate), groups
        except KeyboardInterrupt:
            raise
        except USER_ERRORS as error:  # a user's model may raise anything
            if dtype is torch.float32:
                line = users_line(error)
                raise PlanError(
                    f"the model could not be tried out on a few samples, to see what can be divided: "
                    f"{first_line(error)}{f', at {line}' if line else ''}"
                ) from error
    raise AssertionError("two precisions")


def shares_of(group: LayerGroup, number: int) -> dict[str, int]:
    """Return an engine's share of the numbers of heads."""
    return {name: count // number for name, count in group.counts.items()}


def _partition(number: int, group: LayerGroup) -> Partition:
    if number == 1:
        return Partition(kind="tensor", num_engines=1)
    return Partition(kind="tensor", num_engines=number, styles=dict(group.styles), shares=shares_of(group, number))


def _merged(groups: Sequence[LayerGroup]) -> LayerGroup:
    return LayerGroup(
        {name: style for group in groups for name, style in group.styles.items()},
        groups[0].kind,
        {name: count for group in groups for name, count in group.counts.items()},
        tuple(_by_kind([other for group in groups for other in group.otherwise])),
    )


def _by_kind(groups: Sequence[LayerGroup]) -> list[LayerGroup]:
    """Merge layers that are alike, which are tried together."""
    kinds: dict[tuple[Any, ...], list[LayerGroup]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return [_merged(alike) for alike in kinds.values()]


def _numbers(found: Sequence[int]) -> str:
    *others, last = found
    return f"{', '.join(map(str, others))} or {last}" if others else str(last)


def _listed(names: Mapping[str, Any]) -> str:
    shown = [repr(name) for name in list(names)[:KINDS_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
