"""Real data and small models for tests that train; importable on engines, as the repository is on their path."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dnb.job import Sum


def digits(num_samples: int = 1797) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of the default dtype, which they are exactly: sixteenths."""
    pixels, targets = load_digits(return_X_y=True)
    return torch.tensor(pixels[:num_samples] / 16, dtype=torch.get_default_dtype()), torch.tensor(targets[:num_samples])


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def batch_norm_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


class DigitRows(Dataset):
    """The digits one by one, as a user's own data set gives them."""

    def __init__(self) -> None:
        self.X, self.y = digits()

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixels": self.X[index], "target": self.y[index]}


def smooth_mlp() -> nn.Module:
    """Of float32 and without kinks: a rounding error moves its loss by as much, and flips no ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).float()


@contextmanager
def one_thread() -> Iterator[None]:
    """As the hub has, and an engine of an exact run; on a busy machine, a second one would mostly be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def plain_losses(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    num_steps: int,
    batch_size: int,
    seed: int = 0,
    lr: float = 1e-3,
    micro_batch: int | None = None,
) -> list[float]:
    """The loop that one process would run; trains the model in place."""
    loader = DataLoader(TensorDataset(*data), batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses: list[float] = []
    while len(losses) < num_steps:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = 0.0
            size = micro_batch or len(inputs)
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                part = nn.functional.cross_entropy(model(x), y) * (len(x) / len(inputs))
                part.backward()
                loss += part.item()
            optimizer.step()
            losses.append(loss)
            if len(losses) == num_steps:
                break
    return losses


def largest_gap(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


class Apart(NamedTuple):
    """How far two plain loops came from each other."""

    losses: float
    parameters: float


def one_process_apart(
    make: Callable[[], nn.Module], data: tuple[torch.Tensor, torch.Tensor], *, num_steps: int, batch_size: int = 64
) -> Apart:
    """How far one process comes from itself when it adds up the same gradients in other orders.

    What a run in float32 may differ by is measured by this, as it is rounding, too: by the kernels of this processor,
    for batches of these shapes, times what these steps make of it.
    """
    whole, *others = (make() for _ in range(4))
    options = {"num_steps": num_steps, "batch_size": batch_size}
    losses = plain_losses(whole, data, **options)
    cut = [
        plain_losses(model, data, micro_batch=size, **options) for model, size in zip(others, (32, 16, 8), strict=True)
    ]
    return Apart(
        max(largest_gap(each, losses) for each in cut),
        max(largest_relative_gap(model, whole) for model in others),
    )


# One process, written out: what runs are compared with


class Plain(NamedTuple):
    """What a plain loop saw."""

    losses: list[float]
    rates: list[float]  # of the first parameter group, before every step


def cross_entropy_step(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    *inputs, targets = batch
    return nn.functional.cross_entropy(model(*inputs), targets)


def adamw(parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> torch.optim.Optimizer:
    """The optimizer that dnb makes of the name "adamw"."""
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


@one_thread()
def plain_run(
    model: nn.Module,
    data: tuple[torch.Tensor, ...],
    *,
    num_steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    step: Callable[..., Any] = cross_entropy_step,
    batch_size: int = 64,
    shuffle: bool = True,
    clip_norm: float | None = None,
) -> Plain:
    """The loop that one process would run, for any step function; trains the model in place."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(*data), batch_size, shuffle=shuffle, generator=generator)
    optimizer = optimizer or adamw(model.parameters())
    plain = Plain([], [])
    model.train()
    for batch in islice(chain.from_iterable(repeat(loader)), num_steps):
        optimizer.zero_grad()
        loss = _mean_loss(step(model, batch))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        plain.losses.append(loss.item())
        plain.rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return plain


def _mean_loss(result: Any) -> torch.Tensor:
    loss = result[0] if isinstance(result, tuple) else result
    return loss.total / loss.weight if isinstance(loss, Sum) else loss


def largest_relative_gap(left: nn.Module, right: nn.Module) -> float:
    """Of any parameter or buffer, by its norm."""
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return max(_relative_gap(a.double(), b.double()) for a, b in pairs)


def _relative_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a - b).norm() / b.norm().clamp(min=1e-12)) if a.numel() else 0.0


# Models of every kind


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(inputs).relu()).relu())


class WithSpare(nn.Module):
    """A small and a large layer that are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(5, 3)
        self.used = nn.Linear(64, 10)
        self.large_spare = nn.Linear(128, 256)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)


class Branching(nn.Module):
    """A small and a large branch, each computed only if a sample of the batch wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(64, 10)
        self.small = nn.Linear(64, 10)
        self.large = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))

    def forward(self, inputs: torch.Tensor, wants: torch.Tensor) -> torch.Tensor:
        output = self.trunk(inputs)
        for column, branch in enumerate((self.small, self.large)):
            chosen = wants[:, column].nonzero().squeeze(1)
            if len(chosen):
                output = output.index_add(0, chosen, branch(inputs[chosen]))
        return output


class Odd(nn.Module):
    """Parameters that are not contiguous, and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(10, 64).div(8).t())
        self.strided = nn.Parameter(torch.randn(10, 2)[:, 0])
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.turned + self.strided + self.nothing.sum()


class ManyDtypes(nn.Module):
    """One layer per dtype."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, dtype=dtype) for dtype in dtypes)
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = layer(inputs.to(layer.weight.dtype)).tanh()
        return self.head(inputs.to(self.head.weight.dtype))


class Tokens(nn.Module):
    """Pixels as tokens, a word for each place and grey value, with sparse gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(64 * 17, width, sparse=True)
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        tokens = (inputs * 16).long() + torch.arange(64) * 17
        return self.head(self.words(tokens).mean(dim=1) * 8)


class ManyTensors(nn.Module):
    """A layer cut into many parameters."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(10) / 8 for _ in range(num_tensors))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        repeated = inputs.repeat(1, -(-len(self.rows) // 64))[:, : len(self.rows)]
        return repeated @ torch.stack(list(self.rows)) * 64 / len(self.rows)


class Checkpointed(nn.Module):
    """A layer that backward comes to twice: inside a re-entrant checkpoint and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.twice(inputs).tanh()
        return self.head(checkpoint(self.twice, hidden, use_reentrant=True))


def transformer(*, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


def twice(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two models with the same parameters: one for the engines, one for the plain loop."""
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(0)
    return first, make()


class LowRank(nn.Module):
    """A frozen layer and adapters of low rank beside it, kept by name as peft keeps them."""

    def __init__(self, layer: nn.Linear, *, rank: int, dropout: float) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.active = ["default"]
        self.scaling = {"default": 2.0}
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(inputs)
        for name in self.active:
            if name not in self.lora_A:
                continue
            narrow, wide = self.lora_A[name], self.lora_B[name]
            dropped = self.lora_dropout[name](inputs.to(narrow.weight.dtype))
            output = output + wide(narrow(dropped)) * self.scaling[name]
        return output


class LowRankBlock(nn.Module):
    """Two adapted layers that look at one value, and what was there before added."""

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.q = LowRank(nn.Linear(width, width), rank=2, dropout=dropout)
        self.k = nn.Linear(width, width).requires_grad_(False)
        self.v = LowRank(nn.Linear(width, width), rank=2, dropout=dropout)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.tanh(self.q(inputs) * self.k(inputs)) + self.v(inputs)


def adapted_net(*, dropout: float = 0.0) -> nn.Module:
    """Frozen but for adapters of low rank."""
    torch.manual_seed(0)
    first, head = nn.Linear(64, 24).requires_grad_(False), nn.Linear(24, 10).requires_grad_(False)
    return nn.Sequential(first, *(LowRankBlock(24, dropout=dropout) for _ in range(3)), head)
