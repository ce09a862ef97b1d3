"""The stages of one engine as torch's schedules run them, for batches of each shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dnb.engine.replicas.outcome import part_seed
from dnb.engine.replicas.pipeline.action_log import ActionLog
from dnb.engine.replicas.pipeline.micro_batches import model_inputs, shapes_of
from dnb.engine.replicas.pipeline.pipeline_step import PipelineStep
from dnb.engine.replicas.pipeline.schedules import Trouble, WatchedStage, build_schedule
from dnb.engine.replicas.pipeline.stage_memory import StageMemory
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.job import DataSource
from dnb.partitioning.pipeline.stage_builder import StageBuilder
from dnb.partitioning.pipeline.stage_module import StagePart
from dnb.protocol.engine_messages import RankAssignment
from dnb.user_code.loader import fetch_batch
from dnb.user_code.model_call import plain_batch

# Shapes of batches for which stages are kept; a data set whose batches all differ builds them anew each time.
MOST_SHAPES = 8


def stages_of(assignment: RankAssignment) -> tuple[int, ...]:
    """Return the stages of one engine."""
    return tuple(range(assignment.rank, assignment.partition.num_stages, assignment.partition.num_engines))


class StageBody(torch.nn.Module):
    """One stage as `torch.distributed.pipelining` calls it: random numbers, inputs, and the loss at the end."""

    def __init__(self, part: StagePart, index: int, *, is_last: bool, step: PipelineStep) -> None:
        super().__init__()
        self.part_module = part.module
        self.micro_batch = 0
        self._inputs = part.inputs
        self._index = index
        self._is_last = is_last
        self._step = step

    def forward(self, *received: torch.Tensor) -> Any:
        """Compute a micro-batch; the last stage gives the part of the loss that backward begins with."""
        step = self._step
        feed = step.feed
        step.seed(part_seed(feed.seed, self._index, self.micro_batch))
        values = model_inputs(step.job, feed.batches[self.micro_batch]).values if self._inputs else ()
        own = [values[position] for position in self._inputs]
        with step.autocast():
            output = self.part_module(*(received if self._index else ()), *own)
            if not self._is_last:
                return tuple(_sendable(value) for value in output)
            return step.loss_of(output, feed.batches[self.micro_batch])


class StageParts:
    """The parts of a model that is divided into stages, as the first samples show them.

    Args:
        context: the run, and the place in the team; its model is in training mode.
        step: what stages have in common.

    Raises:
        PlanError: the model cannot be divided so.
    """

    def __init__(self, context: ReplicaContext, step: PipelineStep) -> None:
        spec, job, partition = context.spec, context.job, context.assignment.partition
        self._step = step
        self._divider = StageBuilder(
            job.model,
            partition,
            stages=job.stages if partition.num_stages > 1 and not partition.cuts else None,
            autocast=step.autocast,
        )
        size = max(1, min(spec.batch_size, spec.num_samples) // partition.num_micro_batches)
        example = plain_batch(fetch_batch(context.data.train, torch.arange(size)))
        self.first: tuple[StagePart, ...] = self._divider.parts(model_inputs(step.job, example))
        self._first_shapes = shapes_of(example)
        mine = [self.first[stage] for stage in stages_of(context.assignment)]
        self.reads_data = any(part.inputs for part in mine) or mine[-1] is self.first[-1]

    def for_batch(self, example: Any, *, trains: bool) -> tuple[StagePart, ...]:
        """Return the stages for micro-batches of one shape."""
        if trains and shapes_of(example) == self._first_shapes:
            return self.first
        return self._divider.parts(model_inputs(self._step.job, example))


@dataclass(slots=True)
class StagePass:
    """Stages and schedule for batches of one shape."""

    stages: Sequence[WatchedStage]
    schedule: Any


class StagePasses:
    """Schedules of one engine's stages, kept for some shapes of batches.

    Args:
        context: the run, and the place in the team.
        step: what stages have in common.
        parts: all stages.
        slots: the memory of those that are here.
        timeline: told what they do.
        trouble: told which of them raises.
        device: of activations.
    """

    def __init__(
        self,
        context: ReplicaContext,
        step: PipelineStep,
        parts: StageParts,
        slots: StageMemory,
        *,
        timeline: ActionLog,
        trouble: Trouble,
        device: torch.device,
    ) -> None:
        self._assignment = context.assignment
        self._stopwatch = context.stopwatch
        self._step = step
        self._parts = parts
        self._slots = slots
        self._timeline = timeline
        self._trouble = trouble
        self._device = device
        self._passes: OrderedDict[Any, StagePass] = OrderedDict()

    def clear(self) -> None:
        """Let go of all stages, and of what they hold."""
        self._passes.clear()

    def find(self, source: DataSource, indices: torch.Tensor, number: int, *, trains: bool) -> StagePass:
        """Return the pass for the step's micro-batches.

        Args:
            source: of the samples.
            indices: of all micro-batches.
            number: of micro-batches.
            trains: backward follows.
        """
        batches = self._step.feed.batches
        key: Any = (trains, len(indices), number, None if source.collate is None else shapes_of(batches[0]))
        if key not in self._passes:
            example = batches[0] if batches else None
            if example is None:
                example = plain_batch(fetch_batch(source, indices[: len(indices) // number]))
            self._passes[key] = self._build(self._parts.for_batch(example, trains=trains), number, trains=trains)
            while len(self._passes) > MOST_SHAPES:
                self._passes.popitem(last=False)
        self._passes.move_to_end(key)
        return self._passes[key]

    def _build(self, parts: Sequence[StagePart], number: int, *, trains: bool) -> StagePass:
        self._slots.adopt(parts, trains=trains)
        stages = [
            WatchedStage(
                StageBody(parts[stage], stage, is_last=stage == len(parts) - 1, step=self._step),
                parts[stage],
                index=stage,
                num_stages=len(parts),
                device=self._device,
                timeline=self._timeline,
                stopwatch=self._stopwatch,
                trouble=self._trouble,
            )
            for stage in stages_of(self._assignment)
        ]
        schedule = build_schedule(stages, self._assignment.partition, number, loss=_given if trains else None)
        return StagePass(stages, schedule)


def _sendable(value: torch.Tensor) -> torch.Tensor:
    """Make a tensor contiguous, as gloo sends no other, and no view, which schedules could not detach."""
    return value.clone(memory_format=torch.contiguous_format) if value._is_view() else value.contiguous()


def _given(output: torch.Tensor, _number: torch.Tensor) -> torch.Tensor:
    """Return what the last stage gives: the loss."""
    return output
