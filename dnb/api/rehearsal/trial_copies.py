"""Copies of a run's objects for a rehearsal: what of them is shared, what counts for findings, and what is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from dnb.job import Data, DataSource, Job
from dnb.transport.pickling.copies import shallow_copy

# So many show how the loss of the whole is made of those of parts.
MOST_SAMPLES = 8


def free_tensors(job: Job, data: Data) -> Iterator[torch.Tensor]:
    """Yield tensors whose values do not count: of training and inputs; classes may be marked as ignored anywhere."""
    yield from filter(_is_plain, job.model.parameters())
    for module in job.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            yield from module.buffers(recurse=False)
    yield from (*_floats_of(data.train), *_floats_of(data.val))


def own_buffers(model: torch.nn.Module) -> None:
    """Give a model buffers of its own, with the values that it shares."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()


def _shallow_source(source: DataSource) -> DataSource:
    is_tuple = isinstance(source.samples, tuple)
    return replace(source, samples=source.samples if is_tuple else shallow_copy(source.samples))


def shallow(data: Data) -> Data:
    """Copy data without what their objects hold."""
    return replace(data, train=_shallow_source(data.train), val=None if data.val is None else _shallow_source(data.val))


def without_optimizer(job: Job) -> Job:
    """Return the part of a job that a rehearsal computes with."""
    return Job(
        model=job.model,
        loss=job.loss,
        step=job.step,
        metrics=job.metrics,
        optimizer=None,
        lr=None,
        scheduler=None,
        order=None,
        stages=job.stages,
        val_step=job.val_step,
    )


def digest_of_first(data: Data) -> bytes:
    """Digest the first samples, by which a run is tried, as far as they are free otherwise."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _floats_of(data.train):
        digest.update(part[:MOST_SAMPLES].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _floats_of(source: DataSource | None) -> list[torch.Tensor]:
    if source is None or source.collate is not None:
        return []
    return [part for part in source.samples if part.is_floating_point() and _is_plain(part)]


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"
