"""A loss over the whole batch, against DistributedDataParallel over gloo with an all-gather of outputs by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.models import CASES, LEARNING_RATE, Case
from benchmarks.ours import open_side
from benchmarks.pairs import alternate, compare
from benchmarks.rivals.gang import Gang
from benchmarks.rivals.messages import FIRST_LOSSES, Train, Trained
from benchmarks.rows.step import DDP, WARM_STEPS, ddp_seconds, train_ours, warm_steps
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row

REACH = 1.1
NUM_ENGINES = 2
# Relative, of the first losses: two orders of sums in float32.
SAME = 1e-4


def rows(settings: Settings) -> Iterator[Row]:
    """One row: InfoNCE on a CNN; and what gathering costs beside a loss over samples."""
    case = CASES["contrast"]
    with open_side(NUM_ENGINES) as side, Gang(DDP, num_ranks=NUM_ENGINES) as gang:
        _check_rival(case, gang)
        rival = partial(ddp_seconds, gang, case, variant="bucket_view", gathers=True)
        steps = settings.steps_for(rival(steps=WARM_STEPS + case.probe_steps))
        steps += warm_steps(steps)
        sides = {
            "gathered": partial(train_ours, side, case, steps=steps, loss_over="batch"),
            "DDP": partial(rival, steps=steps),
            "samples": partial(train_ours, side, CASES["cnn"], steps=steps),
        }
        figures = alternate(sides, rounds=settings.pairs)
    details = {"case": case.text, "steps_per_turn": steps}
    yield compared_row(
        f"gathered {case.name} N={NUM_ENGINES}",
        compare(figures["gathered"], figures["DDP"]),
        unit="ms",
        scale=1e3,
        reach=REACH,
        details=details,
    )
    yield compared_row(
        f"gathered {case.name} N={NUM_ENGINES} beside cross entropy",
        compare(figures["gathered"], figures["samples"]),
        unit="ms",
        scale=1e3,
        reach=None,
        details=details,
    )


def _check_rival(case: Case, gang: Gang) -> None:
    """See that the ranks train what one process trains on their batches.

    Raises:
        ValueError: they do not.
    """
    first = gang.turn(Train(case=case.name, steps=FIRST_LOSSES, gathers=True))[0]
    assert isinstance(first, Trained)
    plain = _plain_losses(case)
    if any(abs(ours - theirs) > SAME * abs(theirs) for ours, theirs in zip(first.first_losses, plain, strict=True)):
        raise ValueError(f"the rival trains something else: {first.first_losses}, and one process {plain}")


def _plain_losses(case: Case) -> list[float]:
    inputs, targets = case.data()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    model = case.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    losses = []
    for indices in order.split(case.batch_per_engine * NUM_ENGINES)[:FIRST_LOSSES]:
        optimizer.zero_grad()
        loss = case.loss(model(inputs[indices]), targets[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
