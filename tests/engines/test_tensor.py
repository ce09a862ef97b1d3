"""Layers that are divided over the engines of a real pool."""

import os
import signal

import pytest
import torch
from torch.nn import functional

from dnb.errors import ArgumentError, PlanError
from tests.engines.pools import go_on_and_stop, wait, wait_until
from tests.models import cnn, digits, largest_gap, largest_relative_gap, mlp, plain_losses, plain_run
from tests.unit.tensor_models import DividableGPT, next_word_loss, next_word_step, text

pytestmark = pytest.mark.engines

NUM_STEPS = 50
WHOLE_PLAN = {
    "words": "rowwise",
    "head": "colwise_rep",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "blocks.*.attention.[qkv]": "colwise",
    "blocks.*.attention.out": "rowwise",
}


@pytest.fixture
def four(shared, tmp_path, monkeypatch):
    """Four engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(4)
    shared.calm()


def fit(pool, model, data=None, **options):
    return pool.fit(
        model,
        digits() if data is None else data,
        **{"loss": "cross_entropy", "lr": 1e-3, "batch_size": 64, "strategy": "tensor", "steps": NUM_STEPS, **options},
    )


def plain(num_steps=NUM_STEPS):
    return plain_losses(mlp(), digits(), num_steps=num_steps, batch_size=64)


def kinds(run):
    return [event.kind for event in run.events]


@pytest.mark.numeric
def test_divided_layers_have_the_loss_of_a_plain_loop_and_bring_the_weights_home(pool):
    model, alone = mlp(), mlp()
    run = wait(fit(pool, model))
    assert largest_gap(run.history["loss"], plain_losses(alone, digits(), num_steps=NUM_STEPS, batch_size=64)) <= 1e-10
    assert largest_relative_gap(model, alone) <= 1e-10
    told = [event.text for event in run.events if event.kind == "planned"]
    assert len(told) == 1
    assert told[0].endswith("each has 1/2 of 2 layers")


@pytest.mark.numeric
def test_a_transformer_with_one_weight_for_words_and_head_has_the_loss_of_a_plain_loop(pool):
    run = wait(fit(pool, DividableGPT(), text(), loss=next_word_loss, tensor_plan=WHOLE_PLAN))
    alone = plain_run(DividableGPT(), text(), num_steps=NUM_STEPS, step=next_word_step)
    assert largest_gap(run.history["loss"], alone.losses) <= 1e-10
    assert "1/2 of 14 layers" in next(event.text for event in run.events if event.kind == "planned")


def test_a_step_function_is_called_with_the_model(pool):
    run = wait(fit(pool, DividableGPT(), text(), loss=None, step=next_word_step, steps=10))
    alone = plain_run(DividableGPT(), text(), num_steps=10, step=next_word_step)
    assert largest_gap(run.history["loss"], alone.losses) <= 1e-10


def test_two_teams_of_two_are_one_run(four):
    run = wait(fit(four, mlp(), mesh="data=2,tensor=2"))
    assert largest_gap(run.history["loss"], plain()) <= 1e-10
    assert sum(worker.samples for worker in run.workers) == 1797 + 21 * 64
    assert kinds(run).count("planned") == 2


def test_validation_and_metrics_are_those_of_data_parallel(pool):
    options = {"val": digits(201), "metrics": "accuracy", "epochs": 1, "steps": None, "micro_batch": 48}
    divided = wait(fit(pool, mlp(), **options))
    whole = wait(fit(pool, mlp(), **options, strategy="data"))
    # Each part's accuracy is a float32 of at most 1, rounded by 6e-8 at most; so is their weighted mean.
    for name, bound in (("val_loss", 1e-10), ("val_accuracy", 1.2e-7), ("accuracy", 1.2e-7)):
        assert len(divided.history[name]) == len(whole.history[name])
        assert largest_gap(divided.history[name], whole.history[name]) <= bound


@pytest.mark.faults
def test_an_engine_that_is_killed_is_done_without_and_the_same_step_is_done_again(four):
    run = fit(four, mlp(), mesh="tensor=4", steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    dead = four.engines[1]
    os.kill(dead.pid, signal.SIGKILL)
    go_on_and_stop(run, after="died")
    assert largest_gap(run.history["loss"], plain(run.step)) <= 1e-10
    assert [event.engine for event in run.events if event.kind == "died"] == [dead.id]
    told = [event.text for event in run.events if event.kind == "planned"]
    assert [text.partition("each has ")[2] for text in told] == ["1/4 of 2 layers", "1/2 of 2 layers"]


@pytest.mark.faults
def test_a_run_goes_on_when_the_hub_is_killed(pool):
    run = fit(pool, mlp(), steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    os.kill(pool.facts.hub.pid, signal.SIGKILL)
    go_on_and_stop(run, after="recovered")
    assert largest_gap(run.history["loss"], plain(run.step)) <= 1e-10


class Failing:
    """A loss that raises until there is a file."""

    def __init__(self, mended):
        self.mended = mended
        self.count = 0

    def __call__(self, output, target):
        self.count += torch.is_grad_enabled()
        if self.count > 20 and not self.mended.exists():
            raise ValueError("the loss is not ready")
        return functional.cross_entropy(output, target)


def test_a_loss_that_raises_pauses_the_run_and_one_new_team_tries_the_same_step_again(pool, tmp_path):
    mended = tmp_path / "mended"
    run = fit(pool, mlp(), loss=Failing(mended))
    wait_until(run, lambda run: run.status == "paused", what="it has paused")
    assert "ValueError: the loss is not ready" in run.error
    mended.touch()
    run.resume()
    wait(run)
    assert largest_gap(run.history["loss"], plain()) <= 1e-10
    assert kinds(run).count("planned") == 2  # both engines raised: that makes one new team, not two


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh": "tensor=3"}, PlanError, "'0' has 128 outputs, which 3 engines cannot share evenly; 2 engines can"),
        (
            {"mesh": "tensor=4"},
            PlanError,
            "1 tensor team of 4 engines need 4 engines, and the pool has 2: %dtrain add 2",
        ),
        ({"mesh": "data=2,tensor=2"}, PlanError, "2 tensor teams of 2 engines need 4 engines, and the pool has 2"),
        ({"mesh": "pipeline=2,tensor=2"}, PlanError, "not in this release"),
        ({"mesh": "data=2"}, PlanError, "mesh='data=2,tensor=2'"),
        ({"stages": ["0", "1"]}, PlanError, "not in this release"),
        ({"strategy": "hybrid", "mesh": "data=2"}, PlanError, "mesh='data=2,tensor=2'"),
        ({"strategy": "pipeline", "mesh": "tensor=2"}, PlanError, "a pipeline has no tensor axis"),
        ({"strategy": "pipeline", "tensor_plan": {"0": "colwise"}}, PlanError, "strategy='tensor'"),
        ({"strategy": "data", "tensor_plan": {"0": "colwise"}}, PlanError, "strategy='pipeline', 'tensor' or 'hybrid'"),
        ({"tensor_plan": {"up": "colwise"}}, ArgumentError, "the model has no module 'up'"),
        ({"tensor_plan": {"0": "colwise"}}, PlanError, "tensor_plan cannot be carried out"),
        ({"exact": True}, PlanError, "exact=True needs a gradient per shard"),
        ({"transport": "socket"}, PlanError, "share the hub's memory"),
    ],
)
def test_what_no_team_can_is_refused_before_anything_starts(pool, options, error, message):
    with pytest.raises(error, match=message):
        fit(pool, mlp(), **options)


def test_a_model_without_large_layers_is_refused(pool):
    with pytest.raises(PlanError, match=r"divides nn\.Linear and nn\.Embedding, and this model has none"):
        fit(pool, cnn())
