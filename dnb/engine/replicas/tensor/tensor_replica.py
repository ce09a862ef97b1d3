"""An engine's part of every divided layer: the counterpart of `Replica` in tensor parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from dnb.engine.replicas.outcome import NO_SUMS, WorkResult, added
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.team_replica import TeamReplica
from dnb.engine.replicas.tensor.divided_layers import TeamGradients, divide
from dnb.engine.replicas.tensor.tensor_random import OwnNoise
from dnb.engine.replicas.whole_metrics import WholeMetrics
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import Sums
from dnb.transport.layout import slot_views
from dnb.user_code.return_values import Metrics, weighed


class TensorReplica(TeamReplica):
    """Computes the whole batch with one part of every divided layer; all engines of the team are given the same work.

    What is not divided is computed by all engines, from the same random numbers. Between a layer that is divided by
    columns and the one by rows behind it, each engine has features of its own, and random numbers of its own: a
    dropout there depends on the number of engines.

    Args:
        context: the run, and the place in the team; its model is bound to the memory, and divided.

    Raises:
        PlanError: this engine does not share the hub's memory.
        PeerLostError: the team does not come together.
    """

    def __init__(self, context: ReplicaContext) -> None:
        job, load, memory, assignment = context.job, context.load, context.memory, context.assignment
        self._entrance: Any = None
        super().__init__(context)
        self._whole_metrics = WholeMetrics(job.metrics, context.spec.whole_metrics)
        self._gradients.close()
        self._had_fast_path = torch.backends.mha.get_fastpath_enabled()
        # Torch's fused encoder layer reads weights past their layers, as if they were whole.
        torch.backends.mha.set_fastpath_enabled(False)
        group = dist.group.WORLD
        assert group is not None
        model = divide(job.model, assignment.partition, group, slot_views(load.parameter_layout, memory.parameters))
        self._entrance = model.entrance
        self._parameters.divided = divided = frozenset(each.name for each in model.parameters)
        self._noise = OwnNoise(job.model, assignment.partition.styles, assignment.rank)
        trained = {slot.name for slot in load.gradient_layout.slots}
        whole = {
            name: parameter
            for name, parameter in self._parameters.named.items()
            if name in trained and name not in divided
        }
        self._gradients: Any = TeamGradients(
            load.gradient_layout,
            whole=whole,
            divided=model.parameters,
            rank=assignment.rank,
            num_engines=assignment.partition.num_engines,
        )
        self._loss.gradients = self._gradients
        self._loss.measure = partial(_measure, self._whole_metrics, self._rank)
        self._buffers.is_writer = self._rank == 0  # they are the same on all engines

    def compute(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """Do this engine's part of what the team is asked.

        Samples, loss and metrics are reported by the first engine of the team. Slots that another engine writes are
        reported as unused. If it raises, this engine has left its group, and the replica can only be closed.

        Raises:
            PeerLostError: another engine of the team failed or died.
        """
        with self._leaving_if_it_fails():
            outcome = super().compute(work, indices)
        # States are the same on all engines: the first one tells of them.
        if self._rank == 0:
            return outcome
        nothing = msgspec.structs.replace(NO_SUMS, unit=outcome.parts[0].unit)
        return WorkResult((nothing,), outcome.is_sum, outcome.unused)

    def diagnose(self, request: Diagnose, indices: torch.Tensor) -> Diagnosis:
        """Compute all shards one by one, as the others do; the first that has a gradient here that is not finite."""
        fault: tuple[int, tuple[str, str]] | None = None
        with self._leaving_if_it_fails():
            self._set_training(mode=True)
            for shard, part in zip(request.shards, indices.split(request.shard_sizes), strict=True):
                self._begin(request.slab, fresh=True)
                self._seed(request.step, shard)
                self._run_pieces(part, batch_samples=request.batch_samples)
                self._gradients.finish()
                found = self._gradients.first_fault()
                if found is not None and fault is None:
                    fault = shard, found
        shard_or_none, (name, kind) = fault or (None, ("", ""))
        return Diagnosis(run=request.run, step=request.step, shard=shard_or_none, parameter=name, kind=kind)

    def close(self) -> None:
        """Leave the group, and let go of the gradients."""
        super().close()
        torch.backends.mha.set_fastpath_enabled(self._had_fast_path)

    def _run_pieces(self, indices: torch.Tensor, *, batch_samples: int) -> tuple[Sums, bool]:
        self._whole_metrics.begin()
        sums, is_sum = super()._run_pieces(indices, batch_samples=batch_samples)
        return added([sums, *self._whole_metrics.take()]), is_sum

    def _evaluate(self, work: Work, indices: torch.Tensor) -> Sums:
        self._whole_metrics.begin()
        return added([super()._evaluate(work, indices), *self._whole_metrics.take()])

    def _forget(self) -> None:
        if self._entrance is not None:
            self._entrance.forget()

    def _seed(self, step: int, shard: int, *, also_python: bool = False) -> None:
        self._noise.forget()
        super()._seed(step, shard, also_python=also_python)


def _measure(whole: WholeMetrics, rank: int, output: Any, compared: Any, num_samples: int) -> Metrics:
    """Compute the metrics of one micro-batch, by the engine that reports them."""
    if rank != 0:
        return {}
    whole.add(output, compared, num_samples)
    return {name: weighed(metric(output, compared), num_samples, name=name) for name, metric in whole.of_parts.items()}
