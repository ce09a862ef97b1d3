"""A loss over the whole batch at the end of a pipeline: computed once all micro-batches are through forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dnb.engine.replicas.whole_batch.output_form import check_constant, form_of, tensors_in, tree_of
from dnb.user_code.return_values import Metrics


class WholeLoss:
    """Outputs of the micro-batches of one step, and from the first backward on the loss of all of them.

    The schedule must compute all forwards before the first backward.

    Args:
        compute: loss and metrics of output and target of the whole batch.
        micro_samples: of each micro-batch.
    """

    def __init__(self, compute: Callable[[Any, Any, int], tuple[torch.Tensor, Metrics]], *, micro_samples: int) -> None:
        self._compute = compute
        self._micro_samples = micro_samples
        self._pairs: list[tuple[Any, Any]] = []
        self._gradients: list[list[torch.Tensor | None]] = []
        self.loss = 0.0
        self.metrics: Metrics = {}

    @property
    def num_samples(self) -> int:
        """The samples of all micro-batches that have come."""
        return len(self._pairs) * self._micro_samples

    def add(self, output: Any, target: Any) -> torch.Tensor:
        """Take the output of the next micro-batch; one number, from which its backward begins."""
        outputs = tensors_in(output)
        number = len(self._pairs)
        self._pairs.append((pytree.tree_map(detached, output), target))
        if not torch.is_grad_enabled():
            return torch.zeros(1)
        start: torch.Tensor = _Start.apply(self, number, *outputs)  # type: ignore[no-untyped-call]
        return start

    def settle(self, *, needs_gradient: bool) -> None:
        """Compute loss and metrics, and the gradient by all outputs."""
        forms = [form_of(*pair) for pair in self._pairs]
        num_outputs = forms[0].num_outputs
        parts = [tensors_in(pair) for pair in self._pairs]
        columns = [*zip(*parts, strict=True)]
        has_rows = [self._has_rows(column, is_output=index < num_outputs) for index, column in enumerate(columns)]
        for column, rows in zip(columns, has_rows, strict=True):
            for part in column[1:] if not rows else ():
                check_constant(part, column[0])
        whole = [torch.cat(column) if rows else column[0] for column, rows in zip(columns, has_rows, strict=True)]
        self._pairs = [(None, None)] * len(self._pairs)
        roots = [t.detach().requires_grad_(needs_gradient and t.is_floating_point()) for t in whole[:num_outputs]]
        with torch.set_grad_enabled(needs_gradient):
            used = [root.clone() for root in roots]  # a loss may change what it is given
            output, target = tree_of(forms[0], [*used, *whole[num_outputs:]])
            loss, self.metrics = self._compute(output, target, self.num_samples)
            self.loss = loss.item()
            if not needs_gradient:
                return
            sources = [root for root in roots if root.requires_grad]
            found = iter(torch.autograd.grad(loss, sources, allow_unused=True))
        by_root = [next(found) if root.requires_grad else None for root in roots]
        self._gradients = [
            [
                None
                if gradient is None or not (rows or number == 0)
                else self._part(gradient, number)
                if rows
                else gradient
                for gradient, rows in zip(by_root, has_rows[:num_outputs], strict=True)
            ]
            for number in range(len(self._pairs))
        ]

    def gradients_of(self, number: int) -> list[torch.Tensor | None]:
        """Return the gradient of the loss by the outputs of one micro-batch."""
        if not self._gradients:
            self.settle(needs_gradient=True)
        return self._gradients[number]

    def _part(self, gradient: torch.Tensor, number: int) -> torch.Tensor:
        return gradient[number * self._micro_samples :][: self._micro_samples]

    def _has_rows(self, column: Sequence[torch.Tensor], *, is_output: bool) -> bool:
        """Return True if there is a row for each sample.

        What is as long by chance, such as prototypes of classes, is the same in all micro-batches, and its rows differ.
        """
        first = column[0]
        if len(column) == 1 or any(part.dim() == 0 or len(part) != self._micro_samples for part in column):
            return False
        are_same = is_output and self._micro_samples > 1 and all(torch.equal(first, part) for part in column[1:])
        return not are_same or all(torch.equal(first[0], row) for row in first[1:])


class _Start(torch.autograd.Function):
    """The beginning of a micro-batch's backward, which gives the gradient of the loss of the whole batch."""

    @staticmethod
    def forward(ctx: Any, whole: WholeLoss, number: int, *_outputs: torch.Tensor) -> torch.Tensor:
        ctx.whole, ctx.number = whole, number
        return torch.zeros(1)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return (None, None, *ctx.whole.gradients_of(ctx.number))


def detached(leaf: Any) -> Any:
    """Return a tensor without its graph, and anything else as it is."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
