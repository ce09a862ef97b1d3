"""`dnb.plan` on a real pool: profiled on an engine, the exchange probed once."""

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

import dnb
from dnb.api.strategy import measurement
from dnb.engine.profiling.profiler import ProfileInput
from dnb.errors import PlanError

pytestmark = pytest.mark.engines


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) if number % 2 else nn.Tanh() for number in range(6)), nn.Linear(32, 4))


def batch():
    return torch.randn(64, 32), torch.zeros(64, dtype=torch.long)


def test_a_pool_plans_for_its_engines_with_what_was_measured_on_them(pool):
    made = dnb.plan(model(), batch(), loss="cross_entropy", strategy="pipeline", pool=pool)
    assert sorted(made.memory_bytes) == [engine.id for engine in pool.engines]
    assert made.profile.num_threads == pool.engines[0].cores
    exchange = made.site.exchange
    assert exchange.is_measured
    assert 0 < exchange.latency_seconds < 1
    assert exchange.bytes_per_second > 1e6
    assert exchange.action_seconds >= 0


def test_the_exchange_is_probed_once_per_pool(pool):
    assert measurement.exchange_of(pool) is measurement.exchange_of(pool)


def test_a_pool_may_plan_for_more_engines_than_it_has(pool):
    made = dnb.plan(model(), batch(), loss="cross_entropy", pool=pool, num_engines=6)
    assert len(made.site.engines) == 6
    assert any("of which 2 are there" in note for note in made.notes)


def test_a_model_that_fails_on_an_engine_is_refused_here(pool):
    with pytest.raises(PlanError, match="the model fails on 4 samples of the batch: RuntimeError"):
        dnb.plan(model(), torch.randn(64, 31), pool=pool)


def test_profiling_leaves_no_segment(pool):
    measurement.profile_on(pool, ProfileInput(model=model(), batch=torch.randn(8, 32)), sys_path=())
    assert not [file for folder in pool.segment_folders for file in folder.glob("profile-*")]


@pytest.fixture
def shell(pool):
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "dnb")
    shell.user_ns.update({"model": model(), "batch": batch()})
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def run(shell, line):
    result = shell.run_cell(line, store_history=False)
    result.raise_error()
    return result.result


def test_the_magic_plans_and_draws(shell, capsys):
    made = run(shell, "%dtrain plan model batch --loss cross_entropy --dry-run 4 --memory-limit 2GB")
    assert isinstance(made, dnb.Plan)
    assert len(made.site.engines) == 4
    assert {engine.memory_bytes <= 2_000_000_000 for engine in made.site.engines} == {True}
    data, _ = shell.display_formatter.format(made)
    assert set(data) >= {"text/html", "text/plain"}
    assert "ms per step" in capsys.readouterr().out


def test_the_magic_names_the_nearest_flag(shell):
    result = shell.run_cell("%dtrain plan model batch --memry-limit 2GB", store_history=False)
    told = "%dtrain plan has no flag '--memry-limit': did you mean %dtrain plan model batch --memory-limit 2GB?"
    assert str(result.error_in_exec).startswith(told)
