"""Real data and small models for tests that train; importable on engines, as the repository is on their path."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def digits(num_samples: int = 1797) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, targets = load_digits(return_X_y=True)
    return torch.tensor(pixels[:num_samples] / 16, dtype=torch.float32), torch.tensor(targets[:num_samples])


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


def plain_losses(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    num_steps: int,
    batch_size: int,
    seed: int = 0,
    lr: float = 1e-3,
) -> list[float]:
    """The loop that one process would run; trains the model in place."""
    loader = DataLoader(TensorDataset(*data), batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses: list[float] = []
    while len(losses) < num_steps:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == num_steps:
                break
    return losses


def largest_gap(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
