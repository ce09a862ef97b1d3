"""What evaluations are computed on, and by: loaders' samplers, steps of their own, gradients inside."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import dnb
from dnb.errors import ArgumentError, PlanError
from tests.engines.pools import wait
from tests.models import digits, mlp

pytestmark = pytest.mark.engines


def fit(pool, model, **options):
    return wait(pool.fit(model, digits(256), **{"loss": "cross_entropy", "lr": 1e-3, "epochs": 1, **options}))


def loss_of(model, samples):
    inputs, targets = digits()
    model.eval()
    with torch.no_grad():
        return functional.cross_entropy(model(inputs[samples]), targets[samples]).item()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 32, "sampler": SubsetRandomSampler(range(256, 333))},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(range(256, 333)), 20, drop_last=False)},
    ],
    ids=["sampler", "batch sampler"],
)
def test_an_evaluation_has_the_samples_that_the_loader_s_sampler_draws(pool, options):
    model = mlp()
    run = fit(pool, model, val=DataLoader(TensorDataset(*digits()), **options))
    assert run.history["val_loss"][-1] == pytest.approx(loss_of(model, range(256, 333)), rel=1e-10)


def test_an_evaluation_without_the_last_batch_leaves_it_out(pool):
    model = mlp()
    run = fit(pool, model, val=DataLoader(TensorDataset(*digits(300)), batch_size=64, drop_last=True))
    assert run.history["val_loss"][-1] == pytest.approx(loss_of(model, range(256)), rel=1e-10)


def test_a_sample_that_is_drawn_twice_counts_twice_and_every_evaluation_draws_anew(pool):
    def sampler():
        return WeightedRandomSampler(torch.ones(1797), 100, generator=torch.Generator().manual_seed(3))

    model, drawn = mlp(), sampler()
    run = fit(pool, model, val=DataLoader(TensorDataset(*digits()), 32, sampler=sampler()), epochs=2)
    list(drawn)  # those of the first evaluation
    assert run.history["val_loss"][-1] == pytest.approx(loss_of(model, list(drawn)), rel=1e-10)


def test_a_sampler_of_val_that_raises_is_named(pool):
    class Broken(torch.utils.data.Sampler):
        def __iter__(self):
            raise ValueError("no more")

        def __len__(self):
            return 10

    run = pool.fit(
        mlp(), digits(64), val=DataLoader(TensorDataset(*digits()), 5, sampler=Broken()), loss="cross_entropy"
    )
    with pytest.raises(dnb.RunError, match="in the sampler of val"):
        run.wait(timeout_seconds=60)


def penalized(model, batch):
    inputs = batch[0].clone().requires_grad_()
    output = model(inputs)
    (slope,) = torch.autograd.grad(output.pow(2).sum(), inputs, create_graph=True)
    return functional.cross_entropy(output, batch[1]) + slope.pow(2).mean()


def test_a_step_that_looks_at_gradients_is_evaluated_with_them(pool):
    model = nn.Sequential(nn.Linear(64, 10))
    run = fit(pool, model, loss=None, step=penalized, val=digits(100))
    assert run.history["val_loss"][-1] == pytest.approx(penalized(model, digits(100)).item(), rel=1e-10)


def root(model, batch):
    """No mean over samples: what a batch is made of shows."""
    error = functional.mse_loss(model(batch[0]), functional.one_hot(batch[1], 10).to(batch[0].dtype))
    return error.sqrt(), {"right": (model(batch[0]).argmax(1) == batch[1]).to(batch[0].dtype).mean()}


def test_a_step_of_its_own_evaluates_the_batches_of_the_validation_loader(pool):
    model = mlp()
    run = fit(pool, model, val=DataLoader(TensorDataset(*digits(333)), batch_size=50), val_step=root)
    inputs, targets = digits(333)
    model.eval()
    with torch.no_grad():
        parts = [(len(x), *root(model, (x, y))) for x, y in zip(inputs.split(50), targets.split(50), strict=True)]
    assert run.history["val_loss"][-1] == pytest.approx(sum(n * loss.item() for n, loss, _ in parts) / 333, rel=1e-10)
    right = sum(n * found["right"].item() for n, _, found in parts) / 333
    assert run.history["val_right"][-1] == pytest.approx(right, rel=1e-10)


def test_a_resumed_run_evaluates_as_it_did(pool):
    loader = DataLoader(TensorDataset(*digits()), batch_size=50, sampler=SubsetRandomSampler(range(300, 433)))
    run = fit(pool, mlp(), val=loader, val_step=root, checkpoint_every=4)
    again = wait(dnb.resume(run.folder, epochs=2))
    inputs, targets = digits(433)
    again.model.eval()
    assert len(again.history["val_loss"]) == 2
    assert again.history["val_right"][-1] == pytest.approx(
        (again.model(inputs[300:]).argmax(1) == targets[300:]).double().mean().item()
    )


def test_a_val_step_without_validation_data_is_refused(pool):
    with pytest.raises(ArgumentError, match="val_step is called with the batches of val, and there is none: give val"):
        fit(pool, mlp(), val_step=root)


def test_a_pipeline_refuses_a_val_step(pool):
    with pytest.raises(PlanError, match="a pipeline cannot call val_step"):
        fit(pool, mlp(), val=digits(50), val_step=root, strategy="pipeline")
