"""Every kind of model trains on two engines as in one process, in shared memory and over sockets."""

import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnb.planning.shards import choose_num_shards, deal_shards, shard_bounds
from tests.engines.pools import wait
from tests.models import (
    Branching,
    Checkpointed,
    ManyDtypes,
    ManyTensors,
    Odd,
    Tied,
    Tokens,
    WithSpare,
    adamw,
    batch_norm_net,
    cross_entropy_step,
    digits,
    largest_gap,
    largest_relative_gap,
    mlp,
    one_process_apart,
    plain_run,
    transformer,
    twice,
)

pytestmark = [pytest.mark.engines, pytest.mark.parametrize("transport", ["memory", "socket"])]

CELL = """
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, inputs):
        return self.second(self.first(inputs).relu())
"""


def half_frozen():
    model = mlp()
    model[0].weight.requires_grad_(requires_grad=False)
    model[2].bias.requires_grad_(requires_grad=False)
    return model


def shared_module():
    shared = nn.Linear(64, 64)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(64, 10))


def ten_tensors():
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.Linear(64, 10))


def cell_class():
    scope = {"__name__": "__main__", "nn": nn}
    exec(CELL, scope)  # noqa: S102 - as a kernel runs a cell
    return scope["Cell"]()


def zero_grad_step(model, batch):
    model.zero_grad()
    return cross_entropy_step(model, batch)


def sgd(parameters):
    """For models with a parameter whose gradient is but rounding, which AdamW would blow up: a bias before a norm."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)


def unfused(parameters):
    """One process itself goes wrong otherwise: fused updates take every parameter for dense."""
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)


def decaying(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def in_groups(model):
    names = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in names.items() if name.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for name, p in names.items() if name.endswith("bias")], "lr": 1e-2},
        ],
        lr=1e-3,
    )


def train_both(pool, make, *, data=None, steps=12, transport, optimizer=adamw, make_optimizer=None, **options):
    """The same training on engines and in one process: run, model, plain losses, plain model."""
    model, plain = twice(make)
    data = digits() if data is None else data
    run = wait(
        pool.fit(
            model,
            data,
            steps=steps,
            transport=transport,
            optimizer=make_optimizer or optimizer,
            **{"loss": "cross_entropy", **options},
        )
    )
    given = {name: options[name] for name in ("step", "shuffle") if name in options}
    seen = plain_run(plain, data, num_steps=steps, optimizer=optimizer(plain.parameters()), **given)
    return run, model, seen.losses, plain


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(Tied, {}, id="tied_weights"),
        pytest.param(half_frozen, {}, id="some_frozen"),
        pytest.param(WithSpare, {"optimizer": decaying}, id="never_used"),
        pytest.param(Odd, {"optimizer": unfused}, id="not_contiguous_and_empty"),
        pytest.param(shared_module, {}, id="module_in_two_places"),
        pytest.param(Checkpointed, {}, id="reentrant_checkpoint"),
        pytest.param(ten_tensors, {}, id="10_tensors"),
        pytest.param(partial(ManyTensors, 10_000), {"steps": 3}, id="10000_tensors"),
        pytest.param(transformer, {"optimizer": sgd}, id="class_of_an_installed_package"),
        pytest.param(cell_class, {}, id="class_of_a_cell"),
        pytest.param(mlp, {"step": zero_grad_step, "loss": None}, id="step_that_zeroes_gradients"),
    ],
)
def test_a_model_trains_as_in_one_process(pool, transport, make, options):
    run, model, losses, plain = train_both(pool, make, transport=transport, **options)
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


def test_a_parameter_that_is_never_used_does_not_decay(pool, transport):
    model, untrained = twice(WithSpare)
    wait(pool.fit(model, digits(), loss="cross_entropy", optimizer=decaying, steps=5, transport=transport))
    assert torch.equal(model.spare.weight, untrained.spare.weight)
    assert torch.equal(model.large_spare.weight, untrained.large_spare.weight)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 8}, {"exact": True}], ids=str)
def test_branches_that_only_some_steps_or_engines_use_train_as_in_one_process(pool, transport, options):
    inputs, targets = digits(64 * 12)
    wants = torch.zeros(12, 64, 2, dtype=torch.bool)
    wants[[1, 4, 5], :7] = True  # only the first engine
    wants[[2, 7], 50:] = True  # only the second
    wants[3, ::5, 0] = True  # both, but only the small branch
    wants[9, ::5, 1] = True
    data = (inputs, wants.reshape(-1, 2), targets)  # no sample in steps 1, 7, 9, 11 and 12
    options = {"shuffle": False, "step": cross_entropy_step, "loss": None, **options}
    run, model, losses, plain = train_both(
        pool, Branching, data=data, transport=transport, optimizer=decaying, **options
    )
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


def test_what_was_frozen_in_a_first_run_trains_in_a_second_when_thawed(pool, transport):
    model, plain = twice(half_frozen)
    losses, expected = [], []
    for _ in range(2):
        run = wait(pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=6, transport=transport))
        losses += run.history["loss"]
        expected += plain_run(plain, digits(), num_steps=6).losses
        model.requires_grad_(requires_grad=True)
        plain.requires_grad_(requires_grad=True)
    assert largest_gap(losses, expected) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10
    assert not torch.equal(model[0].weight, half_frozen()[0].weight)


def test_parameter_groups_of_an_instance_keep_their_options(pool, transport):
    model, plain = twice(mlp)
    run = wait(
        pool.fit(model, digits(), loss="cross_entropy", optimizer=in_groups(model), steps=12, transport=transport)
    )
    expected = plain_run(plain, digits(), num_steps=12, optimizer=in_groups(plain))
    assert largest_gap(run.history["loss"], expected.losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


@pytest.mark.numeric
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float64), (torch.float32, torch.float64, torch.bfloat16)],
    ids=["float32_and_float64", "and_bfloat16"],
)
def test_parameters_of_every_dtype_train_as_in_one_process_to_their_own_precision(pool, transport, dtypes):
    run, model, losses, plain = train_both(pool, partial(ManyDtypes, *dtypes), transport=transport)
    apart = one_process_apart(lambda: twice(partial(ManyDtypes, *dtypes))[0], digits(), num_steps=12)
    assert apart.losses < (0.01 if torch.bfloat16 in dtypes else 1e-5)
    # Engines add up as another order in one process does: of four such gaps, none is likely to be ten times another.
    assert largest_gap(run.history["loss"], losses) < 10 * apart.losses
    assert largest_relative_gap(model, plain) < 10 * apart.parameters


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("width", [4, 16], ids=["small", "large"])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_gradients_train_as_in_one_process(pool, transport, name, width):
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    optimizer = partial(kinds[name], lr=0.1)
    run, model, losses, plain = train_both(
        pool, partial(Tokens, width), transport=transport, optimizer=optimizer, make_optimizer=name, lr=0.1
    )
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


def test_a_class_of_a_file_beside_the_notebook_trains_as_in_one_process(pool, transport, tmp_path, monkeypatch):
    name = f"beside_the_notebook_{transport}"
    (tmp_path / f"{name}.py").write_text(f"from torch import nn\n{CELL}")
    monkeypatch.syspath_prepend(tmp_path)
    run, model, losses, plain = train_both(pool, importlib.import_module(name).Cell, transport=transport)
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


def test_batch_norm_statistics_are_the_engines_mean_weighted_by_samples(pool, transport):
    model, plain = twice(batch_norm_net)
    options = {"optimizer": sgd, "batch_size": 63, "steps": 6, "transport": transport}
    run = wait(pool.fit(model, digits(), loss="cross_entropy", **options))
    losses = batch_norm_walk(plain, digits(), num_steps=6, batch_size=63)
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


def batch_norm_walk(model, data, *, num_steps, batch_size):
    """In one process, one part of every batch after the other, each with the statistics that the step began with."""
    loader = DataLoader(TensorDataset(*data), batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = sgd(model.parameters())
    losses = []
    for _, (inputs, targets) in zip(range(num_steps), loader, strict=False):
        optimizer.zero_grad()
        begin = {name: buffer.clone() for name, buffer in model.named_buffers()}
        mixed = {name: torch.zeros_like(buffer, dtype=torch.float64) for name, buffer in begin.items()}
        total = 0.0
        for first, last in engine_bounds(len(inputs)):
            for name, buffer in model.named_buffers():
                buffer.copy_(begin[name])
            share = (last - first) / len(inputs)
            loss = nn.functional.cross_entropy(model(inputs[first:last]), targets[first:last]) * share
            loss.backward()
            total += loss.item()
            for name, buffer in model.named_buffers():
                mixed[name] += buffer.double() * share
        for name, buffer in model.named_buffers():
            buffer.copy_(mixed[name].round() if not buffer.is_floating_point() else mixed[name])
        optimizer.step()
        losses.append(total)
    return losses


def engine_bounds(num_samples, num_engines=2):
    """Which part of a batch each engine computes."""
    num_shards = choose_num_shards(num_engines, batch_size=num_samples)
    bounds = shard_bounds(num_samples, num_shards=num_shards)
    parts = deal_shards(range(num_shards), range(num_engines)).values()
    return [(bounds[part[0]][0], bounds[part[-1]][1]) for part in parts]
