"""The promise of exact=True: equal to the bit for any number and any change of engines."""

import os
import signal
import zlib
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnb.engine.replicas.outcome import part_seed
from dnb.planning.shards import shard_bounds
from dnb.transport.layout import plan_layout
from tests.engines.pools import let_join, start_engine, wait, wait_until
from tests.models import cnn, cross_entropy_step, digits, dropout_net, one_thread, transformer, twice

pytestmark = [pytest.mark.engines, pytest.mark.float32]

NUM_STEPS = 100  # two epochs end in it
BATCH_SIZE = 27  # no multiple of the shards
NUM_SAMPLES = 1001  # the last batch of an epoch has two samples, so that two of its shards are empty
NUM_SHARDS = 4


class Case(NamedTuple):
    """A model and how it is trained."""

    make: object
    optimizer: object
    clip_norm: float | None = None
    drop_last: bool = False


CASES = {
    "mlp_sgd": Case(dropout_net, partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True)),
    "mlp_adamw": Case(dropout_net, partial(torch.optim.AdamW, lr=1e-3, fused=True)),
    "cnn_adamw": Case(cnn, partial(torch.optim.AdamW, lr=1e-3, fused=True)),
    "transformer_clipped": Case(
        partial(transformer, dropout=0.1),
        partial(torch.optim.AdamW, lr=1e-3, fused=True),
        clip_norm=1.0,
    ),
}


def data():
    """Pixels, targets, and the number of each sample."""
    return (*digits(NUM_SAMPLES), torch.arange(NUM_SAMPLES))


def loader(*, drop_last=True):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*data()), BATCH_SIZE, shuffle=True, generator=generator, drop_last=drop_last)


def plain_step(model, batch):
    return cross_entropy_step(model, batch[:2])


class Scripted:
    """At one sample an engine dies, at another it tells the test and waits for its answer, each once.

    Args:
        dies_at: number of a sample.
        waits_at: likewise.
        folder: of the marks, and of the pipes "reached" and "answer".
    """

    def __init__(self, *, dies_at: int, waits_at: int, folder: Path) -> None:
        self.dies_at = dies_at
        self.waits_at = waits_at
        self.folder = folder
        os.mkfifo(folder / "reached")
        os.mkfifo(folder / "answer")

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        numbers = batch[2].tolist()
        if self.dies_at in numbers and self._is_first("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.waits_at in numbers and self._is_first("waited"):
            (self.folder / "reached").write_text("")
            (self.folder / "answer").read_text()
        return plain_step(model, batch)

    def _is_first(self, name: str) -> bool:
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def train(pool, name, *, step=plain_step, **options):
    case = CASES[name]
    model, _ = twice(case.make)
    return model, pool.fit(
        model,
        loader(drop_last=case.drop_last),
        step=step,
        optimizer=case.optimizer,
        clip_norm=case.clip_norm,
        steps=NUM_STEPS,
        exact=True,
        **options,
    )


# One process that walks over the shards


class Walked(NamedTuple):
    """What one process comes to."""

    model: nn.Module
    losses: list[float]
    digest: float


@cache
def walk(name):
    with one_thread():
        return _walk(CASES[name])


def _walk(case):
    model, _ = twice(case.make)
    parameters = list(model.parameters())
    optimizer = case.optimizer(parameters)
    model.train()
    losses, step, batches = [], 0, loader(drop_last=case.drop_last)
    while step < NUM_STEPS:
        for batch in batches:
            step += 1
            losses.append(_walk_step(model, batch, step=step))
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, case.clip_norm)
            optimizer.step()
            if step == NUM_STEPS:
                break
    return Walked(model, losses, _digest(model))


def _walk_step(model, batch, *, step):
    """Gradients added up in the order of the shards; buffers mixed; the mean loss."""
    parameters = list(model.parameters())
    buffers = dict(model.named_buffers())
    begin = {name: buffer.clone() for name, buffer in buffers.items()}
    num_samples = len(batch[0])
    gradients, seen, sizes, total = [torch.zeros_like(p) for p in parameters], [], [], 0.0
    for shard, (first, last) in enumerate(shard_bounds(num_samples, num_shards=NUM_SHARDS)):
        for name, buffer in buffers.items():
            buffer.copy_(begin[name])
        torch.default_generator.manual_seed(part_seed(0, step, shard))
        if last > first:
            loss = plain_step(model, [part[first:last] for part in batch]) * (last - first)  # so many targets count
            torch._foreach_add_(gradients, torch.autograd.grad(loss, parameters))
            total += loss.item()
        seen.append({name: buffer.clone() for name, buffer in buffers.items()})
        sizes.append(last - first)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.div_(num_samples)
    for name, buffer in buffers.items():
        buffer.copy_(_mixed([values[name] for values in seen], sizes))
    return total / num_samples


def _mixed(values, sizes):
    if not values[0].is_floating_point():
        return next(value for value, size in zip(values, sizes, strict=True) if size)
    mixed = torch.zeros_like(values[0], dtype=torch.float64)
    for value, size in zip(values, sizes, strict=True):
        mixed += value.double() * (size / sum(sizes))
    return mixed


def _digest(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [slot.name for slot in plan_layout(tensors.items()).slots]
    each = [zlib.crc32(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()) for name in names]
    return float(zlib.crc32(np.array(each, dtype=np.uint32).tobytes()))


def check_equal(model, run, walked):
    """Losses, digest and every tensor, to the bit."""
    assert run.status == "finished"
    assert run.history["loss"] == walked.losses
    assert run.history["digest"][-1] == walked.digest
    ours, theirs = model.state_dict(), walked.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_engines_comes_to_the_bits_of_one_process(pool_of, name):
    model, run = train(pool_of, name)
    wait(run)
    check_equal(model, run, walk(name))


def test_engines_on_either_transport_come_to_the_same_bits(pool_of):
    first = pool_of.engines[0].id
    model, run = train(pool_of, "cnn_adamw", transport={first: "socket"})
    wait(run)
    check_equal(model, run, walk("cnn_adamw"))


@pytest.mark.parametrize("name", ["mlp_sgd", "transformer_clipped"])
def test_an_engine_that_is_killed_and_one_that_joins_do_not_change_a_bit(pool, tmp_path, name):
    newcomer = start_engine(pool)
    numbers = [batch[2].tolist() for batch in loader(drop_last=CASES[name].drop_last)]
    script = Scripted(dies_at=numbers[19][0], waits_at=numbers[29][-1], folder=tmp_path)
    model, run = train(pool, name, step=script)
    (tmp_path / "reached").read_text()
    let_join(pool, newcomer)
    wait_until(run, partial(has_joined, engine=newcomer), what=f"engine {newcomer} takes part")
    (tmp_path / "answer").write_text("go on")
    wait(run)
    told = [(event.kind, event.step) for event in run.events if event.kind in ("died", "joined") and event.step]
    assert told == [("died", 19), ("joined", 29)]
    assert next(worker.samples for worker in run.workers if worker.engine == newcomer) > 0
    check_equal(model, run, walk(name))


def has_joined(run, *, engine):
    return any(event.kind == "joined" and event.engine == engine for event in run.events)
