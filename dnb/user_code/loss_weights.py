"""Means over targets: how losses of parts are put together where targets count differently, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dnb.job import Sum
from dnb.protocol.measurements import Sums
from dnb.protocol.run import Reduction

# Autograd's nodes of the negative log likelihood, of which cross_entropy is made, keep the weight that they divide by:
# that of the classes of all targets that are not ignored.
_NODES = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})
NOTHING_BESIDE: tuple[float, ...] = ()
OVER_TARGETS: tuple[Reduction, ...] = ("targets", "terms")
_IS_MEAN = 1  # at::Reduction::Mean
# Between a loss and the means that it is made of lie a few numbers: factors, and terms that are added.
_MOST_NODES = 64
_NOT_COUNTING: AbstractContextManager[Sequence[float]] = nullcontext(())
_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.nn.functional.cross_entropy,
        torch.nn.functional.nll_loss,
        torch._C._nn.cross_entropy_loss,
        torch._C._nn.nll_loss_nd,
    }
)


def nodes_of_targets(loss: torch.Tensor) -> list[Any]:
    """Find the means over targets that a loss is made of, in its autograd graph.

    Args:
        loss: of one element; nothing is found in one without a graph.

    Returns:
        Autograd nodes, with `_saved_total_weight` and `_saved_ignore_index`.
    """
    root = loss.grad_fn
    if root is None:
        return []
    if root.name() in _NODES:  # nearly always
        return [root] if root._saved_reduction == _IS_MEAN else []  # type: ignore[attr-defined]
    found, waiting, seen = [], [root], {root}
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop()
        if node.name() in _NODES:
            if node._saved_reduction == _IS_MEAN:  # type: ignore[attr-defined]
                found.append(node)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen and _is_number(following):
                seen.add(following)
                waiting.append(following)
    return found


def ignored_by(node: Any) -> int:
    """Return the target that does not count, of a node of `nodes_of_targets`."""
    index: int = node._saved_ignore_index  # a size_t, though it was given as -100
    return index - (1 << 64) if index >= 1 << 63 else index


def _is_number(node: Any) -> bool:
    """Return whether a node takes the gradient of a single number."""
    shapes = [each.shape for each in getattr(node, "_input_metadata", ())]
    return bool(shapes) and all(size == 1 for shape in shapes for size in shape)


def weight_of(loss: torch.Tensor) -> float | None:
    """Return the weight of all targets that a loss is a mean over; None if it is no such mean, or has several."""
    nodes = nodes_of_targets(loss)
    if not nodes:
        return None
    if len(nodes) == 1:
        return float(nodes[0]._saved_total_weight)
    weights = {float(node._saved_total_weight) for node in nodes}
    return _only(weights)


def _only(weights: Collection[float]) -> float | None:
    return next(iter(weights)) if len(set(weights)) == 1 else None


def weighed_loss(
    loss: torch.Tensor | Sum, weights: Sequence[float] = (), *, is_of_terms: bool = False
) -> tuple[torch.Tensor | Sum, tuple[float, ...]]:
    """Make a mean over targets a `Sum`, so that it can be put together with those of other parts.

    Args:
        loss: as it was returned.
        weights: of all means over targets that were computed on the way, if it has no graph.
        is_of_terms: whether these are added to something else, which only a graph tells.

    Returns:
        The loss itself, if it is no mean over targets, or adds such means to other terms; a `Sum` of no targets has no
        gradient. And, of the latter alone, the weight of each such mean: the loss of parts is that of the whole where
        these are in proportion to samples.
    """
    if isinstance(loss, Sum):
        return loss, ()
    weight, beside = target_weight(loss, weights, is_of_terms=is_of_terms)
    if weight is None:
        return loss, beside
    if weight == 0:  # the mean of no targets is 0/0, and so is its gradient
        return Sum(torch.zeros_like(loss.detach()), 0.0), ()
    return Sum(loss * weight, weight), ()


class LossPart(NamedTuple):
    """The loss of a part of a batch, as it is added to those of other parts."""

    tensor: torch.Tensor  # that backward begins at
    factor: float  # the total is so many times the tensor
    weight: float  # that totals are divided by, once they are added up
    unit: float  # the gradient of the total is divided by it
    is_sum: bool  # whether parts may weigh otherwise than by their samples
    beside: tuple[float, ...] = ()  # weights of means over targets that something else is added to


def part_of(
    loss: torch.Tensor | Sum,
    *,
    reduction: Reduction,
    weights: Sequence[float],
    num_samples: int,
    batch_samples: int,
) -> LossPart:
    """Tell how a loss is added to those of other parts of a batch.

    Args:
        loss: as it was returned.
        reduction: of the run.
        weights: as counted while it was computed, if it has no graph.
        num_samples: of the part.
        batch_samples: of the batch.
    """
    if isinstance(loss, Sum):
        return LossPart(loss.total, 1.0, loss.weight, 1.0, True)
    if reduction == "sum":  # reported as a mean over samples of what a batch of as many such samples comes to
        return LossPart(loss, batch_samples, float(num_samples), batch_samples, False)
    weight, beside = None, NOTHING_BESIDE
    if reduction in OVER_TARGETS:
        weight, beside = target_weight(loss, weights, is_of_terms=reduction == "terms")
    if weight is None:
        return LossPart(loss, num_samples, float(num_samples), batch_samples, False, beside)
    # Where all targets count, the gradients of the parts add up to that of the mean, and nothing is to be divided.
    unit = batch_samples * (1.0 if weight == num_samples or loss.grad_fn is None else num_targets(loss) / num_samples)
    if weight == 0:  # the mean of no targets is 0/0, and so is its gradient
        loss = torch.zeros_like(loss.detach())
    return LossPart(loss, weight, weight, unit, True)


def target_weight(
    loss: torch.Tensor, weights: Sequence[float] = (), *, is_of_terms: bool = False
) -> tuple[float | None, tuple[float, ...]]:
    """Find the weight of all targets that a loss is a mean over.

    Args:
        loss: as it was returned.
        weights: of all means over targets that were computed on the way, if it has no graph.
        is_of_terms: whether these are added to something else, which only a graph tells.

    Returns:
        None, if it is no mean over targets, or more than one; of these, and of those to which something else is added,
        the weights. The loss of parts is that of the whole where they are in proportion to samples.
    """
    root = loss.grad_fn
    if root is not None:
        if root.name() in _NODES:  # nearly always
            is_mean = root._saved_reduction == _IS_MEAN  # type: ignore[attr-defined]
            return float(root._saved_total_weight) if is_mean else None, NOTHING_BESIDE  # type: ignore[attr-defined]
        weights = [float(node._saved_total_weight) for node in nodes_of_targets(loss)]
        is_of_terms = bool(weights) and _has_other_terms(root)
    if not weights:
        return None, NOTHING_BESIDE
    if is_of_terms or any(other != weights[0] for other in weights):
        return None, tuple(weights)
    return weights[0], NOTHING_BESIDE


def num_targets(loss: torch.Tensor) -> int:
    """Count the targets that a loss with a graph is a mean over, also those that are ignored."""
    count: int = nodes_of_targets(loss)[0]._saved_target.numel()
    return count


def _has_other_terms(root: Any) -> bool:
    """Tell whether a loss is made of more than means over targets and what is the same for every part."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        if node.name() in _NODES or _is_of_parameters(node) or _is_smoothing(node):
            continue
        following = [each for each, _ in node.next_functions if each is not None]
        if not all(_is_number(each) for each in following):
            return True
        waiting += [each for each in following if each not in seen]
        seen.update(following)
    return False


def fault_of_terms(named: Iterable[tuple[str, Sums]]) -> str:
    """Tell why losses that add means over targets to other terms cannot be put together; empty if they can.

    Args:
        named: parts of one batch, and where each was computed.
    """
    parts = [(place, part) for place, part in named if part.num_samples]
    if not any(part.targets_per_sample for _, part in parts):
        return ""
    found: dict[str, str] = {}
    for place, part in parts:
        shown = " and ".join(f"{each:.6g}" for each in part.targets_per_sample)
        found.setdefault(shown, f"{shown} for each of {part.num_samples} samples{place}")
    if len(found) < 2:
        return ""
    figures = [text for shown, text in found.items() if shown][:2]
    return (
        "the loss adds a mean over targets to another term, and parts in which not as many targets count for each "
        f"sample cannot be put together ({', and '.join(figures)}): return dnb.Sum(total, weight), or (loss of targets "
        "alone, metrics)"
    )


def _is_of_parameters(node: Any) -> bool:
    """Tell whether a number is a norm of a parameter, or the like: the same for every part of a batch."""
    if node.name().startswith(("Sum", "Mean", "LinalgVectorNorm", "Norm")):
        node = _only_following(node)
        while node is not None and node.name().startswith(("Pow", "Abs")):
            node = _only_following(node)
    return node is not None and node.name().endswith("AccumulateGrad")


def _is_smoothing(node: Any) -> bool:
    """Tell whether a number is cross_entropy's own second term, of smoothed labels: a mean over the same targets."""
    for name in ("Div", "Sum", "MaskedFill", "Neg"):
        if node is None or not node.name().startswith(name):
            return False
        node = _only_following(node)
    return True


def _only_following(node: Any) -> Any | None:
    following = [each for each, _ in node.next_functions if each is not None]
    return following[0] if len(following) == 1 else None


def nothing_of(output: Any) -> torch.Tensor:
    """Make a 0 of an output, from which gradients of 0 go back through it."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return torch.stack([leaf.sum() * 0.0 for leaf in leaves]).sum()


def counting_targets(reduction: Reduction) -> AbstractContextManager[Sequence[float]]:
    """Note how much the targets weigh in whatever is computed without gradients.

    Args:
        reduction: of the run; nothing is counted unless something is over targets.

    Returns:
        A context of a list that fills with the weights of means over targets.
    """
    if reduction not in OVER_TARGETS or torch.is_grad_enabled():
        return _NOT_COUNTING
    return _counting()


@contextmanager
def _counting() -> Iterator[list[float]]:
    weights: list[float] = []
    with _Counting(weights):
        yield weights


class _Counting(TorchFunctionMode):
    """Reads weights from losses of targets, of which a graph is made for the moment."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FUNCTIONS:
            return func(*args, **kwargs)
        with torch.enable_grad():
            value = func(*map(_with_gradient, args[:1]), *args[1:], **_with_gradients(kwargs))
        if value.numel() == 1 and value.grad_fn is not None and (weight := weight_of(value)) is not None:
            self._weights.append(weight)
        return value.detach()


def _with_gradients(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: _with_gradient(arg) if name in ("input", "self") else arg for name, arg in kwargs.items()}


def _with_gradient(value: Any) -> Any:
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_floating else value
