"""`torch.distributed.pipelining` over gloo as a script would use it, with the fused optimizer; started by torchrun."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline

from benchmarks.models import CASES, LEARNING_RATE
from benchmarks.rivals.messages import Line, Trained, TrainPipeline
from benchmarks.rivals.rank import serve

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def train(request: TrainPipeline, _line: Line) -> Trained:
    """Train from the initial weights, and note when each step is done."""
    case = CASES[request.case]
    rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
    inputs, targets = case.data()
    micro_batch = request.batch_size // request.micro_batches
    pipe = pipeline(
        case.make_model(),
        (inputs[:micro_batch],),
        split_spec=dict.fromkeys(request.cuts, SplitPoint.BEGINNING),
    )
    stage = pipe.build_stage(rank, torch.device("cpu"))
    schedule: Any = SCHEDULES[request.schedule](stage, n_microbatches=request.micro_batches, loss_fn=case.loss)
    optimizer = torch.optim.AdamW(stage.submod.parameters(), lr=LEARNING_RATE, fused=True)
    ends: list[float] = []
    first_step_wall = 0.0
    for indices in islice(_batches(len(inputs), batch_size=request.batch_size), request.steps):
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(inputs[indices])
        elif rank == last:
            schedule.step(target=targets[indices], losses=losses)
        else:
            schedule.step()
        optimizer.step()
        if losses:
            torch.stack(losses).mean().item()  # a training says how it goes
        ends.append(time.monotonic())
        first_step_wall = first_step_wall or time.time()
    return Trained(ends=ends, first_step_wall=first_step_wall)


def _batches(num_samples: int, *, batch_size: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for batch in torch.randperm(num_samples, generator=generator).split(batch_size):
            if len(batch) == batch_size:
                yield batch


if __name__ == "__main__":
    serve(train)
