"""Means over targets: how losses of parts are put together where targets count differently, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dnb.job import Sum
from dnb.protocol.run import Reduction
from dnb.user_code.return_values import ReturnError

# Autograd's nodes of the negative log likelihood, of which cross_entropy is made, keep the weight that they divide by:
# that of the classes of all targets that are not ignored.
_NODES = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})
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


def weighed_loss(loss: torch.Tensor | Sum, weights: Sequence[float] = ()) -> torch.Tensor | Sum:
    """Make a mean over targets a `Sum`, so that it can be put together with those of other parts.

    Args:
        loss: as it was returned.
        weights: as counted while it was computed, if it has no graph.

    Returns:
        The loss itself, if it is no mean over targets; a `Sum` of no targets has no gradient.
    """
    if isinstance(loss, Sum):
        return loss
    weight = target_weight(loss, weights)
    if weight is None:
        return loss
    if weight == 0:  # the mean of no targets is 0/0, and so is its gradient
        return Sum(torch.zeros_like(loss.detach()), 0.0)
    return Sum(loss * weight, weight)


class LossPart(NamedTuple):
    """The loss of a part of a batch, as it is added to those of other parts."""

    tensor: torch.Tensor  # that backward begins at
    factor: float  # the total is so many times the tensor
    weight: float  # that totals are divided by, once they are added up
    unit: float  # the gradient of the total is divided by it
    is_sum: bool  # whether parts may weigh otherwise than by their samples


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

    Raises:
        ReturnError: parts of it cannot be put together.
    """
    if isinstance(loss, Sum):
        return LossPart(loss.total, 1.0, loss.weight, 1.0, True)
    if reduction == "sum":  # reported as a mean over samples of what a batch of as many such samples comes to
        return LossPart(loss, batch_samples, float(num_samples), batch_samples, False)
    weight = target_weight(loss, weights) if reduction == "targets" else None
    if weight is None:
        return LossPart(loss, num_samples, float(num_samples), batch_samples, False)
    # Where all targets count, the gradients of the parts add up to that of the mean, and nothing is to be divided.
    unit = batch_samples * (1.0 if weight == num_samples or loss.grad_fn is None else num_targets(loss) / num_samples)
    if weight == 0:  # the mean of no targets is 0/0, and so is its gradient
        loss = torch.zeros_like(loss.detach())
    return LossPart(loss, weight, weight, unit, True)


def target_weight(loss: torch.Tensor, weights: Sequence[float] = ()) -> float | None:
    """Find the weight of all targets that a loss is a mean over.

    Args:
        loss: as it was returned.
        weights: as counted while it was computed, if it has no graph.

    Returns:
        None, if it is no mean over targets.

    Raises:
        ReturnError: something else is added to it, so that parts cannot be put together.
    """
    root = loss.grad_fn
    if root is None:
        return _only(weights)
    if root.name() in _NODES:  # nearly always
        is_mean = root._saved_reduction == _IS_MEAN  # type: ignore[attr-defined]
        return float(root._saved_total_weight) if is_mean else None  # type: ignore[attr-defined]
    weight = weight_of(loss)
    if weight is not None:
        _refuse_other_terms(loss, weight)
    return weight


def num_targets(loss: torch.Tensor) -> int:
    """Count the targets that a loss with a graph is a mean over, also those that are ignored."""
    count: int = nodes_of_targets(loss)[0]._saved_target.numel()
    return count


def _refuse_other_terms(loss: torch.Tensor, weight: float) -> None:
    """Refuse a sum of a mean over targets and of a mean over samples, where targets do not count alike.

    Raises:
        ReturnError: there is no weight by which both could be put together.
    """
    nodes = nodes_of_targets(loss)
    if all(node._saved_total_weight == node._saved_target.numel() for node in nodes):
        return
    assert loss.grad_fn is not None
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        if node.name() in _NODES or _is_of_parameters(node) or _is_smoothing(node):
            continue
        following = [each for each, _ in node.next_functions if each is not None]
        if not all(_is_number(each) for each in following):
            raise ReturnError(
                f"the loss adds a mean over targets, of which {weight:g} count here, to another term, and parts of a "
                "batch cannot be put together: return dnb.Sum(total, weight), or (loss of targets alone, metrics)"
            )
        waiting += [each for each in following if each not in seen]
        seen.update(following)


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
        reduction: of the run; nothing is counted unless it is over targets.

    Returns:
        A context of a list that fills with the weights of means over targets.
    """
    if reduction != "targets" or torch.is_grad_enabled():
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
