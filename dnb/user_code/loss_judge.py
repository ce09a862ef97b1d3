"""The rule by which losses of parts of a batch add up: found by computing a few samples, whole and in parts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dnb.errors import USER_ERRORS
from dnb.job import Sum
from dnb.protocol.run import Reduction
from dnb.user_code.loss_weights import ignored_by, nodes_of_targets, weight_of
from dnb.user_code.return_values import read_loss

Kind = Reduction | Literal["batch"]
Take = Callable[[Any, int, int], Any]  # samples of a batch, from one to another

# Relative: the rounding of a sum of some samples in float32, which losses of float64 may use inside, and in 16 bits.
_TOLERANCE = 2e-5
_COARSE = 2e-2
_HALVES = (torch.float16, torch.bfloat16)
# Of outputs with more elements only what was computed is looked at, and the same with targets that are ignored.
_MANY_ELEMENTS = 1 << 20
# Values by which targets say that they do not count, if the loss does not tell its own.
_MARKS = (-100, -1, 0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The rule by which the losses of parts are put together.

    Args:
        kind: "batch" if the loss looks at all samples of a batch at once; None if nothing could be computed.
        num_samples: that were looked at.
        whole: loss of all of them.
        parts: mean of the losses of their parts, by samples.
    """

    kind: Kind | None
    num_samples: int = 0
    whole: float = math.nan
    parts: float = math.nan


@dataclass(frozen=True, slots=True)
class _Value:
    number: float
    weight: float | None  # of the user's own `Sum`, or of the targets that it is a mean over
    is_sum: bool = False


@dataclass(slots=True)
class _Evidence:
    """Kinds that are still possible."""

    kinds: set[Kind]
    tolerance: float
    has_seen: bool = False
    shown: tuple[float, float] | None = None  # whole and parts, where it is no mean over samples


def judge_loss(loss: Callable[..., Any], output: Any, target: Any, *, num_samples: int) -> Verdict:
    """Compute a loss of some samples, and of parts of them; also with other outputs and targets that do not count.

    Args:
        loss: callable(output, target); what it draws at random is as if it drew always the same.
        output: of a model, with the samples on the first axis of what depends on them.
        target: likewise.
        num_samples: there; of one alone nothing can be seen.
    """

    def compute(pair: tuple[Any, Any]) -> Any:
        with torch.enable_grad():
            return loss(with_gradient(pair[0]), pair[1])

    return judge(compute, (output, target), num_samples=num_samples, vary=other_outputs)


def judge(
    compute: Callable[[Any], Any],
    batch: Any,
    *,
    num_samples: int,
    vary: Callable[[Any, int], Iterator[Any]] | None = None,
    fetch: Callable[[int, int], Any] | None = None,
    leaves_out: Callable[[Any], bool] = lambda _loss: True,
) -> Verdict:
    """Compute the loss of a batch and of parts of it.

    Args:
        compute: loss of a batch, with its graph.
        batch: with the samples on the first axis of what depends on them.
        num_samples: there; of one alone nothing can be seen.
        vary: makes other batches of it, beside those in which targets do not count, if losses are cheap to compute.
        fetch: samples, from one to another, as a batch of their own, if it is nothing that can be cut.
        leaves_out: tells of the batch's loss whether targets may come that do not count, though none is so here.
    """
    cuts = _cuts(num_samples)
    if not cuts:
        return Verdict(None)
    with _same_chance():
        measure = _Measure(compute)
        whole = measure.first(batch)
        if whole is None:
            return Verdict(None, num_samples)
        is_dear = vary is None or _num_elements(batch) > _MANY_ELEMENTS
        take = _taker(batch, num_samples, fetch)

        def variants() -> Iterator[Any]:
            yield batch
            marks = list(measure.ignored) if is_dear and measure.ignored else [*_MARKS, *measure.ignored]
            if leaves_out(measure.loss):
                yield from _without_some_targets(batch, num_samples, marks)
            if vary is not None and not is_dear:
                yield from vary(batch, num_samples)

        first_cuts = cuts[: 1 if _num_elements(batch) > _MANY_ELEMENTS else None]  # of what was computed, and is cheap
        evidence = _evidence_of(measure, whole, variants(), first_cuts, take)
        # What comes out otherwise every time does not add up either.
        if not evidence.kinds and not measure.is_steady(batch, whole):
            whole = measure.without_chance(batch)
            if whole is None:
                return Verdict(None, num_samples)
            evidence = _evidence_of(measure, whole, variants(), first_cuts, take)
    if not evidence.has_seen:
        return Verdict(None, num_samples)
    kind = next((kind for kind in ("targets", "samples", "sum") if kind in evidence.kinds), "batch")
    alone = _alone(whole)
    return Verdict(kind, num_samples, *(evidence.shown or (alone, alone)))  # type: ignore[arg-type]


class _Measure:
    """Computes losses, with the same random numbers every time."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self._compute = compute
        self._is_random = False
        self._last: Any = None
        self.loss: Any = None  # of the batch, as it was computed first
        self.ignored: set[int] = set()  # marks of targets that do not count, as the loss itself says

    def first(self, batch: Any) -> _Value | None:
        """Compute the loss of a batch for the first time; None if that cannot be done."""
        before = _states()
        value = self(batch)
        self.loss = self._last
        return value if value is None or _states() == before else self.without_chance(batch)

    def is_steady(self, batch: Any, value: _Value) -> bool:
        """Return whether the loss of a batch comes out the same again."""
        return self._is_random or _is_same(value, self(batch))

    def without_chance(self, batch: Any) -> _Value | None:
        """Compute a batch's loss with the same random numbers from here on; None if it is another one every time."""
        self._is_random = True
        value = self(batch)
        return value if value is not None and _is_same(value, self(batch, seed=1)) else None

    def __call__(self, batch: Any, *, seed: int = 0) -> _Value | None:
        """Compute the loss of a batch; None if that cannot be done."""
        try:
            if self._is_random:
                with _same_chance(seed), _WithoutChance():
                    value = self._compute(batch)
            else:
                value = self._compute(batch)
            loss = self._last = read_loss(value, needs_gradient=False)
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # what cannot be computed says nothing of how it is put together
            return None
        if isinstance(loss, Sum):
            return _Value(loss.total.item(), loss.weight, is_sum=True)
        self.ignored |= {ignored_by(node) for node in nodes_of_targets(loss)}
        weight = weight_of(loss)
        return _Value(0.0 if weight == 0 else loss.item(), weight)


def _is_same(value: _Value, other: _Value | None) -> bool:
    return other is not None and (value == other or math.isnan(value.number))


def _evidence_of(
    measure: _Measure, whole: _Value, batches: Iterator[Any], cuts: Sequence[Sequence[tuple[int, int]]], take: Take
) -> _Evidence:
    """Look at batches, of which the first one's loss is known and all cuts are looked at."""
    first = next(batches)
    evidence = _Evidence({"samples", "targets", "sum"}, tolerance=_tolerance(first))
    _look(measure, first, whole, cuts, take, evidence)
    while evidence.kinds and (batch := next(batches, None)) is not None:
        _look(measure, batch, measure(batch), cuts[:1], take, evidence)
    return evidence


def _look(
    measure: _Measure,
    batch: Any,
    whole: _Value | None,
    cuts: Sequence[Sequence[tuple[int, int]]],
    take: Take,
    evidence: _Evidence,
) -> None:
    """Strike out the kinds by which the parts do not come to the whole."""
    if whole is None or not math.isfinite(whole.number):
        return
    for cut in cuts:
        sizes = [end - begin for begin, end in cut]
        found = [measure(take(batch, begin, end)) for begin, end in cut]
        parts = [part for part in found if part is not None]
        largest = max(abs(value.number) for value in [whole, *parts])
        if len(parts) < len(cut) or largest < 1e-12:
            continue
        evidence.has_seen = True
        for kind in list(evidence.kinds):
            together = _together(kind, whole, parts, sizes)
            if together is None or not abs(together - _alone(whole)) <= evidence.tolerance * largest:
                evidence.kinds.discard(kind)
                if kind == "samples":
                    evidence.shown = _alone(whole), math.nan if together is None else together


def _together(kind: Kind, whole: _Value, parts: Sequence[_Value], sizes: Sequence[int]) -> float | None:
    """Put the losses of parts together; None if they do not say what that takes."""
    values = [whole, *parts]
    if any(value.is_sum for value in values):
        weights = [part.weight or 0.0 for part in parts]
        if kind == "sum" or not all(value.is_sum for value in values) or not sum(weights):
            return None
        return sum(part.number for part in parts) / sum(weights)
    if kind == "sum":
        return sum(part.number for part in parts)
    if kind == "samples":
        if any(part.weight == 0 for part in parts):
            return None  # 0/0
        return sum(part.number * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
    if any(value.weight is None for value in values):
        return None
    total = sum(part.weight or 0.0 for part in parts)
    return sum(part.number * (part.weight or 0.0) for part in parts) / total if total else None


def _alone(value: _Value) -> float:
    if not value.is_sum:
        return value.number
    return value.number / value.weight if value.weight else math.nan


# Batches --------------------------------------------------------------------------------------------


def _cuts(num_samples: int) -> list[list[tuple[int, int]]]:
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
    """Take samples of everything that has as many, be it a tensor or a list; or else fetch them."""

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
    return sum(leaf.numel() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def _tolerance(batch: Any) -> float:
    leaves = pytree.tree_leaves(batch)
    return _COARSE if any(getattr(leaf, "dtype", None) in _HALVES for leaf in leaves) else _TOLERANCE


def other_outputs(pair: tuple[Any, Any], num_samples: int) -> Iterator[tuple[Any, Any]]:
    """Yield outputs mixed among the samples, so that they stay what the loss takes, and outputs at random."""
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
    """Yield batches in which targets do not count: all of one sample, and half of another, by each mark."""
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


# Chance ---------------------------------------------------------------------------------------------


@contextmanager
def _same_chance(seed: int = 0) -> Iterator[None]:
    """Let random numbers be the same every time, and the user's own be as they were afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _states() -> tuple[Any, ...]:
    """Return the states of all generators of random numbers."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, bytes(keys), rest, bytes(torch.default_generator.get_state().numpy())  # type: ignore[arg-type]


class _WithoutChance(TorchFunctionMode):
    """Lets torch's random numbers be the same for every sample, so that parts have those of the whole."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = torch.default_generator.get_state()
        result = func(*args, **kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator) or not torch.equal(
            before, torch.default_generator.get_state()
        ):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    _make_even(func, leaf.detach())
        return result


def _make_even(func: Callable[..., Any], drawn: torch.Tensor) -> None:
    if func is torch.randperm:
        drawn.copy_(torch.arange(len(drawn)))
    else:
        drawn.fill_(0.5 if drawn.is_floating_point() else 0)
