"""strategy="auto": dividing a model only where that is better."""

import pytest
import torch
from torch import nn

from dnb.api.strategy import automatic
from dnb.errors import PlanError
from dnb.job import Data, DataSource, Job
from tests.engines.pools import wait
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = pytest.mark.engines


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Two engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(2)
    shared.calm()


def planned(run):
    return [event.text for event in run.events if event.kind == "planned"]


def test_a_small_model_is_not_profiled(pool):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=3))
    assert planned(run) == []


def test_a_larger_one_is_and_the_run_says_what_was_chosen_and_why(pool, monkeypatch):
    monkeypatch.setattr(automatic, "LEAST_BYTES", 0)
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=20))
    assert "per step predicted" in planned(run)[0]
    assert largest_gap(run.history["loss"], plain_losses(mlp(), digits(), num_steps=20, batch_size=64)) <= 1e-10


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def choose(pool, **options):
    x, y = digits()
    model = wide()
    job = Job(model=model, loss=nn.functional.cross_entropy, step=None, metrics={}, optimizer="adamw", lr=None,
              scheduler=None, order=None)  # fmt: skip
    data = Data(train=DataSource(samples=(x, y), collate=None), val=None)
    settled = {"num_samples": len(x), "batch_size": 64, "exact": False, "transport": None, "sys_path": ()}
    return automatic.choose_plan(job, data, pool, **(settled | options))


@pytest.mark.usefixtures("float32")  # of which the figures are
def test_a_model_that_one_engine_may_not_hold_is_divided(pool):
    plan, why = choose(pool, memory_limit=3_000_000)  # parameters and gradients alone have 4.5 MB
    assert plan.partition.num_stages == 2
    assert max(plan.memory_bytes.values()) <= 3_000_000
    assert why.startswith("pipeline=2, ")
    assert "one engine has 3 MB for all" in why


def test_a_model_that_fits_nowhere_is_refused_with_the_way_out(pool):
    with pytest.raises(PlanError, match=r"does not fit.*raise memory_limit"):
        choose(pool, memory_limit=100_000)


@pytest.mark.parametrize("options", [{"exact": True}, {"transport": "socket"}], ids=str)
def test_what_only_data_parallel_engines_can_do_is_not_divided(pool, options):
    assert choose(pool, memory_limit=3_000_000, **options) == (None, "")


def test_a_model_that_cannot_be_profiled_is_data_parallel_and_says_so(pool, monkeypatch):
    monkeypatch.setattr(automatic, "LEAST_BYTES", 0)

    def refuse(*_, **__):
        raise PlanError("it looks at values")

    monkeypatch.setattr(automatic, "profile_on", refuse)
    assert choose(pool) == (None, "data parallel, as the model could not be profiled: it looks at values")


def test_a_torch_that_cannot_divide_models_is_told_and_leaves_the_pool_as_it_was(pool, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(PlanError, match=r"needs torch 2\.7 or later"):
        pool.fit(mlp(), digits(64), loss="cross_entropy", batch_size=32, steps=4, strategy="pipeline")
    run = wait(pool.fit(mlp(), digits(64), loss="cross_entropy", batch_size=32, steps=4))
    assert run.status == "finished"
