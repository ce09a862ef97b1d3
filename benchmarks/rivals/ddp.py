"""DistributedDataParallel over gloo, with the fused optimizer; started by torchrun."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import CASES, LEARNING_RATE, Case
from benchmarks.rivals.messages import FIRST_LOSSES, Line, Progress, Train, Trained
from benchmarks.rivals.rank import serve


def train(request: Train, line: Line) -> Trained:
    """Train from the initial weights, as a script would, and note when each step is done."""
    case = CASES[request.case]
    rank = torch.distributed.get_rank()
    inputs, targets = case.data()
    model = DistributedDataParallel(
        case.make_model(),
        gradient_as_bucket_view=request.variant != "default",
    )
    optimizer = _optimizer(case, model)
    ends: list[float] = []
    losses: list[float] = []
    first_step_wall = 0.0
    for indices in islice(_batches(case, num_samples=len(inputs)), request.steps):
        optimizer.zero_grad(set_to_none=request.variant != "bucket_view_zeroed")
        output, target = model(inputs[indices]), targets[indices]
        if request.gathers:
            loss = case.loss(_gathered(output, rank), target)  # which contrastive losses do not look at
            (loss * torch.distributed.get_world_size()).backward()  # the mean over ranks is of parts of one gradient
        else:
            loss = case.loss(output, target)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())  # a training says how it goes
        ends.append(time.monotonic())
        first_step_wall = first_step_wall or time.time()
        if rank == 0 and len(ends) == request.progress_at:
            line.send(Progress())
    return Trained(ends=ends, first_step_wall=first_step_wall, first_losses=losses[:FIRST_LOSSES])


def _gathered(own: torch.Tensor, rank: int) -> torch.Tensor:
    """Those of all ranks; only the own ones have a graph, as usual by hand."""
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own.detach().contiguous())
    parts[rank] = own
    return torch.cat(parts)


def _batches(case: Case, *, num_samples: int) -> Iterator[torch.Tensor]:
    """This rank's part of every global batch, epoch after epoch: what DistributedSampler gives, without a loader."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    global_batch = case.batch_per_engine * num_ranks
    while True:
        order = torch.randperm(num_samples, generator=generator)
        for batch in order.split(global_batch):
            if len(batch) == global_batch:
                yield batch[rank * case.batch_per_engine : (rank + 1) * case.batch_per_engine]


def _optimizer(case: Case, model: torch.nn.Module) -> torch.optim.Optimizer:
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.optimizer]
    optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=LEARNING_RATE, fused=True)
    return optimizer


if __name__ == "__main__":
    serve(train)
