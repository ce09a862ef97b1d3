"""Runs of a real pool, held against one process by `run.prove`."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from dnb.errors import ArgumentError
from tests.engines.pools import wait, wait_until
from tests.models import digits, dropout_net, mlp

pytestmark = pytest.mark.engines

STEPS = 6


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Two engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(2)
    shared.calm()


def fit(pool, model, **options):
    return pool.fit(model, digits(), **{"loss": "cross_entropy", "batch_size": 64, "steps": STEPS, **options})


def test_a_run_is_proved_by_a_plain_loop_of_this_process(pool):
    model = mlp()
    run = wait(fit(pool, model, lr=1e-2, clip_norm=0.5))
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    proof = run.prove(STEPS)
    assert torch.equal(torch.rand(3), expected)  # nothing was drawn
    assert proof.is_same, proof.text
    assert [step.step for step in proof.steps] == list(range(1, STEPS + 1))
    assert [step.loss[1] for step in proof.steps] == pytest.approx(
        plain_losses_clipped(clip_norm=0.5, lr=1e-2), abs=1e-12
    )
    assert all(step.loss_gap <= 1e-10 for step in proof.steps)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def plain_losses_clipped(*, clip_norm, lr):
    model, (x, y) = mlp(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True, generator=generator
    )
    losses = []
    for (a, b), _ in zip(loader, range(STEPS), strict=False):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(a), b)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_pipeline_and_a_data_set_are_proved_likewise(pool):
    data = torch.utils.data.TensorDataset(*digits(640))
    run = wait(pool.fit(mlp(), data, loss="cross_entropy", batch_size=64, steps=STEPS, strategy="pipeline"))
    assert run.prove(STEPS).is_same


def halve(gradient):
    return gradient / 2


def clamp_last_layer(model):
    for parameter in list(model.parameters())[-2:]:
        parameter.clamp_(-0.05, 0.05)


def test_hooks_functions_after_a_step_and_schedulers_are_those_of_one_process(pool):
    model = mlp()
    next(model.parameters()).register_hook(halve)
    run = wait(
        fit(
            pool,
            model,
            after_step=clamp_last_layer,
            optimizer="sgd",
            lr=0.1,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        )
    )
    proof = run.prove(STEPS)
    assert proof.is_same, proof.text


def root_mean_square(output, target):
    return functional.mse_loss(output, functional.one_hot(target, 10).to(output.dtype)).sqrt()


def test_a_loss_over_the_batch_that_was_taken_for_a_mean_is_found_and_named(pool):
    run = wait(fit(pool, mlp(), loss=root_mean_square, loss_over="samples"))
    proof = run.prove(STEPS)
    first = proof.first_difference
    assert first is not None
    assert first.step == 1
    assert {each.name for each in first.differing} == {name for name, _ in mlp().named_parameters()}
    assert f"gradients that differ, by shares of their largest element: '{first.differing[0].name}' by" in proof.verdict
    assert any("the loss looks at the whole batch" in suspect for suspect in proof.suspects)


def test_dropout_is_named_where_its_numbers_differ(pool):
    proof = wait(fit(pool, dropout_net())).prove(STEPS)
    assert not proof.is_same
    assert any(suspect.startswith("dropout (") for suspect in proof.suspects)


def test_fit_proves_as_many_steps_as_asked_for_before_it_returns(pool, caplog):
    with caplog.at_level(logging.INFO, logger="dnb.api.launching"):
        run = fit(pool, mlp(), prove=25, steps=30)
    assert "the same: 25 steps of run" in caplog.text
    assert len(run.prove(25).steps) == 25
    wait(run)


def test_steps_behind_a_change_are_not_compared(pool):
    run = fit(pool, mlp(), steps=1_000_000)
    wait_until(run, lambda run: run.step >= 2, what="two steps")
    run.set(lr=0.5)
    run.stop()
    wait(run)
    changed = next(event.step for event in run.events if event.kind == "set")
    proof = run.prove(20)
    assert len(proof.steps) == min(changed, 20)
    assert proof.is_same


def test_a_run_that_another_has_followed_cannot_be_proved_any_more(pool):
    first = wait(fit(pool, mlp()))
    wait(fit(pool, mlp()))
    with pytest.raises(ArgumentError, match="prove a run before the next fit"):
        first.prove(STEPS)


def test_a_proof_says_where_a_scheduler_waits_for_an_evaluation(pool):
    run = pool.fit(
        mlp(),
        digits(128),
        val=digits(64),
        loss="cross_entropy",
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau,
        scheduler_every="epoch",
        steps=STEPS,
    )
    proof = wait(run).prove(STEPS)
    assert [step.step for step in proof.steps] == [1, 2]
    assert proof.is_same, proof.text
    assert "only up to step 2, after which the scheduler waits for an evaluation" in proof.text


class Noise(nn.Module):
    """Noise of a generator of its own."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.drawn = torch.Generator()

    def forward(self, inputs):
        return self.inner(inputs + 0.1 * torch.randn(inputs.shape, generator=self.drawn))


def test_a_generator_inside_the_model_is_named_where_its_numbers_differ(pool):
    proof = wait(fit(pool, Noise())).prove(STEPS)
    assert not proof.is_same
    assert proof.suspects[0].startswith("a random generator of your own ('drawn') draws other numbers in each part")


class Queue(nn.Module):
    """Compares with the last outputs, which it keeps."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("queue", torch.zeros(8, 10))

    def forward(self, inputs):
        output = self.inner(inputs) + self.queue.mean(0)
        if self.training:
            self.queue = torch.cat([self.queue, output.detach()])[-8:]
        return output


@pytest.mark.parametrize(("rules", "word"), [({}, "first"), ({"queue": "mean"}, "mean")])
def test_a_buffer_is_named_with_the_rule_by_which_those_of_engines_become_one(pool, rules, word):
    proof = wait(fit(pool, Queue(), buffers=rules)).prove(STEPS)
    assert not proof.is_same
    assert any(f"('queue' by the rule '{word}')" in suspect for suspect in proof.suspects), proof.text


def norm_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 10))


def test_statistics_of_the_whole_batch_are_those_of_one_process_and_of_micro_batches_are_named(pool):
    assert wait(fit(pool, norm_net(), sync_batchnorm=True)).prove(STEPS).is_same
    proof = wait(fit(pool, norm_net(), sync_batchnorm=True, micro_batch=8)).prove(STEPS)
    assert not proof.is_same
    assert any(
        "SyncBatchNorm ('1') takes its statistics of all engines' micro-batches of at most 8" in suspect
        for suspect in proof.suspects
    )


def test_statistics_of_each_part_are_named(pool):
    proof = wait(fit(pool, norm_net())).prove(STEPS)
    assert not proof.is_same
    assert any(suspect.startswith("BatchNorm ('1') takes its statistics from each part") for suspect in proof.suspects)


def test_a_scheduler_of_epochs_and_evaluations_change_nothing_of_a_proof(pool):
    run = pool.fit(
        mlp(),
        digits(128),
        val=digits(64),
        metrics="accuracy",
        loss="cross_entropy",
        optimizer="sgd",
        lr=0.1,
        micro_batch=16,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        scheduler_every="epoch",
        epochs=3,
    )
    proof = wait(run).prove(6)
    assert len(proof.steps) == 6
    assert proof.is_same, proof.text
