"""`dnb.plan` without a pool: arguments, refusals, and what it rests on."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dnb
from dnb.api import pools
from dnb.api.planner import read_bytes, read_mesh
from dnb.engine.profiling import profiler
from dnb.errors import ArgumentError, PlanError


@pytest.fixture(autouse=True)
def no_pool(monkeypatch):
    """The pool that tests of this process share is not to be asked."""
    monkeypatch.setattr(pools, "_pool", None)


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    """Which sizes of batch are timed does not depend on what else the machine does."""
    monkeypatch.setattr(profiler, "CHEAP_SECONDS", math.inf)
    monkeypatch.setattr(profiler, "DEAR_SECONDS", math.inf)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


@pytest.fixture
def batch():
    return torch.randn(32, 16), torch.zeros(32, dtype=torch.long)


def test_without_a_pool_the_kernel_profiles_for_engines_that_do_not_run_yet(model, batch):
    made = dnb.plan(model, batch, loss="cross_entropy", num_engines=64)
    assert len(made.site.engines) == 64
    assert any("64 engines on" in note and "do not run yet" in note for note in made.notes)
    made.check(model)


def test_engines_of_a_dry_run_have_cores_of_their_own(model, batch):
    site = dnb.plan(model, batch, loss="cross_entropy", num_engines=64).site
    for host, cores in site.cores.items():
        assert sum(engine.threads for engine in site.engines if engine.host == host) <= cores


def test_engines_may_be_put_on_one_host(model, batch):
    made = dnb.plan(model, batch, loss="cross_entropy", num_engines=64, hosts=1)
    assert len({engine.host for engine in made.site.engines}) == 1


def test_a_memory_limit_divides_a_model_that_one_engine_cannot_hold(model, batch):
    whole = dnb.plan(model, batch, loss="cross_entropy", strategy="data", num_engines=4)
    # More than parameters and gradients of the largest layer, less than all of them.
    made = dnb.plan(model, batch, loss="cross_entropy", num_engines=4, memory_limit=40_000)
    assert max(whole.memory_bytes.values()) > 40_000
    assert made.mesh.pipeline >= 2
    assert max(made.memory_bytes.values()) <= 40_000


def test_a_model_too_large_for_any_division_is_refused_with_what_is_needed(model, batch):
    with pytest.raises(PlanError, match=r"Sequential does not fit: .* would need .* its limit is 10 kB"):
        dnb.plan(model, batch, loss="cross_entropy", num_engines=2, memory_limit="10kB")


def test_a_mesh_settles_teams_and_stages(model, batch):
    made = dnb.plan(model, batch, loss="cross_entropy", num_engines=4, mesh="data=2,pipeline=2")
    assert (made.strategy, str(made.mesh)) == ("hybrid", "data=2,pipeline=2")


def test_the_profile_is_that_of_the_given_model(model, batch):
    made = dnb.plan(model, batch, loss="cross_entropy", num_engines=2)
    assert [layer.name for layer in made.profile.layers] == ["0", "1", "2", "3", "4"]
    assert made.profile.parameter_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "pipelin"}, ArgumentError, "no strategy 'pipelin': did you mean 'pipeline'"),
        ({"strategy": "tensor"}, PlanError, "'tensor' is not in this release yet"),
        ({"schedule": "zero-bubble"}, ArgumentError, "no schedule 'zero-bubble'"),
        ({"mesh": "data=2;pipeline=2"}, ArgumentError, "mesh axis .data. must be a positive integer"),
        ({"mesh": "tensor=2"}, PlanError, "a tensor axis cannot be predicted"),
        ({"mesh": "pipeline=6"}, PlanError, "6 pipeline stages need 6 layers, and Sequential has 5"),
        ({"mesh": "pipeline=4"}, PlanError, "needs 4 engines, and there are 2: %dtrain add 2"),
        ({"memory_limit": "two GB"}, ArgumentError, "is no number of bytes: such as 2GB"),
        ({"num_engines": 0}, ArgumentError, "num_engines must be a positive integer"),
        ({"num_micro_batches": 33, "mesh": "pipeline=2"}, PlanError, "33 micro-batches of 32 samples: use at most 32"),
        ({"loss": "cross_entropyy"}, ArgumentError, "did you mean 'cross_entropy'"),
    ],
)
def test_a_wrong_argument_is_refused(model, batch, options, error, message):
    with pytest.raises(error, match=message):
        dnb.plan(model, batch, **{"loss": "cross_entropy", "num_engines": 2, **options})


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (None, None),
        (2_000_000, 2_000_000),
        ("2GB", 2 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("1e9", 10**9),
        (2e9, 2 * 10**9),
    ],
)
def test_bytes_are_numbers_or_words(amount, expected):
    assert read_bytes(amount) == expected


def test_an_axis_that_is_not_named_is_open():
    assert read_mesh("pipeline=2") == {"pipeline": 2}
    assert read_mesh(None) == {}


def test_of_a_data_set_the_first_samples_are_the_batch(model):
    data = TensorDataset(torch.randn(100, 16), torch.zeros(100, dtype=torch.long))
    assert dnb.plan(model, data, loss="cross_entropy", num_engines=1).profile.sizes[-1] == 64


def test_of_a_loader_the_first_batch_is_taken_and_its_generator_is_left_alone(model):
    data = TensorDataset(torch.randn(100, 16), torch.zeros(100, dtype=torch.long))
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=20, shuffle=True, generator=generator)
    before = generator.get_state()
    assert dnb.plan(model, loader, loss="cross_entropy", num_engines=1).profile.sizes[-1] == 20
    assert torch.equal(generator.get_state(), before)


def test_arrays_are_a_batch_too(model):
    batch = np.zeros((24, 16), dtype=np.float32), np.zeros(24, dtype=np.int64)
    assert dnb.plan(model, batch, loss="cross_entropy", num_engines=1).profile.sizes[-1] == 24
