"""The metric "accuracy": the share of samples whose largest output is the target class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dnb.user_code.model_call import named_parts
from dnb.user_code.return_values import ReturnError


def accuracy(output: Any, target: Any) -> torch.Tensor:
    """Return the share of samples whose largest output is the target class.

    Args:
        output: shape (batch, classes, ...); of a model that returns its own loss, what has one row of classes per
            sample, as .logits, ["logits"] or alone beside the loss.
        target: class indices, shape (batch, ...); of a model that returns its own loss, the batch, which has them as
            "labels", "label", "targets", "target" or "y", or as its last element.

    Raises:
        ReturnError: it cannot be told which these are.
    """
    if isinstance(output, torch.Tensor) and output.dim() > 1 and isinstance(target, torch.Tensor):
        return (output.argmax(dim=1) == target).float().mean()
    logits, labels = _logits_of(output), _labels_of(target)
    if logits is None or labels is None or logits.shape[:1] != labels.shape:
        raise ReturnError(
            "accuracy cannot be told, as it is not clear which of what the model returns has a row of classes for each "
            "sample, and what of the batch are their classes: give metrics={'accuracy': callable(output, batch)} that "
            "returns a mean over samples"
        )
    return (logits.argmax(dim=1) == labels).float().mean()


def _logits_of(output: Any) -> torch.Tensor | None:
    """Return the one row of classes per sample in a model's output."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        found = [each for each in output if isinstance(each, torch.Tensor) and each.dim() > 0 and each.numel() > 1]
        output = found[0] if len(found) == 1 else None
    is_one = isinstance(output, torch.Tensor) and output.dim() == 2 and output.is_floating_point()
    return output if is_one else None


def _labels_of(batch: Any) -> torch.Tensor | None:
    """Return the classes in a batch."""
    named = named_parts(batch)
    if named is not None:
        batch = next((named[name] for name in ("labels", "label", "targets", "target", "y") if name in named), None)
    elif isinstance(batch, tuple | list):
        batch = batch[-1] if len(batch) > 1 else None
    is_one = isinstance(batch, torch.Tensor) and batch.dim() == 1 and not batch.is_floating_point()
    return batch if is_one else None
