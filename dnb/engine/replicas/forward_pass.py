"""The way of micro-batches through a whole model: samples, forward, loss and metrics, backward."""

from __future__ import annotations

import torch

from dnb.engine.replicas.model_loss import ModelLoss
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.runtime.scaled_backward import ScaledBackward
from dnb.job import DataSource
from dnb.protocol.measurements import Sums
from dnb.user_code.loader import fetch_batch
from dnb.user_code.loss_weights import OVER_TARGETS, counting_targets, part_of, weighed_loss


class ForwardPass:
    """Computes micro-batches of one run, and counts the time that they take.

    Args:
        context: the run.
        loss: of its model.
        backward: into slabs.
    """

    def __init__(self, context: ReplicaContext, loss: ModelLoss, backward: ScaledBackward) -> None:
        self._spec = context.spec
        self._val = context.data.val
        self._stopwatch = context.stopwatch
        self._loss = loss
        self._backward = backward

    def run(
        self, source: DataSource, indices: torch.Tensor, *, batch_samples: int | None, needs_gradient: bool
    ) -> tuple[Sums, bool]:
        """Compute loss and metrics of one micro-batch, with backward if it is part of a global batch.

        Args:
            source: of the samples.
            indices: of the samples.
            batch_samples: of the global batch; None: of none.
            needs_gradient: somebody goes back from the loss.

        Returns:
            The sums, and whether the loss is a `Sum`.
        """
        with self._stopwatch.measure("data"):
            batch = fetch_batch(source, indices)
        num_samples = indices.numel()
        with self._stopwatch.measure("compute"):
            job, step, reduction = self._loss.job, self._loss.job.step, self._loss.reduction
            if job.val_step is not None and source is self._val:
                step, reduction = job.val_step, self._spec.val_reduction
            with self._loss.autocast(), counting_targets(reduction) as weights:
                loss, metrics = self._loss.compute(step, batch, num_samples, needs_gradient=needs_gradient)
            if self._spec.exact and reduction in OVER_TARGETS:  # its bits are those of totals: a product shows in them
                loss, _ = weighed_loss(loss, weights, is_of_terms=reduction == "terms")
            part = part_of(
                loss,
                reduction=reduction,
                weights=weights,
                num_samples=num_samples,
                batch_samples=batch_samples or self._spec.batch_size,
            )
            unit = part.unit if batch_samples is None else self._backward.run(part)
            if part.beside and batch_samples is not None:
                self._loss.reduction = "terms"  # evaluations have no graph that tells
            if part.is_sum and self._loss.target_metrics:
                self._loss.weigh_metrics(metrics, num_samples, part.weight, is_evaluation=step is not job.step)
            value = part.tensor.item()
        sums = Sums(
            loss_total=value * part.factor,
            loss_weight=part.weight,
            metric_totals={name: total for name, (total, _) in metrics.items()},
            metric_weights={name: weight for name, (_, weight) in metrics.items()},
            num_samples=num_samples,
            unit=unit if part.is_sum else 1.0,
            targets_per_sample=tuple(weight / num_samples for weight in part.beside) if part.beside else (),
        )
        return sums, part.is_sum
