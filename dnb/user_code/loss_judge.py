"""The rule by which losses of parts of a batch add up: found by computing a few samples, whole and in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from dnb.errors import USER_ERRORS
from dnb.job import Sum
from dnb.protocol.run import Reduction
from dnb.user_code.fixed_chance import WithoutChance, random_states, same_chance
from dnb.user_code.judged_batches import Cut, JudgedBatches, other_outputs, tolerance_of, with_gradient
from dnb.user_code.loss_weights import ignored_by, nodes_of_targets, weighed_loss, weight_of
from dnb.user_code.return_values import number_of, read_loss, weighed

Kind = Reduction | Literal["batch"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The rule by which the losses of parts are put together.

    Args:
        kind: "batch" if the loss looks at all samples of a batch at once; None if nothing could be computed.
        num_samples: that were looked at.
        whole: loss of all of them.
        parts: mean of the losses of their parts, by samples.
        is_of_terms: whether the loss adds means over targets to something else.
    """

    kind: Kind | None
    num_samples: int = 0
    whole: float = math.nan
    parts: float = math.nan
    is_of_terms: bool = False


@dataclass(frozen=True, slots=True)
class _Value:
    number: float
    weight: float | None  # of the user's own `Sum`, or of the targets that it is a mean over
    is_sum: bool = False
    beside: tuple[float, ...] = ()  # of means over targets that something else is added to
    metrics: Mapping[str, _Value] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class _Evidence:
    """Kinds that are still possible."""

    tolerance: float
    kinds: set[Kind] = field(default_factory=lambda: {"samples", "targets", "sum"})
    has_seen: bool = False
    shown: tuple[float, float] | None = None  # whole and parts, where it is no mean over samples

    @property
    def kind(self) -> Kind:
        """The kind that is left; "batch" if none is."""
        order: tuple[Kind, ...] = ("targets", "samples", "sum")
        return next((kind for kind in order if kind in self.kinds), "batch")

    def kind_of_metric(self, *, weighs_itself: bool) -> Kind:
        """Return the same; "samples" if nothing has to be done about it."""
        if "samples" in self.kinds or (weighs_itself and "targets" in self.kinds):
            return "samples"
        return self.kind

    def look(self, whole: _Value, parts: Sequence[_Value | None], sizes: Sequence[int]) -> None:
        """Strike out the kinds by which the parts do not come to the whole."""
        found = [part for part in parts if part is not None]
        largest = max(abs(value.number) for value in [whole, *found])
        if len(found) < len(parts) or largest < 1e-12 or not math.isfinite(whole.number):
            return
        self.has_seen = True
        for kind in list(self.kinds):
            together = _together(kind, whole, found, sizes)
            if together is None or not abs(together - _alone(whole)) <= self.tolerance * largest:
                self.kinds.discard(kind)
                if kind == "samples":
                    self.shown = _alone(whole), math.nan if together is None else together

    def look_at_metric(self, name: str, whole: _Value, parts: Sequence[_Value | None], sizes: Sequence[int]) -> None:
        """Do the same with a metric, if it is there everywhere, and something counts everywhere."""
        own, found = whole.metrics.get(name), [None if part is None else part.metrics.get(name) for part in parts]
        if own is not None and not any(part is not None and part.weight == 0 for part in found):
            self.look(own, found, sizes)


@dataclass(frozen=True, slots=True)
class _Findings:
    """Evidence on a loss, and on the metrics that are computed with it."""

    loss: _Evidence
    metrics: Mapping[str, _Evidence]

    @property
    def is_in_doubt(self) -> bool:
        """A loss or a metric that is put together by no rule."""
        return not all(each.kinds for each in (self.loss, *self.metrics.values()))

    def look(self, whole: _Value, parts: Sequence[_Value | None], sizes: Sequence[int]) -> None:
        """Look at a batch and its parts."""
        self.loss.look(whole, parts, sizes)
        for name, evidence in self.metrics.items():
            evidence.look_at_metric(name, whole, parts, sizes)


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
) -> Verdict:
    """Compute the loss of a batch and of parts of it.

    Args:
        compute: loss of a batch, with its graph.
        batch: with the samples on the first axis of what depends on them.
        num_samples: there; of one alone nothing can be seen.
        vary: makes other batches of it, beside those in which targets do not count, if losses are cheap to compute.
        fetch: samples, from one to another, as a batch of their own, if it is nothing that can be cut.
    """
    batches = JudgedBatches(batch, num_samples=num_samples, vary=vary, fetch=fetch)
    return _judge(lambda batch: (compute(batch), {}), batches)[0]


def judge_step(
    compute: Callable[[Any], tuple[Any, Mapping[str, Any]]],
    batch: Any,
    *,
    num_samples: int,
    fetch: Callable[[int, int], Any] | None = None,
    leaves_out: Callable[[Any], bool] = lambda _loss: True,
    refuses_unlike: bool = False,
) -> tuple[Verdict, dict[str, Kind]]:
    """Compute the loss and the metrics of a batch and of parts of it.

    Args:
        compute: loss of a batch, with its graph, and metrics of it by name.
        batch: with the samples on the first axis of what depends on them.
        num_samples: there; of one alone nothing can be seen.
        fetch: samples, from one to another, as a batch of their own, if it is nothing that can be cut.
        leaves_out: tells of the batch's loss whether targets may come that do not count, though none is so here.
        refuses_unlike: whether a step is refused in which terms of the loss weigh differently in its parts, so that it
            need not be thought of, though the batch itself must have none.

    Returns:
        The rule for losses, and those for the metrics of which anything could be seen: "samples" also if they bring
        weights of their own; "targets" by those of the loss; "sum" and "batch" by none.
    """
    batches = JudgedBatches(batch, num_samples=num_samples, fetch=fetch, leaves_out=leaves_out)
    return _judge(compute, batches, refuses_unlike=refuses_unlike)


def text_of_step_metrics(kinds: Mapping[str, Kind]) -> str:
    """Name the metrics of a step function that are shown as means though they are none; empty if all may be.

    Args:
        kinds: as `judge_step` has found them.
    """
    names = [name for name, kind in kinds.items() if kind in ("batch", "sum")]
    if not names:
        return ""
    are = "is no mean" if len(names) == 1 else "are no means"
    return (
        f"{', '.join(map(repr, names))} of step {are} over samples: shown is the mean of the parts' values, not that "
        "of the whole batch; return dnb.Sum(total, weight), or give metrics= beside loss=, which are computed of all "
        "samples"
    )


def _judge(
    compute: Callable[[Any], tuple[Any, Mapping[str, Any]]], batches: JudgedBatches, *, refuses_unlike: bool = False
) -> tuple[Verdict, dict[str, Kind]]:
    if not batches.cuts:
        return Verdict(None), {}
    with same_chance():
        measure = _Measure(compute)
        whole = measure.first(batches.batch)
        if whole is None:
            return Verdict(None, batches.num_samples), {}
        found = _findings_of(measure, whole, batches, refuses_unlike=refuses_unlike)
        if found.is_in_doubt and not measure.is_random:
            # What comes out otherwise every time does not add up either.
            whole = measure.steadied(batches.batch, whole)
            if whole is None:
                return Verdict(None, batches.num_samples), {}
            if measure.is_random:
                found = _findings_of(measure, whole, batches, refuses_unlike=refuses_unlike)
    kinds = {
        name: found.metrics[name].kind_of_metric(weighs_itself=value.is_sum)
        for name, value in whole.metrics.items()
        if found.metrics[name].has_seen
    }
    if not found.loss.has_seen:
        return Verdict(None, batches.num_samples), kinds
    alone = _alone(whole)
    shown = found.loss.shown or (alone, alone)
    return Verdict(found.loss.kind, batches.num_samples, *shown, is_of_terms=bool(whole.beside)), kinds


def _findings_of(measure: _Measure, whole: _Value, batches: JudgedBatches, *, refuses_unlike: bool) -> _Findings:
    """Hold batches, of which the first one's loss is known, against their parts, as long as a rule is possible."""
    tolerance = tolerance_of(batches.batch)
    found = _Findings(_Evidence(tolerance), {name: _Evidence(tolerance) for name in whole.metrics})
    for seen, parts, sizes in _compared(measure, batches.batch, whole, batches, batches.first_cuts):
        found.look(seen, parts, sizes)
    others = batches.others(measure.loss, measure.ignored)
    while found.loss.kinds and (batch := next(others, None)) is not None:
        for seen, parts, sizes in _compared(measure, batch, measure(batch), batches, batches.cuts[:1]):
            if not (refuses_unlike and _are_unlike(parts, sizes)):
                found.look(seen, parts, sizes)
    return found


def _compared(
    measure: _Measure, batch: Any, whole: _Value | None, batches: JudgedBatches, cuts: Sequence[Cut]
) -> Iterator[tuple[_Value, list[_Value | None], list[int]]]:
    """Compute the parts of a batch; a value that is none cannot be held against any."""
    if whole is None or not math.isfinite(whole.number):
        return
    for cut in cuts:
        sizes = [end - begin for begin, end in cut]
        yield whole, [measure(part) for part in batches.parts(batch, cut)], sizes


class _Measure:
    """Computes losses, with the same random numbers every time."""

    def __init__(self, compute: Callable[[Any], tuple[Any, Mapping[str, Any]]]) -> None:
        self._compute = compute
        self.is_random = False  # so that the same random numbers are given to every sample
        self._last: Any = None
        self.loss: Any = None  # of the batch, as it was computed first
        self.ignored: set[int] = set()  # marks of targets that do not count, as the loss itself says

    def first(self, batch: Any) -> _Value | None:
        """Return the loss of a batch; None if it cannot be computed."""
        before = random_states()
        value = self(batch)
        self.loss = self._last
        return value if value is None or random_states() == before else self._without_chance(batch)

    def steadied(self, batch: Any, value: _Value) -> _Value | None:
        """Return a batch's loss without metrics that come out otherwise again; see `_without_chance`."""
        return _stable(value, self(batch)) or self._without_chance(batch)

    def _without_chance(self, batch: Any) -> _Value | None:
        """Return the loss with the same random numbers from here on; None if it is another one every time."""
        self.is_random = True
        value = self(batch)
        return None if value is None else _stable(value, self(batch, seed=1))

    def __call__(self, batch: Any, *, seed: int = 0) -> _Value | None:
        """Return the loss of a batch; None if it cannot be computed."""
        try:
            if self.is_random:
                with same_chance(seed), WithoutChance():
                    value, metrics = self._compute(batch)
            else:
                value, metrics = self._compute(batch)
            loss = self._last = read_loss(value, needs_gradient=False)
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # what cannot be computed says nothing of how it is put together
            return None
        if isinstance(loss, Sum):
            return _Value(loss.total.item(), loss.weight, True, (), _read_metrics(metrics, loss.weight))
        self.ignored |= {ignored_by(node) for node in nodes_of_targets(loss)}
        weight = weight_of(loss)
        beside = weighed_loss(loss)[1]
        found = _read_metrics(metrics, None if beside else weight)
        return _Value(0.0 if weight == 0 else loss.item(), weight, False, beside, found)


def _read_metrics(metrics: Mapping[str, Any], weight: float | None) -> dict[str, _Value]:
    """Read metrics that are numbers, with the weight of the loss, or their own."""
    found: dict[str, _Value] = {}
    for name, value in metrics.items():
        try:
            if isinstance(value, Sum):
                total, own = weighed(value, 1, name=name)
                found[name] = _Value(total, own, is_sum=True)
            else:
                found[name] = _Value(number_of(value, what="metric"), weight)
        except USER_ERRORS:  # its own step will tell
            continue
    return found


def _stable(value: _Value, again: _Value | None) -> _Value | None:
    """Return a value without the metrics that came out otherwise the second time; None if the loss did so."""
    if again is None or not (value == again or math.isnan(value.number)):
        return None
    same = {name: each for name, each in value.metrics.items() if each == again.metrics.get(name)}
    return replace(value, metrics=same)


def _are_unlike(parts: Sequence[_Value | None], sizes: Sequence[int]) -> bool:
    """Tell whether terms of a loss weigh differently in these parts."""
    pairs = zip(parts, sizes, strict=True)
    return len({tuple(each / size for each in part.beside) for part, size in pairs if part is not None}) > 1


def _together(kind: Kind, whole: _Value, parts: Sequence[_Value], sizes: Sequence[int]) -> float | None:
    """Return the loss of parts, put together; None if they do not say what that takes."""
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
