"""Which samples each shard of a task has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dnb.planning.sample_order import BatchOrder, iterate_batches
from dnb.planning.shards import shard_bounds
from dnb.records import WorkKind


class Batches:
    """The batches of one run, in order; a step that is tried again keeps its own.

    Args:
        order: of the samples.
        num_steps: of the run.
        num_shards: logical shards of every batch.
        num_val_samples: of an evaluation.
        num_done: steps that need no batch any more, as an earlier run has done them.
    """

    def __init__(
        self, order: BatchOrder, *, num_steps: int, num_shards: int, num_val_samples: int, num_done: int = 0
    ) -> None:
        self._batches = islice(iterate_batches(order), num_done, num_steps)
        self._num_shards = num_shards
        self._val_indices: NDArray[np.int64] = np.arange(num_val_samples)
        self._batch: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._batch_step = 0
        self._prepared: NDArray[np.int64] | None = None
        self._bounds: dict[int, list[tuple[int, int]]] = {}

    def samples_of(self, kind: WorkKind, step: int, shards: Sequence[int]) -> tuple[tuple[int, ...], bytes]:
        """How many samples each shard has, and the indices of all, one after the other, as bytes."""
        indices = self._indices(kind, step)
        bounds = self._bounds.get(len(indices))
        if bounds is None:
            bounds = self._bounds[len(indices)] = shard_bounds(len(indices), num_shards=self._num_shards)
        ends = [bounds[shard] for shard in shards]
        sizes = tuple(last - first for first, last in ends)
        if shards[-1] - shards[0] == len(shards) - 1:  # neighbours
            return sizes, indices[ends[0][0] : ends[-1][1]].tobytes()
        return sizes, b"".join(indices[first:last].tobytes() for first, last in ends)

    def num_samples(self, kind: WorkKind, step: int) -> int:
        """Samples of a whole task."""
        return len(self._indices(kind, step))

    def prepare(self) -> None:
        """Draw the next batch, while the engines compute."""
        if self._prepared is None and (batch := next(self._batches, None)) is not None:
            self._prepared = batch.numpy()

    def _indices(self, kind: WorkKind, step: int) -> NDArray[np.int64]:
        if kind == "evaluation":
            return self._val_indices
        if step != self._batch_step:
            self._batch, self._batch_step = self._next(), step
        return self._batch

    def _next(self) -> NDArray[np.int64]:
        if self._prepared is None:
            return next(self._batches).numpy()
        batch, self._prepared = self._prepared, None
        return batch
