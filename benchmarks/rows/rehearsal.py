"""CPU time that `fit` takes of the notebook's process to compute a few samples first, once and again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.models import NUM_TOKENS, Block, cnn, images, token_loss
from benchmarks.pairs import spread
from benchmarks.rows.dividing import resnet
from benchmarks.settings import Settings
from benchmarks.table import Row
from dnb.api.rehearsal.rehearsal import rehearse
from dnb.job import Data, DataSource, Job
from dnb.planning.sample_order import BatchOrder

LENGTH, WIDTH, BATCH_SIZE = 128, 256, 64
# CPU seconds, in a fresh process and for the same objects again.
REACH = {"cnn": (0.3, 0.05), "gpt-3m": (0.3, 0.05), "resnet-18": (None, None)}


def gpt() -> nn.Module:
    """A language model over bytes, of 3.3 M parameters."""
    blocks = [Block(WIDTH, num_heads=8) for _ in range(4)]
    return nn.Sequential(nn.Embedding(NUM_TOKENS, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NUM_TOKENS))


def rows(settings: Settings) -> Iterator[Row]:
    """Two rows per model; the first rehearsal of a process loads what torch needs for it, too."""
    for name, reach in REACH.items():
        measured = [_seconds_of(name) for _ in range(settings.pairs)]
        for place, how in enumerate(("first", "again")):
            seconds = [each[place] for each in measured]
            yield Row(
                name=f"rehearsal {name} {how}",
                unit="s of CPU",
                ours=spread(seconds),
                reach=reach[place],
                figure=max(seconds),
                note="the slowest counts; one thread",
            )


def _seconds_of(name: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.rows.rehearsal", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    first, again = map(float, told.split())
    return first, again


def _measure(name: str) -> list[float]:
    words = torch.randint(NUM_TOKENS, (512, LENGTH + 1))
    colours = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    cases: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Any]]] = {
        "cnn": (cnn, images(), nn.functional.cross_entropy),
        "gpt-3m": (gpt, (words[:, :-1].contiguous(), words[:, 1:].contiguous()), token_loss),
        "resnet-18": (resnet, colours, nn.functional.cross_entropy),
    }
    model, samples, loss = cases[name]
    job = Job(
        model=model(),
        loss=loss,
        step=None,
        metrics={},
        optimizer="sgd",
        lr=None,
        scheduler=None,
        order=BatchOrder(num_samples=len(samples[0]), batch_size=BATCH_SIZE),
    )
    found = []
    for _ in range(2):
        began = time.process_time()
        rehearse(job, Data(train=DataSource(samples=samples, collate=None), val=None))
        found.append(time.process_time() - began)
    return found


if __name__ == "__main__":
    print(*_measure(sys.argv[1]))
