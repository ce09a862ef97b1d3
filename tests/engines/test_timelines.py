"""What a divided run shows of itself: timelines, bytes between stages, memory of its engines."""

import pytest
import torch
from torch import nn

import dnb
from dnb.api.runs.run import Run
from dnb.errors import PlanError
from dnb.notebook.text.summary import summary
from dnb.units import amount
from tests.engines.pools import wait
from tests.models import digits, mlp

pytestmark = [pytest.mark.engines, pytest.mark.float32]

# Layers that are not large: the allocator keeps some gradients on their way to the hub's memory.
WIDTH, NUM_LAYERS = 512, 100
MODEL_BYTES = NUM_LAYERS * 4 * WIDTH * WIDTH  # 105 MB, and as much of gradients
TWO_STAGES = {"strategy": "pipeline", "stages": ["0", "1"]}


def deep():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))


def large():
    halves = [[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS // 2)] for _ in range(2)]
    return nn.Sequential(*[nn.Sequential(*layers) for layers in halves])


def few_rows():
    return torch.randn(32, WIDTH), torch.randn(32, WIDTH)


def fit_large(pool, *, memory_limit="1 GB", **options):
    fixed = {"loss": "mse_loss", "optimizer": "sgd", "lr": 1e-3, "batch_size": 16, "micro_batch": 4, "steps": 4}
    return pool.fit(large(), few_rows(), memory_limit=memory_limit, **fixed, **options)


def computing(timeline, kind):
    return [[action for action in engine.actions if action.kind == kind] for engine in timeline]


@pytest.fixture
def divided(pool):
    options = {"loss": "cross_entropy", "strategy": "pipeline", "batch_size": 64, "micro_batch": 16}
    return wait(pool.fit(deep(), digits(), steps=12, **options))


def test_a_divided_run_has_the_timeline_of_one_step_of_all_engines(divided):
    timeline = divided.timeline
    assert 1 <= timeline.step <= 12
    assert [(engine.team, engine.rank) for engine in timeline] == [(0, 0), (0, 1)]
    for kind in ("forward", "backward"):
        assert [[action.micro_batch for action in own] for own in computing(timeline, kind)] == [[0, 1, 2, 3]] * 2
    assert 0.0 < timeline.bubble < 1.0
    assert timeline.ideal_bubble == pytest.approx(1 / 5)


def test_no_engine_begins_what_its_neighbour_has_not_given_it(divided):
    (first, last), (back_first, back_last) = (computing(divided.timeline, kind) for kind in ("forward", "backward"))
    assert all(before.end <= after.begin for before, after in zip(first, last, strict=True))
    assert all(before.end <= after.begin for before, after in zip(back_last, back_first, strict=True))


def test_bytes_between_stages_are_those_of_the_activations(divided):
    (cut,) = [each for each in divided.timeline.traffic if each.forward_bytes]
    (back,) = [each for each in divided.timeline.traffic if each.backward_bytes]
    assert (cut.stage, cut.forward_bytes) == (0, 64 * 96 * 4)
    assert (back.stage, back.backward_bytes) == (1, 64 * 96 * 4)


def test_the_folder_of_a_run_keeps_its_timeline(divided):
    kept = Run.open(divided.folder).timeline
    assert kept.step >= 1
    assert [engine.engine for engine in kept] == [engine.engine for engine in divided.timeline]


def test_a_run_that_is_not_divided_has_no_timeline(pool):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=8))
    assert len(run.timeline) == 0
    assert not (run.folder / "timeline.json").exists()


def test_what_a_plan_predicted_stands_beside_what_was_measured(pool):
    X, y = digits()
    plan = dnb.plan(deep(), (X[:64], y[:64]), loss="cross_entropy", strategy="pipeline", pool=pool)
    run = wait(pool.fit(deep(), (X, y), loss="cross_entropy", strategy=plan, batch_size=64, steps=8))
    assert run.prediction == plan.prediction == Run.open(run.folder).prediction
    told = summary(run)
    assert f"predicted {plan.bubble:.0%}" in told
    assert "per step predicted" in told
    assert f"({amount(plan.stages[0].memory_bytes)} predicted)" in told


def test_every_engine_says_how_much_memory_it_has_held(pool):
    run = wait(fit_large(pool, strategy="data"))
    for worker in run.workers:
        # parameters and gradients, whatever else there is
        assert worker.peak_rss_bytes - worker.start_rss_bytes >= 2 * MODEL_BYTES
        assert worker.peak_rss_bytes >= worker.rss_bytes


def test_an_engine_with_half_of_the_layers_holds_half_of_the_memory(pool):
    whole = max(grown(worker) for worker in wait(fit_large(pool, strategy="data")).workers)
    halves = [grown(worker) for worker in wait(fit_large(pool, **TWO_STAGES)).workers]
    assert max(halves) <= 0.65 * whole


def test_a_model_that_is_too_large_for_an_engine_trains_over_two(pool):
    most = int(1.3 * MODEL_BYTES)
    with pytest.raises(PlanError, match=r"Sequential does not fit: every engine would need .* strategy='pipeline'"):
        fit_large(pool, strategy="data", memory_limit=most)
    run = wait(fit_large(pool, memory_limit=most, **TWO_STAGES))
    assert run.step == 4
    assert max(grown(worker) for worker in run.workers) <= most
    assert [event for event in run.events if "memory_limit" in event.text] == []


def test_an_engine_that_holds_more_than_was_allowed_is_told_of(pool):
    def hungry(output, target):
        """It fills 80 MB for a moment, which nothing but a look at the process shows."""
        return nn.functional.cross_entropy(output, target) + 0.0 * torch.ones(20_000_000).sum()

    run = wait(pool.fit(deep(), digits(), loss=hungry, strategy="pipeline", steps=4, memory_limit="60 MB"))
    (told,) = [event for event in run.events if "memory_limit" in event.text]
    assert told.text.endswith("for this run, more than memory_limit=60 MB")
    assert run.step == 4


def grown(worker):
    return worker.peak_rss_bytes - worker.start_rss_bytes
