"""Fit after fit with the same objects: each goes on from where the one before has brought them."""

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tests.engines.pools import wait
from tests.models import cross_entropy_step, digits, largest_gap, mlp, twice

pytestmark = pytest.mark.engines


def parts(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 20)


def loader(kind):
    data, generator = TensorDataset(*digits(256)), torch.Generator().manual_seed(7)
    if kind == "shuffled":
        return DataLoader(data, 64, shuffle=True, generator=generator)
    return DataLoader(data, 64, sampler=WeightedRandomSampler([1.0] * 256, 256, generator=generator))


def epochs_of_one_process(model, data, optimizer, scheduler, *, epochs):
    losses, rates = [], []
    for batch in (batch for _ in range(epochs) for batch in data):
        optimizer.zero_grad()
        loss = cross_entropy_step(model, batch)
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, rates


@pytest.mark.parametrize("kind", ["shuffled", "weighted"])
def test_a_fit_per_epoch_trains_as_one_loop_over_the_loader_with_its_optimizer_and_scheduler(pool, kind):
    model, plain = twice(mlp)
    own, (optimizer, scheduler) = loader(kind), parts(model)
    losses, rates = [], []
    for _ in range(3):
        run = wait(pool.fit(model, own, loss="cross_entropy", optimizer=optimizer, scheduler=scheduler))
        losses += run.history["loss"]
        rates += run.history["lr"]
    plain_optimizer, plain_scheduler = parts(plain)
    expected = epochs_of_one_process(plain, loader(kind), plain_optimizer, plain_scheduler, epochs=3)
    assert largest_gap(losses, expected[0]) < 1e-10
    assert largest_gap(rates, expected[1]) < 1e-12
    assert scheduler.last_epoch == 12
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(plain_optimizer.param_groups[0]["lr"], abs=1e-12)
