"""The samples of every step, and their order, are a seeded DataLoader's, for one engine and for two."""

import os
from itertools import chain, islice, repeat
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

from dnb.api.rehearsal.trial import PROBE_SAMPLES
from dnb.planning.shards import choose_num_shards, deal_shards, shard_bounds
from tests.engines.pools import wait

pytestmark = [pytest.mark.engines, pytest.mark.float32]

of_engines = pytest.mark.parametrize("num_engines", [1, 2], indirect=True, ids="{}_engines".format)


class Ledger(Dataset):
    """Writes down which process asked for which sample, in the order in which it did."""

    def __init__(self, folder: Path, num_samples: int = 50) -> None:
        self.folder = folder
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        with open(self.folder / f"{os.getpid()}.txt", "a") as file:
            file.write(f"{index}\n")
        return torch.tensor([float(index)])


class EvenFirst(Sampler):
    """A sampler of the user's own, of fewer samples than there are."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples - 5

    def __iter__(self):
        return iter([*range(0, self.num_samples, 2), *range(1, self.num_samples, 2)][: len(self)])


class Growing(Sampler):
    """Batches of 4, 5, 6, ... samples, other ones in every epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self):
        self.epoch += 1
        return iter([list(range(self.epoch + size, self.epoch + 2 * size)) for size in range(4, 9)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


LOADERS = {
    "shuffled_with_a_short_last_batch": lambda data: DataLoader(data, 8, shuffle=True, generator=seeded()),
    "in_order": lambda data: DataLoader(data, 8, shuffle=False),
    "without_the_last_batch": lambda data: DataLoader(data, 8, shuffle=True, drop_last=True, generator=seeded(3)),
    "batches_of_one": lambda data: DataLoader(data, 1, shuffle=True, generator=seeded()),
    "custom_sampler": lambda data: DataLoader(data, 8, sampler=EvenFirst(len(data))),
    "custom_batch_sampler": lambda data: DataLoader(data, batch_sampler=Growing()),
    "batch_sampler_of_torch": lambda data: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data, generator=seeded(5)), 7, drop_last=False)
    ),
    "with_replacement": lambda data: DataLoader(
        data, 8, sampler=RandomSampler(data, replacement=True, num_samples=70, generator=seeded(7))
    ),
    "weighted": lambda data: DataLoader(
        data, 8, sampler=WeightedRandomSampler(torch.arange(1.0, len(data) + 1), 30, generator=seeded(9))
    ),
}


def mean_step(model, batch):
    return model(batch).mean() * 0.0


def expected_batches(loader, num_steps):
    return list(islice(chain.from_iterable(repeat(loader)), num_steps))


def train(pool, data, **options):
    return wait(pool.fit(torch.nn.Linear(1, 1), data, step=mean_step, **options))


def check_ledger(folder, engines, batches, *, num_shards):
    """Every engine asked for its own part of every batch, in order; each is held against the notebook before."""
    probe = list(range(PROBE_SAMPLES))
    expected = {engine.pid: [] for engine in engines}
    for batch in batches:
        bounds = shard_bounds(len(batch), num_shards=num_shards)
        for number, shards in deal_shards(range(num_shards), range(len(engines))).items():
            expected[engines[number].pid] += batch[bounds[shards[0]][0] : bounds[shards[-1]][1]]
    seen = {int(path.stem): [int(line) for line in path.read_text().split()] for path in folder.glob("*.txt")}
    del seen[os.getpid()]  # the rehearsal's
    assert seen == {pid: probe + numbers for pid, numbers in expected.items() if numbers}


@of_engines
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_s_batches_are_those_of_one_process(pool_of, tmp_path, name):
    data = Ledger(tmp_path)
    make = LOADERS[name]
    loader = make(data)
    num_steps = 2 * len(loader) + 2  # ends in mid-epoch
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", len(data) // len(loader))
    train(pool_of, loader, steps=num_steps)
    batches = expected_batches(list_loader(make, data), num_steps)
    check_ledger(
        tmp_path, pool_of.engines, batches, num_shards=choose_num_shards(len(pool_of.engines), batch_size=batch_size)
    )


@of_engines
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("steps", [3, 7, 15])
def test_a_data_set_s_batches_are_those_of_a_seeded_loader(pool_of, tmp_path, shuffle, steps):
    data = Ledger(tmp_path)
    train(pool_of, data, steps=steps, batch_size=8, shuffle=shuffle, seed=11)
    loader = list_loader(lambda d: DataLoader(d, 8, shuffle=shuffle, generator=seeded(11)), data)
    num_shards = choose_num_shards(len(pool_of.engines), batch_size=8)
    check_ledger(tmp_path, pool_of.engines, expected_batches(loader, steps), num_shards=num_shards)


def list_loader(make, data):
    """The same loader in one process, over the numbers of the samples."""
    loader = make(data)
    collate = {"collate_fn": list, "generator": loader.generator}
    numbers = range(len(data))
    if loader.batch_size is None:
        return DataLoader(numbers, batch_sampler=loader.batch_sampler, **collate)
    return DataLoader(numbers, loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last, **collate)
