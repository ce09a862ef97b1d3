"""One process that trains by itself: by how much its peak memory grows, without an optimizer's state."""

from __future__ import annotations

import sys

from benchmarks.large_models import CASES, NUM_MICRO_BATCHES
from dnb.engine.runtime.allocator import keep_freed_memory
from dnb.engine.runtime.process_memory import Footprint


def grown_bytes(name: str, *, steps: int) -> int:
    """From just before the model is made to the end of the last step, with the micro-batches and allocator of dnb."""
    keep_freed_memory()  # by glibc's defaults it holds as much or more
    case = CASES[name]
    inputs, targets = (part[: case.batch_per_engine] for part in case.data())
    warm = CASES["warm"]
    some, classes = (part[:4] for part in warm.data())
    warm.loss(warm.make_model()(some), classes).backward()
    footprint = Footprint()
    footprint.begin()
    model = case.make_model()
    pieces = list(zip(inputs.chunk(NUM_MICRO_BATCHES), targets.chunk(NUM_MICRO_BATCHES), strict=True))
    for _ in range(steps):
        model.zero_grad(set_to_none=False)
        for piece, target in pieces:
            case.loss(model(piece), target).backward()
    footprint.sample()
    assert footprint.peak_bytes is not None
    assert footprint.start_bytes is not None
    return footprint.peak_bytes - footprint.start_bytes


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    name, steps = sys.argv[1:]
    sys.stdout.write(f"{grown_bytes(name, steps=int(steps))}\n")
