"""One process that computes gradients and nothing else: what a training needs beside parameters and gradients."""

from __future__ import annotations

import time

from benchmarks.models import CASES
from benchmarks.rivals.messages import Line, Progress, Train, Trained
from benchmarks.rivals.rank import serve


def train(request: Train, line: Line) -> Trained:
    """Go through one batch again and again; the gradients keep their memory."""
    case = CASES[request.case]
    inputs, targets = (part[: case.batch_per_engine] for part in case.data())
    model = case.make_model()
    ends: list[float] = []
    for _ in range(request.steps):
        model.zero_grad(set_to_none=False)
        case.loss(model(inputs), targets).backward()
        ends.append(time.monotonic())
        if len(ends) == request.progress_at:
            line.send(Progress())
    return Trained(ends=ends, first_step_wall=0.0)


if __name__ == "__main__":
    serve(train)
