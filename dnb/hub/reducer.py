"""The master copy: adds up the engines' slabs, steps the one optimizer, in memory that everybody reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dnb.hub.optimizers import build_optimizer, build_scheduler
from dnb.records import SegmentRef, Sums
from dnb.transport.job import Job
from dnb.transport.layout import plan_layout, region_views, slot_views
from dnb.transport.segments import Segment, create_segment


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one engine brings to a step."""

    engine: int
    sums: Sums
    is_sum: bool


@dataclass(frozen=True, slots=True)
class StepResult:
    """A committed step."""

    loss: float
    metrics: dict[str, float]
    lr: float
    num_samples: int


class NotFinite(Exception):  # noqa: N818 - a verdict, not a fault
    """The loss is NaN or infinite: nothing was applied."""


class _Slab:
    """One engine's gradients and buffers, as the hub sees them."""

    def __init__(self, segment: Segment, master: Master) -> None:
        self.segment = segment
        self.regions = region_views(master.gradient_layout, segment.memory)
        self.gradients = list(slot_views(master.gradient_layout, segment.memory).values())
        self.buffers = slot_views(master.buffer_layout, segment.memory)


class Master:
    """Parameters, buffers and optimizer of one run.

    Args:
        job: as unpacked; its model's tensors are moved into shared memory.
        folders: where segments may lie.
        prefix: of the segments' file names.
        clip_norm: largest global norm of the aggregated gradient; None does not clip.
    """

    def __init__(self, job: Job, *, folders: Sequence[Path], prefix: str, clip_norm: float | None) -> None:
        torch.set_num_threads(1)  # the engines have the other cores
        self.model = job.model
        self.notes: list[str] = []
        self._folders = folders
        self._prefix = prefix
        self._clip_norm = clip_norm
        # First, as user code may raise here, when there is no memory yet to give back.
        self.optimizer = build_optimizer(job.optimizer, job.model.parameters(), lr=job.lr)
        self.scheduler = build_scheduler(job.scheduler, self.optimizer)
        parameters = dict(job.model.named_parameters())
        buffers = dict(job.model.named_buffers())
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        self.parameter_layout = plan_layout([*parameters.items(), *buffers.items()])
        self.gradient_layout = plan_layout(trainable.items())
        self.buffer_layout = plan_layout(buffers.items(), start_bytes=self.gradient_layout.num_bytes)
        self._segment = self._create("parameters", self.parameter_layout.num_bytes)
        views = slot_views(self.parameter_layout, self._segment.memory)
        for name, tensor in [*parameters.items(), *buffers.items()]:
            views[name].copy_(tensor.detach())
            tensor.data = views[name]
        self._buffers = buffers
        self._trainable = list(trainable.values())
        self._bound: int | None = None  # the engine whose slab the gradients are views of
        self._slabs: dict[int, _Slab] = {}

    @property
    def parameters_ref(self) -> SegmentRef:
        """Where engines map the parameters."""
        return self._segment.ref

    def add_slab(self, engine: int) -> SegmentRef:
        """Reserve the slab of an engine; the same one when asked again.

        Raises:
            SpaceError: no room for it.
        """
        if engine not in self._slabs:
            segment = self._create(f"slab-{engine}", self.buffer_layout.num_bytes)
            self._slabs[engine] = _Slab(segment, self)
        return self._slabs[engine].segment.ref

    def commit(self, contributions: Sequence[Contribution]) -> StepResult:
        """Add up the slabs in the order given and apply one optimizer step.

        Raises:
            NotFinite: the loss is NaN or infinite; nothing was changed.
        """
        loss, metrics = mean_of([c.sums for c in contributions])
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss}")
        engines = sorted({c.engine for c in contributions})
        self._reduce(engines, contributions)
        self._mix_buffers(engines, contributions)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trainable, self._clip_norm)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(loss, metrics, lr, sum(c.sums.num_samples for c in contributions))

    def drop_slabs(self) -> None:
        """Give the slabs' memory back, as no step will follow."""
        for parameter in self._trainable:
            parameter.grad = None
        for slab in self._slabs.values():
            slab.segment.unlink()
        self._slabs.clear()
        self._bound = None

    def close(self) -> None:
        """Unlink the parameters; the memory goes when the last process lets go of it."""
        self._segment.unlink()

    def _create(self, name: str, num_bytes: int) -> Segment:
        segment = create_segment(f"{self._prefix}-{name}", num_bytes, folders=self._folders)
        if segment.note:
            self.notes.append(segment.note)
        return segment

    def _reduce(self, engines: Sequence[int], contributions: Sequence[Contribution]) -> None:
        first, *others = (self._slabs[engine] for engine in engines)
        for index, target in enumerate(first.regions):
            for slab in others:
                target.add_(slab.regions[index])
            if any(c.is_sum for c in contributions):
                target.div_(sum(c.sums.loss_weight for c in contributions))
        if self._bound != engines[0]:
            for parameter, gradient in zip(self._trainable_in_layout(), first.gradients, strict=True):
                parameter.grad = gradient
            self._bound = engines[0]

    def _trainable_in_layout(self) -> list[torch.nn.Parameter]:
        by_name = dict(self.model.named_parameters())
        return [by_name[slot.name] for slot in self.gradient_layout.slots]

    def _mix_buffers(self, engines: Sequence[int], contributions: Sequence[Contribution]) -> None:
        """Running statistics become the engines' mean, weighted by samples; other buffers the first engine's."""
        weights = {engine: 0 for engine in engines}
        for contribution in contributions:
            weights[contribution.engine] += contribution.sums.num_samples
        total = sum(weights.values())
        for name, master in self._buffers.items():
            seen = [self._slabs[engine].buffers[name] for engine in engines]
            if all(torch.equal(buffer, master) for buffer in seen):
                continue  # a constant must not drift by rounding
            if not master.is_floating_point() or len(seen) == 1:
                master.copy_(next(b for e, b in zip(engines, seen, strict=True) if weights[e] or not total))
                continue
            mixed = torch.zeros_like(master, dtype=torch.float64)
            for engine, buffer in zip(engines, seen, strict=True):
                mixed += buffer.double() * (weights[engine] / total)
            master.copy_(mixed)


def mean_of(sums: Sequence[Sums]) -> tuple[float, dict[str, float]]:
    """The mean loss and mean metrics of several parts."""
    weight = sum(part.loss_weight for part in sums)
    num_samples = sum(part.num_samples for part in sums)
    loss = sum(part.loss_total for part in sums) / weight if weight else math.nan
    names = {name for part in sums for name in part.metric_totals}
    metrics = {name: sum(part.metric_totals.get(name, 0.0) for part in sums) / num_samples for name in sorted(names)}
    return loss, metrics
