"""Batches to judge a loss by: parts of a batch, and others that are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

Cut = list[tuple[int, int]]  # begin and end of each part
Take = Callable[[Any, int, int], Any]  # samples of a batch, from one to another

# Relative: the rounding of a sum of some samples in float32, which losses of float64 may use inside, and in 16 bits.
_TOLERANCE = 2e-5
_COARSE = 2e-2
_HALVES = (torch.float16, torch.bfloat16)
# Of outputs with more elements only what was computed is looked at, and the same with targets that are ignored.
_MANY_ELEMENTS = 1 << 20
# Values by which targets say that they do not count, if the loss does not tell its own.
_MARKS = (-100, -1, 0)


class JudgedBatches:
    """A batch, others that are made of it, and the parts of each."""

    def __init__(
        self,
        batch: Any,
        *,
        num_samples: int,
        vary: Callable[[Any, int], Iterator[Any]] | None = None,
        fetch: Callable[[int, int], Any] | None = None,
        leaves_out: Callable[[Any], bool] = lambda _loss: True,
    ) -> None:
        self.batch, self.num_samples = batch, num_samples
        self.cuts = _cuts_of(num_samples)
        self._take = _taker(batch, num_samples, fetch)
        self._leaves_out = leaves_out
        self._is_large = _num_elements(batch) > _MANY_ELEMENTS
        self._vary = None if self._is_large else vary

    @property
    def first_cuts(self) -> list[Cut]:
        """The cuts of the batch itself: all of what was computed, and is cheap."""
        return self.cuts[: 1 if self._is_large else None]

    def parts(self, batch: Any, cut: Cut) -> list[Any]:
        """Cut a batch."""
        return [self._take(batch, begin, end) for begin, end in cut]

    def others(self, loss: Any, ignored: set[int]) -> Iterator[Any]:
        """Make other batches, by the loss of the first one and the marks of targets that it ignores."""
        if self._leaves_out(loss):
            marks = list(ignored) if self._vary is None and ignored else [*_MARKS, *ignored]
            yield from _without_some_targets(self.batch, self.num_samples, marks)
        if self._vary is not None:
            yield from self._vary(self.batch, self.num_samples)


def _cuts_of(num_samples: int) -> list[Cut]:
    """Return uneven partitions; no part has one sample if it can be helped, as none has on engines."""
    if num_samples < 2:
        return []
    starts = {2: [(1,)], 3: [(1,)], 4: [(2,)], 5: [(2,)]}.get(num_samples, [(2,), (3,), (2, num_samples // 2)])
    cuts = []
    for inner in starts:
        edges = sorted({0, *inner, num_samples})
        cuts.append(list(pairwise(edges)))
    return cuts


def _taker(batch: Any, num_samples: int, fetch: Callable[[int, int], Any] | None) -> Take:
    """Return a function that takes samples of all that has as many, be it a tensor or a list; or else fetches them."""

    def is_list(node: Any) -> bool:
        return isinstance(node, list) and _has_samples(node, num_samples)

    def take(batch: Any, begin: int, end: int) -> Any:
        return pytree.tree_map(
            lambda leaf: leaf[begin:end] if _has_samples(leaf, num_samples) else leaf, batch, is_leaf=is_list
        )

    can_be_cut = any(_has_samples(leaf, num_samples) for leaf in pytree.tree_leaves(batch, is_leaf=is_list))
    return take if can_be_cut or fetch is None else lambda _, begin, end: fetch(begin, end)


def _has_samples(leaf: Any, num_samples: int) -> bool:
    if isinstance(leaf, torch.Tensor | np.ndarray):
        return leaf.ndim > 0 and len(leaf) == num_samples
    return isinstance(leaf, list) and len(leaf) == num_samples and not any(_has_samples(e, num_samples) for e in leaf)


def _num_elements(batch: Any) -> int:
    """Return the number of all elements of a batch's tensors."""
    return sum(leaf.numel() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def tolerance_of(batch: Any) -> float:
    """Return the relative difference of losses that is rounding, for people to be told of more."""
    leaves = pytree.tree_leaves(batch)
    return _COARSE if any(getattr(leaf, "dtype", None) in _HALVES for leaf in leaves) else _TOLERANCE


def other_outputs(pair: tuple[Any, Any], num_samples: int) -> Iterator[tuple[Any, Any]]:
    """Make outputs that are mixed among the samples, so that they stay what the loss takes, and outputs at random."""
    output, target = pair
    generator = torch.Generator().manual_seed(0)

    def mixed(leaf: Any) -> Any:
        if not _is_floating(leaf, num_samples):
            return leaf
        shares = torch.rand(num_samples, generator=generator).to(leaf).reshape(-1, *[1] * (leaf.dim() - 1))
        return leaf.detach() * shares + leaf.detach().roll(1, 0) * (1 - shares)

    def drawn(leaf: Any) -> Any:
        if not _is_floating(leaf, num_samples):
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    def drawn_as_shares(leaf: Any) -> Any:
        if not _is_floating(leaf, num_samples):
            return leaf
        return torch.rand(leaf.shape, generator=generator).to(leaf) * 0.9 + 0.05

    for change in (mixed, drawn, drawn_as_shares):
        yield pytree.tree_map(change, output), target


def _without_some_targets(batch: Any, num_samples: int, marks_of_classes: Sequence[int]) -> Iterator[Any]:
    """Let targets not count: all of one sample, and half of another, by each mark in each tensor."""
    leaves, spec = pytree.tree_flatten(batch)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or not _has_samples(leaf, num_samples) or leaf.is_complex():
            continue
        marks: Sequence[float] = marks_of_classes
        if leaf.is_floating_point():
            marks = (0.0, math.nan) if isinstance(batch, tuple) and index == len(leaves) - 1 else (0.0,)
        elif leaf.dtype == torch.bool:
            marks = (False,)
        for mark in dict.fromkeys(marks):
            if leaf.dtype == torch.uint8 and mark < 0:
                continue
            marked = leaf.detach().clone()
            marked[1] = mark
            if marked.dim() > 1:
                marked[-1].reshape(-1)[: marked[-1].numel() // 2] = mark
            yield pytree.tree_unflatten([*leaves[:index], marked, *leaves[index + 1 :]], spec)


def _is_floating(leaf: Any, num_samples: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and _has_samples(leaf, num_samples)


def with_gradient(output: Any) -> Any:
    """Let the graph of what follows begin at an output."""
    return pytree.tree_map(
        lambda leaf: (
            leaf.detach().requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
        ),
        output,
    )
