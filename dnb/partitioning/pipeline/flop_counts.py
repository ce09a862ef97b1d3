"""The operations between the places where a model can be cut, counted without computing them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.dry_run import DryRun, no_autocast
from dnb.partitioning.pipeline.tracing import Inputs, ModelCall

# A processor does so many operations of a matrix product while it writes one element.
OPERATIONS_PER_ELEMENT = 20
# Stages whose weights differ by less than this share are alike: then what is sent counts more.
ALIKE = 0.05

_Choice = tuple[int, int, float, tuple[int, ...]]


def weigh(model: nn.Module, inputs: Inputs, points: Sequence[str]) -> list[float]:
    """Count the operations of one forward in each piece of a model.

    Args:
        model: is run once, without data.
        inputs: of some samples.
        points: modules at which it can be cut, in the order in which they run.

    Returns:
        One weight per piece, one more than there are points; all alike if the model cannot be run without data.
    """
    call = ModelCall(model, inputs)
    dry_run = DryRun(model, no_autocast)
    try:
        return weigh_and_log(call, inputs, points, dry_run)[0]
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # a user's forward may look at values
        return [1.0] * (len(points) + 1)


def weigh_and_log(
    call: ModelCall, inputs: Inputs, points: Sequence[str], dry_run: DryRun
) -> tuple[list[float], list[str]]:
    """Return the weights of a model's pieces, and the operations that it calls; raises what its forward raises."""
    counter = _Counter(len(points) + 1)
    hooks = [
        call.model.get_submodule(name).register_forward_pre_hook(partial(counter.enter, piece))
        for piece, name in enumerate(points, 1)
    ]
    try:
        with dry_run.running() as operations, counter:
            call(*[dry_run.convert(value) for value in inputs.values])
    finally:
        for hook in hooks:
            hook.remove()
    return counter.weights, operations


def balanced_cuts(
    weights: Sequence[float], points: Sequence[str], num_stages: int, *, alike: float = ALIKE
) -> tuple[str, ...]:
    """Cut a chain so that its heaviest stage is as light as can be, by a dynamic programme over the last cut.

    Among cuts that are alike in that, those between outer modules win, as less goes over them than in the midst of one.

    Args:
        weights: of the pieces; at least as many as stages.
        points: where all pieces but the first begin.
        num_stages: none of which is empty.
        alike: stages that differ by less than this share of the mean one are taken for equal.
    """
    num_pieces = len(weights)
    sums = [0.0, *accumulate(weights)]
    unit = alike * sums[-1] / num_stages or 1.0

    def heaviness(begin: int, end: int) -> int:
        return ceil((sums[end] - sums[begin]) / unit)

    # By the end of the last stage: the heaviest one, how deep cuts are, the sum of squares (the evener, the less).
    best: dict[int, _Choice] = {end: (heaviness(0, end), 0, sums[end] ** 2, ()) for end in range(1, num_pieces + 1)}
    for stage in range(1, num_stages):
        before, best = best, {}
        for end in range(stage + 1, num_pieces + 1):
            chosen: _Choice | None = None
            for cut in range(end - 1, stage - 1, -1):
                own = heaviness(cut, end)
                if chosen is not None and own > chosen[0]:
                    break  # and earlier cuts make this stage only heavier
                heaviest, depth, squares, cuts = before[cut]
                option = (
                    max(heaviest, own),
                    depth + points[cut - 1].count("."),
                    squares + (sums[end] - sums[cut]) ** 2,
                    (*cuts, cut),
                )
                chosen = option if chosen is None else min(chosen, option)
            assert chosen is not None
            best[end] = chosen
    return tuple(points[cut - 1] for cut in best[num_pieces][3])


class _Counter(TorchDispatchMode):
    """Adds up operations, piece by piece."""

    def __init__(self, num_pieces: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = [0.0] * num_pieces
        self._piece = 0
        self._seen: set[int] = set()

    def enter(self, piece: int, *_: Any) -> None:
        """Count for the next piece; a module that is called again begins none."""
        if piece == self._piece + 1:
            self._piece = piece

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        weight = 0.0
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None:
            weight += count(*args, **(kwargs or {}), out_val=result)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if made and made[0]._base is None:  # a view costs nothing
            weight += OPERATIONS_PER_ELEMENT * sum(leaf.numel() for leaf in made)
        self.weights[self._piece] += weight
        return result
