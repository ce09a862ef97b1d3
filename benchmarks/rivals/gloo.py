"""The mean of a flat gradient by gloo's all_reduce; started by torchrun."""

from __future__ import annotations

import time

import torch
import torch.distributed

from benchmarks.rivals.messages import AllReduce, Line, Reduced
from benchmarks.rivals.rank import serve


def reduce(request: AllReduce, _line: Line) -> Reduced:
    """Average anew each round what this rank has just written, as after a backward pass."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    source = torch.full((request.num_elements,), float(rank + 1))
    gradient = torch.empty_like(source)
    starts: list[float] = []
    ends: list[float] = []
    for _ in range(request.rounds):
        gradient.copy_(source)
        starts.append(time.monotonic())
        torch.distributed.all_reduce(gradient)
        gradient.div_(num_ranks)
        ends.append(time.monotonic())
    assert bool((gradient == (num_ranks + 1) / 2).all())
    return Reduced(starts=starts, ends=ends)


if __name__ == "__main__":
    serve(reduce)
