"""The loss and the metrics of a whole model on an engine, as the user's functions compute them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from dnb.engine.replicas.new_loss import MOST_SAMPLES, judge_new_loss, judge_new_step
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.job import DataSource, Sum
from dnb.planning.shards import SAMPLES_AT_LEAST
from dnb.protocol.run import Reduction
from dnb.user_code.loader import fetch_batch
from dnb.user_code.model_call import arguments_of
from dnb.user_code.return_values import (
    EVALUATION_PREFIX,
    OWN_LOOP,
    MetricReader,
    Metrics,
    ReturnError,
    read_loss,
    read_step,
    weighed,
)

# Steps whose samples may show nothing of a step function that came in mid-run, until it is taken as it is.
MOST_TRIES = 3


class Versioned(Protocol):
    """Gradients whose versions tell whether somebody has written them."""

    def versions(self) -> Any:
        """Return something that is equal as long as nobody has."""


class ModelLoss:
    """The loss of one run, which may be replaced in mid-run, and is then looked at anew.

    Args:
        context: the run.
        gradients: of its model.
    """

    def __init__(self, context: ReplicaContext, gradients: Versioned) -> None:
        spec = context.spec
        self.job = context.job
        self.gradients = gradients
        self.measure: Callable[[Any, Any, int], Metrics] | None = None  # in the place of all metrics
        self.reduction: Reduction = spec.reduction
        self._spec = spec
        self.target_metrics = spec.target_metrics  # that weigh as the loss does
        self._is_new = spec.is_loss_new and not spec.trusts_loss
        self._num_tries = 0
        if self._is_new and spec.reduction == "samples":
            self.reduction = "targets"  # where it is a mean over targets; the one that was there before was none
        self._step_metrics = MetricReader()

    def replace(self, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> None:
        """Go on with another step function, or another loss; one of them is None."""
        if step is not None or loss is not self.job.loss:  # else what is known of it stays so, to the bit
            # Where it is a mean over targets; all else is a mean over samples.
            self.reduction = "samples" if self._spec.trusts_loss else "targets"
            self._is_new = not self._spec.trusts_loss
            self._num_tries = 0
            self.target_metrics = ()
        self.job = dataclasses.replace(self.job, step=step, loss=loss)
        self._step_metrics = MetricReader()

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of the run."""
        if self._spec.precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def compute(
        self, step: Callable[..., Any] | None, batch: Any, num_samples: int, *, needs_gradient: bool
    ) -> tuple[torch.Tensor | Sum, Metrics]:
        """Compute loss and metrics of some samples.

        Args:
            step: the step function; None: the model is called, then the loss.
            batch: of the data set.
            num_samples: in it.
            needs_gradient: backward follows.

        Raises:
            ReturnError: user code returned what is no loss, or no metric.
        """
        job = self.job
        if step is not None:
            before = self.gradients.versions()
            returned = step(job.model, batch)
            if self.gradients.versions() != before:
                raise ReturnError(f"step {OWN_LOOP}")
            loss, found = read_step(returned, needs_gradient=needs_gradient)
            return loss, self._step_metrics.read(found, num_samples) if found else {}
        given = arguments_of(job.model, batch, has_target=job.loss is not None)
        output = job.model(*given.positional, **given.keywords)
        if job.loss is None:
            loss, compared = read_step(output, needs_gradient=needs_gradient, by="model")[0], batch
        else:
            if self._is_new and needs_gradient and self._spec.loss_over == "samples":
                self._judge(job.loss, output, given.target, num_samples)
            loss, compared = read_loss(job.loss(output, given.target), needs_gradient=needs_gradient), given.target
        if not job.metrics:
            return loss, {}
        with torch.no_grad():
            return loss, (self.measure or self._measure_all)(output, compared, num_samples)

    @property
    def has_new_step(self) -> bool:
        """The presence of a step function that came in mid-run, and is yet to be judged."""
        return self._is_new and self.job.step is not None

    def judge_step(
        self, compute: Callable[[Any], tuple[Any, Mapping[str, Any]]], source: DataSource, indices: torch.Tensor
    ) -> str:
        """Judge a step function that came in mid-run, and return what is to be told of its metrics.

        Args:
            compute: loss and metrics of a batch.
            source: of the samples.
            indices: of the samples, of which the first ones are looked at.

        Raises:
            ReturnError: its loss is no mean over samples, or is a sum where a mean was.
        """
        few = indices[:MOST_SAMPLES]
        found = judge_new_step(
            compute,
            fetch_batch(source, few),
            num_samples=len(few),
            fetch=lambda begin, end: fetch_batch(source, few[begin:end]),
            spec=self._spec,
        )
        self._num_tries += 1
        self._is_new = found is None and self._num_tries < MOST_TRIES
        if found is None:
            return ""
        self.reduction, self.target_metrics = found.reduction, found.target_metrics
        return found.text

    def step_on(self, batch: Any) -> tuple[torch.Tensor | Sum, Mapping[str, Any]]:
        """Compute loss and metrics of a batch by the step function, as if backward followed."""
        assert self.job.step is not None
        with torch.enable_grad(), self.autocast():
            return read_step(self.job.step(self.job.model, batch), needs_gradient=True)

    def weigh_metrics(self, metrics: Metrics, num_samples: int, weight: float, *, is_evaluation: bool) -> None:
        """Let metrics that are means over what the loss is a mean over weigh as it does.

        Args:
            metrics: total and weight of each; those that weigh themselves stay as they are.
            num_samples: that they were computed of.
            weight: of the loss.
            is_evaluation: whether val_step has returned them.
        """
        prefix = EVALUATION_PREFIX if is_evaluation else ""
        for name, (total, own) in metrics.items():
            if prefix + name in self.target_metrics and own == num_samples:
                metrics[name] = (total / num_samples * weight if weight else 0.0, weight)

    def _measure_all(self, output: Any, compared: Any, num_samples: int) -> Metrics:
        return {
            name: weighed(metric(output, compared), num_samples, name=name) for name, metric in self.job.metrics.items()
        }

    def _judge(self, loss: Callable[..., Any], output: Any, target: Any, num_samples: int) -> None:
        found = judge_new_loss(loss, output, target, num_samples=num_samples, spec=self._spec)
        if found is not None or num_samples > SAMPLES_AT_LEAST:  # else more samples may tell
            self.reduction, self._is_new = found or self.reduction, False
