"""Losses that look at the whole batch: the answer of one process, whoever computed the outputs."""

import contextlib
import os
import signal

import pytest
import torch
from torch import nn

from dnb.errors import ArgumentError, PlanError, RunError
from tests.engines.pools import go_on_and_stop, wait, wait_until
from tests.models import digits, dropout_net, largest_gap, largest_relative_gap, plain_run, twice
from tests.unit.engine.replicas.test_gathered_loss import LOSSES

pytestmark = [pytest.mark.engines, pytest.mark.numeric]

NUM_STEPS = 50


def encoder():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def deep_encoder():
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 16))


def contrastive(output, target):
    """InfoNCE between the halves of each embedding, with the others of the batch as negatives."""
    left, right = nn.functional.normalize(output, dim=1).chunk(2, dim=1)
    return nn.functional.cross_entropy(left @ right.t() * 10, torch.arange(len(output)))


def step_of(loss):
    def step(model, batch):
        *inputs, target = batch
        return loss(model(*inputs), target)

    return step


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_the_first_50_losses_are_those_of_a_plain_loop(pool_of, transport):
    model, plain = twice(encoder)
    run = pool_of.fit(
        model, digits(), loss=contrastive, loss_over="batch", lr=1e-3, steps=NUM_STEPS, transport=transport
    )
    wait(run)
    losses = plain_run(plain, digits(), num_steps=NUM_STEPS, step=step_of(contrastive)).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10
    assert largest_relative_gap(model, plain) <= 1e-10


@pytest.fixture
def three(shared, tmp_path, monkeypatch):
    """Three engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(3)
    shared.calm()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_many_kinds_are_those_of_a_plain_loop_on_three_engines_of_both_transports(three, name):
    make, loss = LOSSES[name]
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(300, 6, generator=generator), torch.randint(0, 4, (300,), generator=generator)
    model, plain = twice(make)
    transport = {three.engines[0].id: "socket"}
    run = wait(three.fit(model, data, loss=loss, loss_over="batch", lr=1e-3, steps=NUM_STEPS, transport=transport))
    losses = plain_run(plain, data, num_steps=NUM_STEPS, step=step_of(loss)).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10


def test_the_run_says_that_outputs_are_gathered(pool):
    run = wait(pool.fit(encoder(), digits(), loss=contrastive, loss_over="batch", steps=2))
    told = [event.text for event in run.events if event.kind == "loss"]
    assert told == ["this loss looks at the whole batch: outputs are gathered"]


class Dying:
    """A loss, or a layer, that ends its engine the first time that it is computed in a certain step."""

    def __init__(self, inner, *, mark, after):
        self.inner, self.mark, self.after = inner, mark, after
        self.count = 0

    def __call__(self, *given):
        self.count += 1
        if self.count > self.after:
            with contextlib.suppress(FileExistsError):
                self.mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(*given)


class DyingNet(nn.Module):
    """Random numbers and running statistics besides."""

    def __init__(self, mark=None, after=0):
        super().__init__()
        self.inner = dropout_net()
        self.act = nn.Tanh() if mark is None else Dying(nn.Tanh(), mark=mark, after=after)

    def forward(self, inputs):
        return self.act(self.inner(inputs))


def exact_run(pool, model, loss):
    options = {"optimizer": "sgd", "lr": 0.05, "batch_size": 60, "steps": 40, "exact": True, "shards": 4}
    run = wait(pool.fit(model, digits(600), loss=loss, loss_over="batch", **options))
    assert run.status == "finished"
    return run, model


@pytest.mark.faults
def test_an_engine_killed_in_either_half_of_an_exact_step_does_not_change_a_bit(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    wanted, plain = exact_run(shared.of(1), DyingNet(), contrastive)
    torch.manual_seed(0)
    dying = DyingNet(tmp_path / "forward", after=30)
    loss = Dying(contrastive, mark=tmp_path / "loss", after=25)
    run, model = exact_run(shared.of(3), dying, loss)
    assert [event.kind for event in run.events].count("died") == 2
    assert run.history["loss"] == wanted.history["loss"]
    ours, theirs = model.state_dict(), plain.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.faults
def test_a_hub_that_is_killed_in_an_exact_run_does_not_change_a_bit(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool, runs = shared.of(2), []
    for num_steps in (1_000_000, None):
        torch.manual_seed(0)
        run = pool.fit(DyingNet(), digits(600), loss=contrastive, lr=1e-3, exact=True, steps=num_steps or runs[0].step)
        if num_steps is not None:
            wait_until(run, lambda run: run.step >= 20, what="step 20")
            os.kill(pool.facts.hub.pid, signal.SIGKILL)
            go_on_and_stop(run, after="recovered")
        runs.append(wait(run))
    killed, quiet = runs
    assert killed.history["loss"] == quiet.history["loss"]
    ours, theirs = killed.model.state_dict(), quiet.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.faults
def test_engines_killed_between_the_halves_of_a_step_cost_nothing_of_the_loss(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, plain = twice(encoder)
    pool = shared.of(3)
    loss = Dying(contrastive, mark=tmp_path / "loss", after=7)
    run = wait(pool.fit(model, digits(), loss=loss, loss_over="batch", lr=1e-3, steps=NUM_STEPS))
    losses = plain_run(plain, digits(), num_steps=NUM_STEPS, step=step_of(contrastive)).losses
    assert [event.kind for event in run.events].count("died") == 1
    assert largest_gap(run.history["loss"], losses) <= 1e-10


def test_each_validation_batch_has_the_loss_of_one_process(pool):
    model = encoder()
    run = wait(
        pool.fit(model, digits(640), val=digits(300), loss=contrastive, loss_over="batch", batch_size=64, epochs=1)
    )
    pixels, targets = digits(300)
    model.eval()
    with torch.no_grad():
        parts = [
            contrastive(model(x), y).item() * len(x) for x, y in zip(pixels.split(64), targets.split(64), strict=True)
        ]
    assert run.history["val_loss"][-1] == pytest.approx(sum(parts) / 300, abs=1e-10)


def test_a_step_function_whose_loss_is_over_the_batch_is_refused_with_the_way_out(pool):
    with pytest.raises(ArgumentError, match=r"a step function does both at once: give loss=callable"):
        pool.fit(encoder(), digits(), step=step_of(contrastive), loss_over="batch")


def test_outputs_of_several_megabytes_are_gathered_on_either_transport(pool):
    """More than a record carries, and than a socket takes at once."""
    torch.manual_seed(0)
    model = nn.Linear(64, 100_000, dtype=torch.float32)
    pixels, targets = digits(160)
    first = pool.engines[0].id
    run = wait(
        pool.fit(
            model,
            (pixels.float(), targets),
            loss=spread,
            loss_over="batch",
            batch_size=160,
            steps=2,
            transport={first: "socket"},
        )
    )
    torch.manual_seed(0)
    plain = nn.Linear(64, 100_000, dtype=torch.float32)
    assert run.history["loss"][0] == pytest.approx(spread(plain(pixels.float()), None).item(), rel=1e-5)


def spread(output, _target):
    return output.std()


# pipelines


def test_a_pipeline_computes_the_loss_once_all_micro_batches_are_through(pool):
    model, plain = twice(encoder)
    run = wait(
        pool.fit(
            model,
            digits(640),
            val=digits(128),
            loss=contrastive,
            loss_over="batch",
            strategy="pipeline",
            lr=1e-3,
            steps=20,
        )
    )
    losses = plain_run(plain, digits(640), num_steps=20, step=step_of(contrastive)).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10
    assert largest_relative_gap(model, plain) <= 1e-10
    pixels, targets = digits(128)
    with torch.no_grad():
        parts = [contrastive(plain(x), y).item() for x, y in zip(pixels.split(64), targets.split(64), strict=True)]
    assert run.history["val_loss"][-1] == pytest.approx(sum(parts) / 2, abs=1e-10)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_pipeline_of_three_engines_does_under_every_schedule(three, schedule):
    model, plain = twice(deep_encoder)
    options = {"loss": contrastive, "strategy": "pipeline", "schedule": schedule, "lr": 1e-3, "steps": 10}
    run = wait(three.fit(model, digits(640), loss_over="batch", **options))
    losses = plain_run(plain, digits(640), num_steps=10, step=step_of(contrastive)).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10


def test_a_gathered_loss_that_is_not_finite_names_the_sample(pool):
    pixels, targets = digits(320)
    pixels = pixels.clone()
    pixels[200] = torch.nan
    run = pool.fit(encoder(), (pixels, targets), loss=contrastive, loss_over="batch", shuffle=False, lr=1e-3)
    told = r"the loss is nan \(this loss looks at the whole batch, and outputs or targets of sample 200 are not finite"
    with pytest.raises(RunError, match=f"paused at step 4: {told}"):
        wait(run)


def test_several_pipelines_cannot_have_a_loss_over_the_whole_batch(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"2 teams have a part of it each: mesh= with one team, or strategy='data'"):
        shared.of(4).fit(
            encoder(),
            digits(),
            loss=contrastive,
            loss_over="batch",
            strategy="hybrid",
            mesh={"data": 2, "pipeline": 2},
        )
