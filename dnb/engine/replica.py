"""One engine's copy of the model: parameters read from shared memory, gradients born in the engine's slab."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dnb.engine.loader import fetch_batch
from dnb.engine.telemetry import Stopwatch
from dnb.records import Load, RunSpec, Sums, Work
from dnb.transport.job import Data, DataSource, Job, Sum
from dnb.transport.layout import region_views, slot_views
from dnb.transport.segments import open_segment


class Replica:
    """Computes shards of steps and evaluations of one run.

    Args:
        spec: the run's numbers.
        job: as unpacked; its model is bound to the shared memory.
        data: as unpacked.
        load: where that memory is.
        stopwatch: counts data and compute time.
    """

    def __init__(self, spec: RunSpec, job: Job, data: Data, load: Load, stopwatch: Stopwatch) -> None:
        self._spec = spec
        self._job = job
        self._data = data
        self._stopwatch = stopwatch
        parameters = open_segment(load.parameters)
        slab = open_segment(load.slab)
        master = slot_views(load.parameter_layout, parameters.memory)
        gradients = slot_views(load.gradient_layout, slab.memory)
        for name, parameter in job.model.named_parameters():
            parameter.data = master[name]
        self._gradients = [
            (parameter, gradients[name]) for name, parameter in job.model.named_parameters() if name in gradients
        ]
        self._regions = region_views(load.gradient_layout, slab.memory)
        own = slot_views(load.buffer_layout, slab.memory)
        self._buffers: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = []
        for name, buffer in job.model.named_buffers():
            buffer.data = own[name]
            self._buffers.append((*_owner(job.model, name), buffer, master[name]))

    def compute(self, work: Work, indices: torch.Tensor) -> tuple[Sums, bool]:
        """Do what is asked; for a step, the gradients are then in the slab.

        Returns:
            The sums of loss and metrics, and whether the gradients still are to be divided by the weight.
        """
        if work.kind == "evaluation":
            return self._evaluate(indices), False
        if work.fresh:
            for region in self._regions:
                region.zero_()
            self._read_buffers()
        self._bind_gradients()
        # torch.manual_seed takes 0.3 ms, as it looks for every kind of accelerator.
        torch.default_generator.manual_seed(part_seed(self._spec.seed, work.step, work.shards[0]))
        self._job.model.train()
        parts = [
            self._forward(self._data.train, piece, work=work)
            for piece in _pieces(indices, self._spec.micro_batch)
            if len(piece)
        ]
        self._gather_strays()
        return _added([sums for sums, _ in parts]), any(is_sum for _, is_sum in parts)

    def _forward(self, source: DataSource, indices: torch.Tensor, *, work: Work | None) -> tuple[Sums, bool]:
        """Loss and metrics of one micro-batch, with backward if it is `work` of a step."""
        with self._stopwatch.measure("data"):
            batch = fetch_batch(source, indices)
        num_samples = len(indices)
        with self._stopwatch.measure("compute"):
            with self._autocast():
                loss, metrics = self._apply(batch)
            is_sum = isinstance(loss, Sum)
            total = loss.total if isinstance(loss, Sum) else loss
            if work is not None:
                scale = 1.0 if is_sum else num_samples / work.batch_samples
                (total * scale if scale != 1.0 else total).backward()
            value = float(total.detach())
        weight = float(loss.weight) if isinstance(loss, Sum) else float(num_samples)
        sums = Sums(
            loss_total=value if is_sum else value * num_samples,
            loss_weight=weight,
            metric_totals={name: metric * num_samples for name, metric in metrics.items()},
            num_samples=num_samples,
        )
        return sums, is_sum

    def _apply(self, batch: Any) -> tuple[torch.Tensor | Sum, dict[str, float]]:
        model, job = self._job.model, self._job
        if job.step is not None:
            result = job.step(model, batch)
            loss, metrics = result if isinstance(result, tuple) else (result, {})
            return loss, {name: float(value) for name, value in metrics.items()}
        if isinstance(batch, dict):
            return model(**batch).loss, {}
        *inputs, target = batch
        output = model(*inputs)
        assert job.loss is not None
        loss = job.loss(output, target)
        with torch.no_grad():
            metrics = {name: float(metric(output, target)) for name, metric in job.metrics.items()}
        return loss, metrics

    def _evaluate(self, indices: torch.Tensor) -> Sums:
        assert self._data.val is not None
        self._read_buffers()
        self._job.model.eval()
        with torch.no_grad():
            return _added(
                [
                    self._forward(self._data.val, piece, work=None)[0]
                    for piece in _pieces(indices, self._spec.micro_batch or self._spec.batch_size)
                    if len(piece)
                ]
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._spec.precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def _read_buffers(self) -> None:
        for module, key, own, master in self._buffers:
            own.copy_(master)
            module._buffers[key] = own

    def _bind_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def _gather_strays(self) -> None:
        """Bring home what user code put elsewhere: replaced gradients (`zero_grad`) and replaced buffers."""
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                if parameter.grad is not None:
                    gradient.add_(parameter.grad)
                parameter.grad = gradient
        for module, key, own, _ in self._buffers:
            now = module._buffers[key]
            if now is not None and now is not own:
                own.copy_(now.detach())


def part_seed(seed: int, step: int, shard: int) -> int:
    """The seed of random numbers in a part of a step; it does not depend on who computes it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{shard}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _pieces(indices: torch.Tensor, size: int | None) -> Sequence[torch.Tensor]:
    return [indices] if size is None or len(indices) <= size else indices.split(size)


def _added(parts: Sequence[Sums]) -> Sums:
    names = {name for part in parts for name in part.metric_totals}
    return Sums(
        loss_total=sum(part.loss_total for part in parts),
        loss_weight=sum(part.loss_weight for part in parts),
        metric_totals={name: sum(part.metric_totals.get(name, 0.0) for part in parts) for name in names},
        num_samples=sum(part.num_samples for part in parts),
    )
