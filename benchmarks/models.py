"""What is trained, the same on both sides: models, data of the right shape, and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

LEARNING_RATE = 1e-3
NUM_SAMPLES = 4096
NUM_TOKENS = 256  # bytes
CONTEXT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training to time."""

    name: str
    text: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    batch_per_engine: int
    probe_steps: int  # about half a second's worth: what is measured later follows from it
    optimizer: str = "adamw"

    def make_model(self) -> nn.Module:
        """The model, with the same weights every time."""
        torch.manual_seed(0)
        return self.build()


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, tokens, width) in and out."""
        batch, length, width = x.shape
        heads = self.queries_keys_values(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        fed: torch.Tensor = self.feed(self.feed_norm(x))
        return x + fed


class CausalTransformer(nn.Module):
    """A small language model over bytes."""

    def __init__(self, *, width: int, num_blocks: int, num_heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_TOKENS, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads=num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_TOKENS, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, tokens, NUM_TOKENS)."""
        places = torch.arange(tokens.shape[1])
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits


class OneParameter(nn.Module):
    """Nothing but a gradient to exchange: its compute is one reading and one filling of it."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_elements))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, 1) in, (batch,) out."""
        return x[:, 0] * self.weight.sum()


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Two convolutions and two linear layers, for images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy over all tokens of all samples."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def first_output(output: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
    """The mean output itself is the loss."""
    return output.mean()


def info_nce(output: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
    """Contrast each sample of a batch with all others; the n-th last belongs to the n-th (van den Oord, 2018)."""
    rows = functional.normalize(output, dim=1)
    logits = (rows @ rows.t() / 0.1).fill_diagonal_(-1e9)
    return functional.cross_entropy(logits, torch.arange(len(rows)).flip(0))


def vectors(width: int, *, num_rows: int = NUM_SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows and one of ten classes for each."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(num_rows, width, generator=generator)
    return rows, torch.randint(0, 10, (num_rows,), generator=generator)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of 28 x 28 and one of ten classes for each."""
    rows, classes = vectors(28 * 28)
    return rows.view(-1, 1, 28, 28), classes


def token_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Random byte sequences, and the same shifted by one."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, NUM_TOKENS, (NUM_SAMPLES, CONTEXT + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def scalars() -> tuple[torch.Tensor, torch.Tensor]:
    """One number per sample."""
    rows, classes = vectors(1)
    return rows, classes


CASES = {
    case.name: case
    for case in (
        Case(
            name="mlp-17m",
            text="MLP, 17 M parameters, batch 128 per engine",
            build=lambda: mlp(2048, 2048, 2048, 2048, 2048, 10),
            data=lambda: vectors(2048),
            loss=functional.cross_entropy,
            batch_per_engine=128,
            probe_steps=3,
        ),
        Case(
            name="mlp-4m",
            text="MLP, 4 M parameters, batch 128 per engine",
            build=lambda: mlp(1024, 1024, 1024, 1024, 1024, 10),
            data=lambda: vectors(1024),
            loss=functional.cross_entropy,
            batch_per_engine=128,
            probe_steps=10,
        ),
        Case(
            name="mlp-17m-few",
            text="MLP, 17 M parameters, batch 128 per engine, 512 samples in all",
            build=lambda: mlp(2048, 2048, 2048, 2048, 2048, 10),
            data=lambda: vectors(2048, num_rows=512),
            loss=functional.cross_entropy,
            batch_per_engine=128,
            probe_steps=3,
        ),
        Case(
            name="gpt-3m",
            text="causal transformer, 3 M parameters, batch 16 x 64 tokens per engine",
            build=lambda: CausalTransformer(width=256, num_blocks=4, num_heads=4),
            data=token_rows,
            loss=token_loss,
            batch_per_engine=16,
            probe_steps=3,
        ),
        Case(
            name="contrast",
            text="InfoNCE over the whole batch on the CNN, 64 images of 28 x 28 per engine",
            build=cnn,
            data=images,
            loss=info_nce,
            batch_per_engine=64,
            probe_steps=10,
        ),
        Case(
            name="cnn",
            text="CNN, 0.4 M parameters, 64 images of 28 x 28 per engine",
            build=cnn,
            data=images,
            loss=functional.cross_entropy,
            batch_per_engine=64,
            probe_steps=10,
        ),
        Case(
            name="tiny",
            text="MLP, 0.01 M parameters, batch 32 per engine",
            build=lambda: mlp(64, 64, 64, 10),
            data=lambda: vectors(64),
            loss=functional.cross_entropy,
            batch_per_engine=32,
            probe_steps=200,
        ),
        Case(
            name="exchange-40mb",
            text="one parameter of 10 M elements, nothing to compute",
            build=lambda: OneParameter(10_000_000),
            data=scalars,
            loss=first_output,
            batch_per_engine=1,
            probe_steps=4,
            optimizer="sgd",
        ),
    )
}


def num_parameters(case: Case) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in case.make_model().parameters())
