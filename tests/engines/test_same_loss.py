"""The promise: the loss of one process, whoever did the work."""

from functools import cache

import pytest
import torch

from tests.engines.pools import wait
from tests.models import (
    batch_norm_net,
    digits,
    largest_gap,
    largest_relative_gap,
    mlp,
    one_process_apart,
    plain_losses,
    smooth_mlp,
)

pytestmark = [pytest.mark.engines, pytest.mark.numeric]


@pytest.fixture(scope="module")
def plain():
    model = mlp()
    return plain_losses(model, digits(), num_steps=50, batch_size=64), model


@pytest.fixture(scope="module", params=["memory", "socket"])
def trained(request, shared, num_engines, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        model = mlp()
        options = {"lr": 1e-3, "batch_size": 64, "steps": 50, "transport": request.param}
        run = shared.of(num_engines).fit(model, digits(), loss="cross_entropy", **options)
        wait(run)
    return run, model


def test_the_first_50_losses_are_those_of_a_plain_loop(trained, plain):
    run, _ = trained
    assert largest_gap(run.history["loss"], plain[0]) <= 1e-10


def test_the_notebook_s_model_ends_with_the_plain_loop_s_parameters(trained, plain):
    _, model = trained
    assert largest_relative_gap(model, plain[1]) <= 1e-10


def float32_digits():
    pixels, targets = digits()
    return pixels.float(), targets


@cache
def smooth_apart():
    return one_process_apart(smooth_mlp, float32_digits(), num_steps=50)


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_in_float32_the_losses_are_as_near_to_a_plain_loop_s_as_those_of_another_plain_loop(pool_of, transport):
    """Within 1e-6, four units in the last place of the first loss, where the processor's kernels allow it."""
    data = float32_digits()
    options = {"lr": 1e-3, "batch_size": 64, "steps": 50, "transport": transport}
    run = wait(pool_of.fit(smooth_mlp(), data, loss="cross_entropy", **options))
    losses = plain_losses(smooth_mlp(), data, num_steps=50, batch_size=64)
    apart = smooth_apart()
    assert apart.losses < 1e-5
    assert largest_gap(run.history["loss"], losses) <= max(1e-6, 4 * apart.losses)


def test_every_sample_of_every_batch_was_counted_once(trained):
    run, _ = trained
    per_epoch = 1797
    assert sum(worker.samples for worker in run.workers) == per_epoch + 64 * (50 - 29)


def test_batch_norm_statistics_come_home_and_do_not_depend_much_on_the_split(pool_of):
    model, plain = batch_norm_net(), batch_norm_net()
    wait(pool_of.fit(model, digits(), loss="cross_entropy", lr=1e-3, batch_size=256, steps=7))
    plain.train()
    plain_losses(plain, digits(), num_steps=7, batch_size=256)
    assert model[1].num_batches_tracked.item() == 7
    assert torch.allclose(model[1].running_mean, plain[1].running_mean, atol=0.05)
