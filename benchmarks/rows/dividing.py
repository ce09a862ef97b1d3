"""CPU time that `fit` takes of the notebook's process where it has to find out how a model can be cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.models import Block
from benchmarks.ours import Side, open_side
from benchmarks.pairs import spread
from benchmarks.settings import Settings
from benchmarks.table import Row

WORDS, WIDTH, LENGTH = 50_304, 768, 64
NUM_SAMPLES, BATCH_SIZE = 16, 8
# CPU seconds.
REACH = {"resnet-18": 2.0, "gpt-163m": 4.0}


class Residual(nn.Module):
    """Two convolutions, whose input is added in place, as in torchvision's ResNet-18."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        self.beside = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.beside = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the input."""
        y = self.second_norm(self.second(self.act(self.first_norm(self.first(x)))))
        y += self.beside(x)
        result: torch.Tensor = self.act(y)
        return result


def resnet() -> nn.Module:
    """A ResNet-18 for ten classes (He et al. 2016, table 1)."""
    widths = [64, 64, 128, 256, 512]
    blocks: list[nn.Module] = []
    for number, (before, width) in enumerate(pairwise(widths)):
        blocks += [Residual(before, width, stride=1 if number == 0 else 2), Residual(width, width, stride=1)]
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(512, 10))  # fmt: skip


def gpt() -> nn.Module:
    """The layers of a GPT-2 of 12 blocks, with a head of its own."""
    blocks = [Block(WIDTH, num_heads=12) for _ in range(12)]
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))


def word_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over all words of a batch."""
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(NUM_SAMPLES, 3, 32, 32), torch.randint(10, (NUM_SAMPLES,))


def _words() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(WORDS, (NUM_SAMPLES, LENGTH)), torch.randint(WORDS, (NUM_SAMPLES, LENGTH))


def rows(settings: Settings) -> Iterator[Row]:
    """One row per model; the first fit of a process imports what torch needs for it, too."""
    with open_side(2) as side:
        for name, make, data, loss in (
            ("resnet-18", resnet, _images(), functional.cross_entropy),
            ("gpt-163m", gpt, _words(), word_loss),
        ):
            seconds = [_cpu_seconds(side, make, data, loss) for _ in range(settings.pairs)]
            yield Row(
                name=f"fit {name} pipeline",
                unit="s of CPU",
                ours=spread(seconds),
                reach=REACH[name],
                figure=max(seconds),
                note="the slowest counts",
            )


def _cpu_seconds(side: Side, make: Callable[[], nn.Module], data: Any, loss: Callable[..., Any]) -> float:
    model = make()
    began = time.process_time()
    run = side.pool.fit(model, data, loss=loss, batch_size=BATCH_SIZE, steps=1, strategy="pipeline", optimizer="sgd")
    seconds = time.process_time() - began
    run.wait()
    return seconds
