from __future__ import annotations

from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from dnb.planning.sample_order import BatchOrder, count_batches, iterate_batches

NUM_EPOCHS = 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epochs_of(loader: DataLoader) -> list[list[int]]:
    """What one process sees in some epochs of a loader whose samples are their own indices."""
    return [batch.tolist() for _ in range(NUM_EPOCHS) for batch in loader]


def batches_of(order: BatchOrder) -> list[list[int]]:
    """The same number of epochs of an order."""
    return [batch.tolist() for batch in islice(iterate_batches(order), NUM_EPOCHS * count_batches(order))]


# the order of a DataLoader -------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_samples", [9, 10, 12])
def test_the_order_is_that_of_a_seeded_loader(num_samples: int, shuffle: bool, drop_last: bool):
    loader = DataLoader(range(num_samples), batch_size=4, shuffle=shuffle, drop_last=drop_last, generator=seeded(3))
    order = BatchOrder(num_samples=num_samples, batch_size=4, shuffle=shuffle, drop_last=drop_last, seed=3)
    assert batches_of(order) == epochs_of(loader)


def test_the_order_does_not_depend_on_what_a_loader_does_with_its_samples():
    rows = [(torch.zeros(2), index) for index in range(10)]
    loader = DataLoader(rows, batch_size=4, shuffle=True, generator=seeded(3))
    order = BatchOrder(num_samples=10, batch_size=4, seed=3)
    assert batches_of(order) == [classes.tolist() for _ in range(NUM_EPOCHS) for _, classes in loader]


def test_a_generator_of_its_own_comes_before_the_seed():
    order = BatchOrder(num_samples=10, batch_size=4, seed=99, generator=seeded(5))
    assert batches_of(order) == epochs_of(DataLoader(range(10), batch_size=4, shuffle=True, generator=seeded(5)))


def test_a_sampler_with_replacement_draws_the_same_samples():
    def sampler() -> Any:
        return RandomSampler(range(10), replacement=True, num_samples=7, generator=seeded(5))

    order = BatchOrder(num_samples=10, batch_size=4, sampler=sampler())
    assert batches_of(order) == epochs_of(DataLoader(range(10), batch_size=4, sampler=sampler()))


def test_a_weighted_sampler_draws_the_same_samples():
    def sampler() -> Any:
        return WeightedRandomSampler([0.1, 0.2, 0.7], 10, generator=seeded(5))

    order = BatchOrder(num_samples=3, batch_size=4, sampler=sampler())
    assert batches_of(order) == epochs_of(DataLoader(range(3), batch_size=4, sampler=sampler()))


def test_a_sampler_without_a_generator_draws_like_that_of_a_loader_with_one():
    def loader_and_sampler() -> Any:
        return RandomSampler(range(10), generator=None)

    torch.manual_seed(8)
    wanted = epochs_of(DataLoader(range(10), batch_size=4, sampler=loader_and_sampler(), generator=seeded(5)))
    torch.manual_seed(8)
    order = BatchOrder(num_samples=10, batch_size=4, sampler=loader_and_sampler(), generator=seeded(5))
    assert batches_of(order) == wanted


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_sampler_deals_the_same_batches(drop_last: bool):
    def batch_sampler() -> Any:
        return BatchSampler(RandomSampler(range(10), generator=seeded(5)), 4, drop_last)

    order = BatchOrder(num_samples=10, batch_size=1, batch_sampler=batch_sampler())
    assert batches_of(order) == epochs_of(DataLoader(range(10), batch_sampler=batch_sampler()))


def test_a_list_of_batches_is_a_batch_sampler():
    order = BatchOrder(num_samples=6, batch_size=1, batch_sampler=[[5, 0], [1], [2, 3, 4]])
    assert batches_of(order)[:3] == [[5, 0], [1], [2, 3, 4]]


# claims of its own ---------------------------------------------------------------------------------------------


def test_every_sample_is_seen_once_in_every_epoch():
    batches = batches_of(BatchOrder(num_samples=10, batch_size=4))
    assert [sorted(chain.from_iterable(batches[i : i + 3])) for i in (0, 3, 6)] == [list(range(10))] * 3


def test_epochs_differ():
    batches = batches_of(BatchOrder(num_samples=50, batch_size=50))
    assert batches[0] != batches[1]


def test_two_walks_over_one_order_are_equal():
    order = BatchOrder(num_samples=10, batch_size=4, seed=3)
    assert batches_of(order) == batches_of(order)


def test_batches_are_int64():
    assert next(iterate_batches(BatchOrder(num_samples=3, batch_size=2))).dtype == torch.int64


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    batches_of(BatchOrder(num_samples=10, batch_size=4))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(("drop_last", "num_batches"), [(False, 3), (True, 2)])
def test_the_last_short_batch_is_counted_unless_it_is_dropped(drop_last: bool, num_batches: int):
    assert count_batches(BatchOrder(num_samples=10, batch_size=4, drop_last=drop_last)) == num_batches


def test_batches_of_a_sampler_are_counted_by_its_length():
    order = BatchOrder(num_samples=100, batch_size=4, sampler=SequentialSampler(range(10)))
    assert count_batches(order) == 3


@pytest.mark.timeout(20)
def test_an_order_without_batches_ends():
    assert list(iterate_batches(BatchOrder(num_samples=3, batch_size=4, drop_last=True))) == []
