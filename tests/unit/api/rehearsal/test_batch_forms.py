"""Batches are judged as collate_fn makes them, on the rehearsal's copies."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from dnb.api.rehearsal.rehearsal import RehearsedRun, rehearse
from dnb.errors import ArgumentError
from dnb.job import Data, DataSource, Job
from dnb.planning.sample_order import BatchOrder

X, Y = torch.randn(32, 6), torch.randint(0, 3, (32,))


def rehearsed(train: DataSource, val: DataSource | None = None, *, loss: Any = nn.functional.cross_entropy) -> None:
    job = Job(
        model=nn.Linear(6, 3),
        loss=loss,
        step=None,
        metrics={},
        optimizer="sgd",
        lr=None,
        scheduler=None,
        order=BatchOrder(num_samples=3, batch_size=2),
    )
    rehearse(job, Data(train=train, val=val))


def rehearsed_step(step: Any, targets: torch.Tensor) -> RehearsedRun:
    job = Job(
        model=nn.Linear(6, 3),
        loss=None,
        step=step,
        metrics={},
        optimizer="sgd",
        lr=None,
        scheduler=None,
        order=BatchOrder(num_samples=32, batch_size=8),
    )
    return rehearse(job, Data(train=DataSource(samples=(X, targets), collate=None), val=None))


class Keyed(Dataset):
    """Fails at its first sample, as a table does whose rows have names."""

    num_asked = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        self.num_asked += 1
        raise KeyError(index)


def rows(collate: Any) -> DataSource:
    return DataSource(samples=[{"x": x, "y": y} for x, y in zip(X[:3], Y[:3], strict=True)], collate=collate)


PAIR = DataSource(samples=(X, Y), collate=None)
KEYED = DataSource(samples=Keyed(), collate=default_collate)


def test_a_pair_that_collate_makes_of_dictionaries_is_a_pair():
    rehearsed(rows(lambda items: (torch.stack([i["x"] for i in items]), torch.stack([i["y"] for i in items]))))


def test_dictionaries_that_stay_so_are_refused_beside_a_loss():
    with pytest.raises(ArgumentError, match=r"a batch of train is a dict with names.*leave loss out"):
        rehearsed(rows(default_collate))


@pytest.mark.parametrize(("data", "name"), [((KEYED,), "train"), ((PAIR, KEYED), "val")], ids=["train", "val"])
def test_a_data_set_that_gives_no_batch_is_named_with_what_it_said(data: Any, name: str):
    match = rf"{name}, a Keyed, gives no batch of its first samples \(KeyError: 0\): give a pair"
    with pytest.raises(ArgumentError, match=match):
        rehearsed(*data)


def test_validation_batches_without_a_target_are_refused():
    with pytest.raises(ArgumentError, match="a batch of val is one element, so that the samples have no target"):
        rehearsed(PAIR, DataSource(samples=(X,), collate=None))


def test_a_data_set_is_not_asked_itself():
    rehearsed_set = Keyed()
    with pytest.raises(ArgumentError):
        rehearsed(DataSource(samples=rehearsed_set, collate=default_collate))
    assert rehearsed_set.num_asked == 0


def penalized(model: nn.Module, batch: Any) -> torch.Tensor:
    """A mean over targets beside a mean over samples."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + model(batch[0]).square().mean()


def test_a_sum_of_two_means_is_one_if_every_target_counts():
    assert rehearsed_step(penalized, Y).loss_over == "samples"


def test_a_sum_of_two_means_is_left_to_the_steps_if_some_targets_do_not_count():
    assert rehearsed_step(penalized, torch.cat([Y[:-1], torch.tensor([-100])])).reduction == "terms"
