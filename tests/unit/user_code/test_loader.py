from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dnb.job import DataSource
from dnb.user_code.loader import fetch_batch


class Squares(Dataset):
    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        return torch.tensor([float(index)]), index**2


class SquaresAtOnce(Squares):
    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        self.asked.append(indices)
        return [(torch.tensor([float(index)]), index**2) for index in indices]


INDICES = torch.tensor([3, 1, 3])


def test_tensors_are_indexed_at_once():
    source = DataSource(samples=(torch.arange(20.0).view(10, 2), torch.arange(10)), collate=None)
    x, y = fetch_batch(source, INDICES)
    assert (x.tolist(), y.tolist()) == ([[6.0, 7.0], [2.0, 3.0], [6.0, 7.0]], [3, 1, 3])


def test_tensors_that_lie_otherwise_give_the_same_rows():
    source = DataSource(samples=(torch.arange(20.0).view(2, 10).t(),), collate=None)
    (x,) = fetch_batch(source, INDICES)
    assert x.tolist() == [[3.0, 13.0], [1.0, 11.0], [3.0, 13.0]]


def test_a_data_set_is_asked_for_each_sample_by_a_plain_integer():
    samples = Squares()
    fetch_batch(DataSource(samples=samples, collate=default_collate), INDICES)
    assert samples.asked == [3, 1, 3]
    assert {type(index) for index in samples.asked} == {int}


def test_a_data_set_that_can_is_asked_for_all_samples_at_once():
    samples = SquaresAtOnce()
    fetch_batch(DataSource(samples=samples, collate=default_collate), INDICES)
    assert samples.asked == [[3, 1, 3]]


@pytest.mark.parametrize("kind", [Squares, SquaresAtOnce])
def test_a_batch_is_the_one_that_a_loader_makes(kind: type[Squares]):
    x, y = fetch_batch(DataSource(samples=kind(), collate=default_collate), INDICES)
    wanted_x, wanted_y = next(iter(DataLoader(kind(), batch_sampler=[[3, 1, 3]])))
    assert torch.equal(x, wanted_x)
    assert torch.equal(y, wanted_y)


def test_the_collate_function_of_a_loader_is_called_with_the_samples():
    source = DataSource(samples=["a", "b", "c", "d"], collate="".join)
    assert fetch_batch(source, INDICES) == "dbd"
