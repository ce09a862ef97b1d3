"""The schedules of `torch.distributed.pipelining`: which one a step takes, and a stage of it that is watched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from dnb.engine.replicas.pipeline.action_log import ActionLog
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.stage_module import StagePart
from dnb.protocol.measurements import ActionKind
from dnb.protocol.run import Partition, ScheduleName

# It prints the whole schedule when user code raises; the user's own error says more.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


@dataclass(slots=True)
class Trouble:
    """The place where user code raised, if it did."""

    error: BaseException | None = None
    stage: int = 0
    micro_batch: int = 0


class WatchedStage(PipelineStage):
    """A stage whose actions are timed, and whose user code is told from its traffic when something raises.

    Args:
        body: takes what the stage receives; its attribute `micro_batch` is set before.
        part: what crosses its cuts.
        index: of the stage.
        num_stages: of all engines.
        device: where it runs.
        timeline: is told what it does.
        stopwatch: counts computing.
        trouble: is told what user code raised.
    """

    def __init__(
        self,
        body: torch.nn.Module,
        part: StagePart,
        *,
        index: int,
        num_stages: int,
        device: torch.device,
        timeline: ActionLog,
        stopwatch: Stopwatch,
        trouble: Trouble,
    ) -> None:
        # The first stage finds its inputs by the number of the micro-batch, and the last one gives the loss.
        receives = part.receives if index else (torch.empty(1, dtype=torch.int64, device="meta"),)
        sends = part.sends if index < num_stages - 1 else (torch.empty(1, device="meta", requires_grad=True),)
        super().__init__(body, index, num_stages, device, input_args=receives, output_args=sends)
        self._body: Any = body
        self._timeline = timeline
        self._stopwatch = stopwatch
        self._trouble = trouble

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward of one micro-batch."""
        self._body.micro_batch = fwd_chunk_id
        return self._do("forward", fwd_chunk_id, super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Compute the backward of one micro-batch, of all or of the inputs only."""
        if not self.has_backward:
            return
        kind: ActionKind = "backward" if kwargs.get("full_backward", True) else "backward-input"
        self._do(kind, bwd_chunk_id, self._backward, *args, **kwargs)

    def _backward(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        gradients = self.bwd_cache[bwd_chunk_id]  # such as that of a mean, whose rows are one and the same
        self.bwd_cache[bwd_chunk_id] = tuple(None if g is None else g.contiguous() for g in gradients)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Compute the part that backward of the inputs has left."""
        if self.has_backward:
            self._do("backward-weight", bwd_chunk_id, super().backward_weight_one_chunk, *args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """Return torch's receives; waiting for an activation begins here."""
        self._timeline.enter("wait", self.stage_index, fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """Return torch's receives; waiting for a gradient begins here."""
        self._timeline.enter("wait", self.stage_index, bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        """Return torch's sends; sending an activation begins here."""
        self._timeline.enter("send", self.stage_index, fwd_chunk_id)
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        if self._timeline.is_counting:
            self._timeline.send(self.stage_index, "forward", _bytes_of(operations))
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        """Return torch's sends; sending a gradient begins here."""
        self._timeline.enter("send", self.stage_index, bwd_chunk_id)
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        if self._timeline.is_counting:
            self._timeline.send(self.stage_index, "backward", _bytes_of(operations))
        return operations

    def _do(self, kind: ActionKind, micro_batch: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._timeline.enter(kind, self.stage_index, micro_batch)
        try:
            with self._stopwatch.measure("compute"):
                return function(micro_batch, *args, **kwargs)
        except USER_ERRORS as error:
            if self._trouble.error is None:
                # Torch wraps what a stage's forward raises if it is an Exception, and nothing else.
                is_wrapped = kind == "forward" and type(error) is RuntimeError
                self._trouble.error = (error.__cause__ if is_wrapped else None) or error
                self._trouble.stage, self._trouble.micro_batch = self.stage_index, micro_batch
            raise
        finally:
            self._timeline.enter("wait", self.stage_index, micro_batch)


def _bytes_of(operations: Sequence[Any]) -> int:
    return sum(operation.tensor.nbytes for operation in operations)


def num_micro_batches_for(num_samples: int, partition: Partition, *, least: int = 1) -> int:
    """Return the planned number, or the largest below it that gives equal micro-batches of at least `least` samples."""
    most = min(partition.num_micro_batches, max(num_samples // least, 1))
    return next(m for m in range(most, 0, -1) if num_samples % m == 0)


def schedule_for(partition: Partition, num_micro_batches: int) -> ScheduleName:
    """Return the planned schedule, or GPipe where micro-batches are too few for it, or of a number it cannot do."""
    rounds = max(1, num_micro_batches // partition.num_engines)
    if num_micro_batches < partition.num_engines or num_micro_batches % rounds:
        return "gpipe"
    return partition.schedule


def build_schedule(
    stages: Sequence[PipelineStage], partition: Partition, num_micro_batches: int, *, loss: Callable[..., Any] | None
) -> Any:
    """Build a schedule of `torch.distributed.pipelining` for this engine's stages.

    Args:
        stages: of this engine, in order.
        partition: how the model is divided.
        num_micro_batches: of the steps that it runs.
        loss: of the last stage's output; None computes no gradients.
    """
    name = schedule_for(partition, num_micro_batches) if loss is not None else "gpipe"
    named: dict[str, Any] = {"loss_fn": loss, "scale_grads": False}
    if name == "zero-bubble":
        return ScheduleInterleavedZeroBubble(list(stages), num_micro_batches, **named)
    if len(stages) > 1:
        several = ScheduleLoopedBFS if name == "gpipe" else ScheduleInterleaved1F1B
        return several(list(stages), num_micro_batches, **named)
    single = ScheduleGPipe if name == "gpipe" else Schedule1F1B
    return single(stages[0], num_micro_batches, **named)
