"""From the samples of a step to the micro-batches that go through a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dnb.errors import PlanError
from dnb.job import DataSource, Job
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.user_code.loader import fetch_batch
from dnb.user_code.model_call import plain_batch
from dnb.user_code.return_values import own_loss


def model_inputs(job: Job, batch: Any) -> Inputs:
    """Return the model's inputs in a batch where it is divided or weighed, so that tensors must be told from the rest.

    Raises:
        PlanError: it gets the batch whole, and that is an object of the user's own.
    """
    found = Inputs.of(plain_batch(batch), find_loss=own_loss if job.loss is None else None, model=job.model)
    for value in found.positional:
        if plain_batch(value) is not value or isinstance(value, dict):
            raise PlanError(
                f"the model gets its batch whole, as a {type(batch).__name__}, in which a pipeline cannot see the "
                "tensors: let forward take its parts by name, or strategy='data'"
            )
    return found


def fetch_micro_batches(source: DataSource, indices: torch.Tensor, number: int) -> Sequence[Any]:
    """Fetch the batch of these samples in equal parts, all of one shape.

    Args:
        source: its collate function sees the whole batch, as in one process, unless its samples are then not on the
            first axis.
        indices: int64, shape (batch,); `number` divides them.
        number: of micro-batches.

    Raises:
        PlanError: the parts differ in shape.
    """
    pieces = _cut(plain_batch(fetch_batch(source, indices)), len(indices), number)
    if pieces is not None:
        return pieces
    found = [plain_batch(fetch_batch(source, part)) for part in indices.split(len(indices) // number)]
    if len({shapes_of(piece) for piece in found}) > 1:
        raise PlanError(
            "the micro-batches of one step differ in shape, which a pipeline cannot have: let collate_fn put the "
            "samples on the first axis, so that a whole batch can be cut"
        )
    return found


def shapes_of(batch: Any) -> tuple[Any, ...]:
    """Return the shapes that stages are built for."""
    leaves = pytree.tree_leaves(batch)
    return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves)


def _cut(batch: Any, num_samples: int, number: int) -> list[Any] | None:
    """Cut a batch into micro-batches; None if its samples are not on the first axis of everything in it."""
    if number == 1:
        return [batch]
    leaves, spec = pytree.tree_flatten(batch)
    if any(not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or len(leaf) != num_samples for leaf in leaves):
        return None
    cut = [leaf.split(num_samples // number) for leaf in leaves]
    return [pytree.tree_unflatten([pieces[index] for pieces in cut], spec) for index in range(number)]
