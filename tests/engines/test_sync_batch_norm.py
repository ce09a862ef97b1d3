"""BatchNorm with the statistics of the global batch: the answer of one process, on any number of engines."""

import os
import signal

import pytest
import torch
from torch import nn

from dnb.errors import ArgumentError, PlanError
from tests.engines.pools import wait, wait_until
from tests.models import batch_norm_net, digits, largest_gap, largest_relative_gap, plain_losses, twice

pytestmark = pytest.mark.engines


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.BatchNorm2d(1, affine=False),  # of the pixels, which want no gradient
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.Tanh(),
        nn.Flatten(),
        nn.BatchNorm1d(144, affine=False),
        nn.Linear(144, 10),
    )


def train(pool, model, *, num_samples=300, **options):
    data = digits(num_samples)
    return wait(pool.fit(model, data, **{"loss": "cross_entropy", "steps": 12, **options}))


@pytest.mark.parametrize("make", [batch_norm_net, conv_net])
def test_losses_and_statistics_are_those_of_one_process(pool_of, make):
    model, plain = twice(make)
    run = train(pool_of, model, sync_batchnorm=True)  # the last batch of an epoch is short
    assert largest_gap(run.history["loss"], plain_losses(plain, digits(300), num_steps=12, batch_size=64)) < 1e-9
    assert largest_relative_gap(model, plain) < 1e-7


def test_sync_batch_norm_is_what_it_says_without_being_asked_for(pool):
    model, plain = twice(batch_norm_net)
    run = train(pool, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert largest_gap(run.history["loss"], plain_losses(plain, digits(300), num_steps=12, batch_size=64)) < 1e-9
    assert any("BatchNorm takes statistics of the whole batch" in event.text for event in run.events)


def test_batches_that_are_too_short_to_be_shared_are_computed_by_one_engine(pool):
    model, plain = twice(batch_norm_net)
    run = train(pool, model, num_samples=67, sync_batchnorm=True, steps=4)
    assert largest_gap(run.history["loss"], plain_losses(plain, digits(67), num_steps=4, batch_size=64)) < 1e-9


def test_micro_batches_and_evaluations_go_in_step(pool):
    run = train(pool, batch_norm_net(), sync_batchnorm=True, micro_batch=7, val=digits(101), epochs=2, steps=10)
    assert (run.status, len(run.history["val_loss"])) == ("finished", 2)


def test_a_killed_engine_lets_the_others_go_on_from_the_same_step(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = shared.of(3)
    model, plain = twice(batch_norm_net)
    run = pool.fit(model, digits(300), loss="cross_entropy", sync_batchnorm=True, steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="20 steps are done")
    os.kill(pool.engines[1].pid, signal.SIGKILL)
    died_at = run.step
    wait_until(run, lambda run: run.step >= died_at + 40, what="40 steps more are done")
    run.stop()
    wait(run)
    assert largest_gap(run.history["loss"][:60], plain_losses(plain, digits(300), num_steps=60, batch_size=64)) < 1e-7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exact": True}, "takes statistics over all engines, and exact=True computes each shard by itself"),
        ({"transport": "socket"}, "needs engines that share the hub's memory"),
        ({"strategy": "pipeline"}, "shares every batch among all engines, not the model"),
        ({"loss_over": "batch"}, "this loss looks at the whole batch, whose outputs are not gathered where BatchNorm"),
    ],
)
def test_what_cannot_go_with_it_is_refused(pool, options, words):
    with pytest.raises(PlanError, match=words):
        train(pool, batch_norm_net(), sync_batchnorm=True, **options)


def test_a_model_without_batch_norm_is_refused(pool):
    with pytest.raises(ArgumentError, match="the model has no BatchNorm: leave it out"):
        train(pool, nn.Linear(64, 10), sync_batchnorm=True)
