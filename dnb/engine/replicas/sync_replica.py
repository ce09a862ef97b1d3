"""An engine's part of a batch whose statistics are taken over all engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dnb.engine.replicas.outcome import WorkResult, pieces_of
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.sync_batch_norm import SharedBatch, normalizing_layers, synchronize
from dnb.engine.replicas.team_replica import TeamReplica
from dnb.planning.shards import SAMPLES_AT_LEAST, split_evenly
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import Sums


class SyncReplica(TeamReplica):
    """Computes its part of the batch that all engines of the team are given, in step with them.

    All of them go through as many micro-batches, and wait for each other at every normalizing layer. A batch that is
    too short to be shared is computed by the first engine alone.
    """

    def __init__(self, context: ReplicaContext) -> None:
        super().__init__(context)
        self._exchange = SharedBatch()
        layers = [module for _, module in normalizing_layers(self._job.model, all_of_them=self._spec.sync_batchnorm)]
        synchronize(layers, self._exchange)
        # In evaluation such a layer takes the statistics of what it is given.
        self._is_one_to_evaluate = any(layer.running_mean is None for layer in layers)
        self._num_pieces: int | None = None

    def compute(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """Do this engine's part of what the team is asked; its gradients are then in a slab of its own.

        If it raises, this engine has left its group, and the replica can only be closed.

        Raises:
            PeerLostError: another engine of the team failed or died.
        """
        with self._leaving_if_it_fails():
            is_alone = work.kind == "evaluation" and self._is_one_to_evaluate
            return super().compute(work, self._own_part(indices, is_alone=is_alone))

    def diagnose(self, request: Diagnose, indices: torch.Tensor) -> Diagnosis:  # noqa: ARG002
        """Return no fault: a shard has no gradient of its own."""
        return Diagnosis(run=request.run, step=request.step, shard=None, parameter="", kind="")

    def _own_part(self, indices: torch.Tensor, *, is_alone: bool) -> torch.Tensor:
        bounds = split_evenly(len(indices), num_parts=self._num_engines)
        sizes = [last - first for first, last in bounds]
        self._exchange.is_on = not is_alone and min(sizes) >= SAMPLES_AT_LEAST
        if not self._exchange.is_on:
            self._num_pieces = None
            return indices if self._rank == 0 else indices[:0]
        most = self._most_at_once
        self._num_pieces = 1 if most is None else min(-(-max(sizes) // most), min(sizes))
        first, last = bounds[self._rank]
        return indices[first:last]

    def _pieces(self, indices: torch.Tensor) -> Sequence[torch.Tensor]:
        if self._num_pieces is None:
            return pieces_of(indices, self._most_at_once)
        return indices.tensor_split(self._num_pieces)

    def _seed(self, step: int, shard: int, *, also_python: bool = False) -> None:
        super()._seed(step, shard * self._num_engines + self._rank, also_python=also_python)

    def _collect_states(self, step: int, shards: Sequence[int], batch_samples: int) -> None:
        if self._rank == 0:  # which has the first samples
            super()._collect_states(step, shards, batch_samples)

    def _judge_step(self, work: Work, indices: torch.Tensor) -> None:
        is_on, self._exchange.is_on = self._exchange.is_on, False  # engines need not compute as often as each other
        try:
            super()._judge_step(work, indices)
        finally:
            self._exchange.is_on = is_on

    def _evaluate(self, work: Work, indices: torch.Tensor) -> Sums:
        self._exchange.is_on = False
        return super()._evaluate(work, indices)
