"""A batch whose outputs were gathered from all engines, with the loss of the whole and its gradient by the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dnb.engine.replicas.outcome import mean_sums
from dnb.engine.replicas.whole_batch.output_form import read_leaf
from dnb.protocol.engine_messages import Gathered
from dnb.protocol.measurements import Sums
from dnb.protocol.memory import LEAF_ALIGNMENT
from dnb.user_code.return_values import Metrics


@dataclass(frozen=True, slots=True)
class GatheredBatch:
    """Outputs and loss of a whole batch."""

    gathered: Gathered
    indices: torch.Tensor  # of the whole batch
    edges: tuple[int, ...]  # where its shards begin
    outputs: Sequence[torch.Tensor]
    loss: float
    gradients: Sequence[torch.Tensor | None]  # of the loss by each tensor of the output
    metrics: Metrics  # of the whole batch

    @property
    def first(self) -> int:
        """The first shard that has samples: what has no rows gets its gradient there."""
        return next(shard for shard, size in enumerate(self.gathered.shard_sizes) if size)

    def positions(self, shards: Sequence[int]) -> torch.Tensor:
        """Return the places of these shards' samples in the batch."""
        parts = [torch.arange(self.edges[shard], self.edges[shard + 1]) for shard in shards]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def sums_of(self, shards: Sequence[int]) -> Sums:
        """Weigh the loss by the samples of these shards, so that the mean of all is the loss of the whole batch."""
        num_samples = sum(self.gathered.shard_sizes[shard] for shard in shards)
        metrics = self.metrics if self.first in shards else {}
        return mean_sums(self.loss, metrics, num_samples=num_samples)


def unpack_batch(
    packed: memoryview, gathered: Gathered, *, num_samples: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the indices of a batch, and the tensors of its outputs and targets.

    Args:
        packed: as the hub has sent them.
        gathered: describes the tensors.
        num_samples: of the batch.
    """
    memory = bytearray(packed)
    indices = torch.frombuffer(memory, dtype=torch.int64, count=num_samples)
    tensors: list[torch.Tensor] = []
    offset = 8 * num_samples
    for leaf in gathered.leaves:
        offset += -offset % LEAF_ALIGNMENT
        tensor = read_leaf(leaf, memory, offset)
        offset += tensor.nbytes
        tensors.append(tensor)
    return indices, tensors
