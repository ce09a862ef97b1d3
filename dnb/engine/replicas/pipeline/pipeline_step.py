"""One pass of micro-batches through a pipeline: its samples, random numbers, and the loss at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dnb.engine.replicas.new_loss import judge_new_loss
from dnb.engine.replicas.outcome import mean_sums, one_kind, part_seed
from dnb.engine.replicas.pipeline.whole_loss import WholeLoss
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.whole_metrics import WholeMetrics
from dnb.job import Job, Sum
from dnb.protocol.measurements import Sums
from dnb.protocol.run import Reduction
from dnb.user_code.loss_weights import OVER_TARGETS, counting_targets, nothing_of, weighed_loss
from dnb.user_code.return_values import Metrics, read_loss, weighed


@dataclass(slots=True)
class PipelineFeed:
    """The samples and sums of one pass through the pipeline."""

    indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    batches: Sequence[Any] = ()  # micro-batches; none where no stage of this engine reads them
    micro_samples: int = 0
    batch_samples: int | None = None  # of the global batch; None: no gradients
    seed: int = 0
    sums: list[Sums] = field(default_factory=list)
    are_sums: list[bool] = field(default_factory=list)  # of `sums`
    whole: WholeLoss | None = None  # on the last stage, where the loss looks at the whole batch

    @property
    def is_sum(self) -> bool:
        """True if the losses were `Sum`s."""
        return one_kind(self.are_sums)


class PipelineStep:
    """The computation that stages have in common, and the loss of micro-batches on the last one.

    Args:
        context: the run.
        device: of activations.
    """

    def __init__(self, context: ReplicaContext, *, device: torch.device) -> None:
        self._spec = context.spec
        self._job = context.job
        self._device = device
        self._generators = context.generators
        self._num_stages = context.assignment.partition.num_stages
        self._reduction: Reduction = context.spec.reduction
        self._is_loss_new = context.spec.is_loss_new and not context.spec.trusts_loss
        if self._is_loss_new and context.spec.reduction == "samples":
            self._reduction = "targets"  # as in `ModelLoss`
        self.whole_metrics = WholeMetrics(context.job.metrics, context.spec.whole_metrics)
        self.feed = PipelineFeed()

    @property
    def job(self) -> Job:
        """The run's model, and its loss as it is by now."""
        return self._job

    def replace_functions(self, loss: Callable[..., Any] | None) -> None:
        """Go on with another loss."""
        self._job = dataclasses.replace(self._job, loss=loss)
        trusts = self._spec.trusts_loss
        self._reduction, self._is_loss_new = "samples" if trusts else "targets", loss is not None and not trusts

    def seed(self, seed: int) -> None:
        """Begin with these random numbers."""
        torch.default_generator.manual_seed(seed)
        if len(self._generators):
            self._generators.seed(seed)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of the run."""
        if self._spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def loss_of(self, output: Any, batch: Any) -> torch.Tensor:
        """Return what backward begins with; its value and the metrics are kept for the report."""
        feed, job = self.feed, self._job
        if self._spec.loss_over == "batch":
            if feed.whole is None:
                feed.whole = WholeLoss(self._whole_loss, micro_samples=feed.micro_samples)
            self.whole_metrics.add(output, batch[-1], feed.micro_samples)
            return feed.whole.add(output, batch[-1])
        has_target = job.loss is not None
        metrics: Metrics = {}
        counted: Sequence[float] = ()
        value = output
        if has_target:
            assert job.loss is not None
            if self._is_loss_new and feed.batch_samples is not None:
                found = judge_new_loss(job.loss, output, batch[-1], num_samples=feed.micro_samples, spec=self._spec)
                if found is not None:
                    self._reduction, self._is_loss_new = found, False
            with counting_targets(self._reduction) as counted:
                value = job.loss(output, batch[-1])
            self.whole_metrics.add(output, batch[-1], feed.micro_samples)
            with torch.no_grad():
                metrics = {
                    name: weighed(metric(output, batch[-1]), feed.micro_samples, name=name)
                    for name, metric in self.whole_metrics.of_parts.items()
                }
        loss = read_loss(
            value,
            needs_gradient=feed.batch_samples is not None,
            by="loss" if has_target else "model",
            device=self._device,
        )
        beside: tuple[float, ...] = ()
        if self._reduction in OVER_TARGETS:
            loss, beside = weighed_loss(loss, counted, is_of_terms=self._reduction == "terms")
        if beside and feed.batch_samples is not None:
            self._reduction = "terms"  # evaluations have no graph that tells
        is_sum = isinstance(loss, Sum)
        total = loss.total if isinstance(loss, Sum) else loss
        adds_up = is_sum or self._reduction == "sum"
        if feed.batch_samples is not None and not total.requires_grad:
            total = total + nothing_of(output)  # every micro-batch goes back through all stages
        number = total.item()
        factor = 1 if is_sum else (feed.batch_samples or self._spec.batch_size) if adds_up else feed.micro_samples
        feed.are_sums.append(is_sum)
        feed.sums.append(
            Sums(
                loss_total=number * factor,
                loss_weight=loss.weight if isinstance(loss, Sum) else float(feed.micro_samples),
                metric_totals={name: total for name, (total, _) in metrics.items()},
                metric_weights={name: weight for name, (_, weight) in metrics.items()},
                num_samples=feed.micro_samples,
                targets_per_sample=tuple(weight / feed.micro_samples for weight in beside),
            )
        )
        scale = 1.0 if adds_up or feed.batch_samples is None else feed.micro_samples / feed.batch_samples
        scaled = total * scale if scale != 1.0 else total
        # Schedules join the outputs of micro-batches, and detach them, which a view does not allow.
        return torch.stack((scaled if scaled.dim() == 0 else scaled.sum(),))

    def _whole_loss(self, output: Any, target: Any, num_samples: int) -> tuple[torch.Tensor, Metrics]:
        """Compute loss and metrics of all micro-batches together."""
        feed, job = self.feed, self._job
        assert job.loss is not None
        torch.default_generator.manual_seed(part_seed(feed.seed, self._num_stages, 0))
        with self.autocast():
            loss = read_loss(
                job.loss(output, target), needs_gradient=feed.batch_samples is not None, device=self._device
            )
        with torch.no_grad():
            metrics = {
                name: weighed(metric(output, target), num_samples, name=name)
                for name, metric in self.whole_metrics.of_parts.items()
            }
        return loss.total / loss.weight if isinstance(loss, Sum) else loss, metrics

    def count_whole(self) -> None:
        """Report the loss of a whole batch, if it looks at that; of an evaluation it is computed only now."""
        feed, whole = self.feed, self.feed.whole
        if whole is None:
            return
        if feed.batch_samples is None:
            whole.settle(needs_gradient=False)
        feed.are_sums.append(False)
        feed.sums.append(mean_sums(whole.loss, whole.metrics, num_samples=whole.num_samples))
