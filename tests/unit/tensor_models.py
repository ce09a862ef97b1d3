"""Models whose layers can be divided, in ways that differ."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Queries, keys and values by layers of their own.

    Args:
        width: of the residual stream.
        heads: of which `view` is told by number.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, time, _ = x.shape
        q, k, v = (
            layer(x).view(rows, time, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer's layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.early = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.late = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.early(x))
        return x + self.down(self.dropout(functional.gelu(self.up(self.late(x)))))


class DividableGPT(nn.Module):
    """Embedding and head are one weight."""

    def __init__(
        self, *, width: int = 16, heads: int = 4, num_blocks: int = 2, num_words: int = 20, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(num_words, width)
        self.places = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NormedHeads(nn.Module):
    """A norm whose one weight all heads use: each engine would have a part of its gradient only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(4)
        self.down = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x).view(len(x), -1, 4)).flatten(1))


class Softened(nn.Module):
    """A softmax over all features, of which an engine has only some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).softmax(-1))


class Leaking(nn.Module):
    """What is between two layers is seen from outside, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.up(x).relu()
        return self.down(hidden), hidden.mean()


class Planned(nn.Module):
    """Has a plan of its own, as transformers of Hugging Face have."""

    def __init__(self, plan: dict[str, str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(8, 16), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)
        self._tp_plan = plan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](functional.silu(layer["gate"](x)) * layer["up"](x))
        return self.head(x)


class FailingAt(nn.Module):
    """Raises on one engine when a file is there, or ends its process."""

    def __init__(self, path: str, rank: int, *, kills: bool = False) -> None:
        super().__init__()
        self.path, self.rank, self.kills = path, rank, kills

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.path.exists(self.path) and dist.is_initialized() and dist.get_rank() == self.rank:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("layer out of order")
        return x


class SpareAndFrozen(nn.Module):
    """A divided pair that is never used, one that is not trained, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spare = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
        self.frozen = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).requires_grad_(False)
        self.used = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(self.frozen(x))


def text(num_samples: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences in which a word depends on the one before it, and the next words."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(1, 4, (num_samples, 13), generator=generator)
    words = steps.cumsum(1) % 20
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


def next_word_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def next_word_step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    words, target = batch
    return next_word_loss(model(words), target)


class Padded(nn.Module):
    """A table of words, one of which stands for nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8, padding_idx=3)
        self.head = nn.Linear(8, 20)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(words))
