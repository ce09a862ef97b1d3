"""Sampler, generator and scheduler of the notebook after a run, held against a loop over the loader itself."""

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from dnb.api.arguments.data import order_of
from dnb.api.arguments.data_sources import read_source
from dnb.api.runs.write_back import OrderFollower, give_scheduler_home
from dnb.planning.sample_order import count_batches
from dnb.transport.state_trees import put_together, take_items_apart


def seeded(number=7):
    return torch.Generator().manual_seed(number)


def loader(**options):
    return DataLoader(TensorDataset(torch.arange(10.0), torch.arange(10)), 4, **options)


class Turning(Sampler):
    """A sampler that keeps count of its epochs."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 10

    def __iter__(self):
        self.epoch += 1
        return iter([(index + self.epoch) % 10 for index in range(10)])


def shuffled():
    return loader(shuffle=True, generator=seeded())


def of_own_sampler():
    return loader(sampler=RandomSampler(range(10), generator=seeded()))


def weighted():
    return loader(sampler=WeightedRandomSampler([1.0] * 10, 10, generator=seeded()), generator=seeded(3))


def walk(own, num_steps):
    """A local loop: epoch after epoch, left in the middle of one if the steps end there."""
    seen = 0
    while seen < num_steps:
        for _ in own:
            seen += 1
            if seen == num_steps and num_steps % len(own):
                return


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("make", [shuffled, of_own_sampler, weighted])
def test_generators_are_where_a_loop_over_the_loader_leaves_them(make, num_steps):
    own, plain = make(), make()
    order = order_of(read_source(own, name="train", seed=0), batch_size=4, shuffle=True, seed=0)
    follower = OrderFollower(order, steps_per_epoch=count_batches(order))
    follower.follow(1)  # where it had paused
    follower.follow(num_steps)
    walk(plain, num_steps)
    assert own.sampler.generator.get_state().equal(plain.sampler.generator.get_state())
    if own.generator is not None:
        assert own.generator.get_state().equal(plain.generator.get_state())


def test_a_sampler_has_counted_its_epochs_and_drawn_nothing_from_the_notebook_s_generators():
    before = torch.random.get_rng_state()
    own = loader(sampler=Turning())
    order = order_of(read_source(own, name="train", seed=0), batch_size=4, shuffle=True, seed=0)
    OrderFollower(order, steps_per_epoch=3).follow(6)
    assert own.sampler.epoch == 2
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4]),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, cycle_momentum=False),
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    ],
)
def test_a_scheduler_goes_on_from_where_that_of_the_hub_is(make):
    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, make(optimizer)

    def step(optimizer, scheduler):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))

    (own_optimizer, own), (optimizer, theirs) = made(), made()
    for _ in range(3):
        step(optimizer, theirs)
    trees, tensors, _ = take_items_apart(theirs.state_dict(), root="scheduler")
    own_optimizer.load_state_dict(optimizer.state_dict())
    give_scheduler_home(own, put_together(trees, tensors))
    for _ in range(4):
        step(optimizer, theirs)
        step(own_optimizer, own)
        assert own_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
