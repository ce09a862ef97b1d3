"""Models that are divided over the engines of a real pool."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional

import dnb
from dnb.errors import ArgumentError, PlanError
from tests.engines.pools import go_on_and_stop, wait, wait_until
from tests.models import adapted_net, digits, largest_gap, largest_relative_gap, mlp, plain_losses

pytestmark = pytest.mark.engines

NUM_STEPS = 50


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Three engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(3)
    shared.calm()


@pytest.fixture
def four(shared, tmp_path, monkeypatch):
    """Four engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(4)
    shared.calm()


def deep():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))


class Skipping(nn.Module):
    """A small convolutional network whose input is added again behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, x):
        x = functional.relu(self.first(x.view(-1, 1, 8, 8)))
        y = functional.relu(self.third(functional.relu(self.second(x))))
        return self.head((x + y).flatten(1))


class Tied(nn.Module):
    """The first and the last layer have one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.inner = nn.Linear(64, 64, bias=False)
        self.middle = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.outer = nn.Linear(64, 64, bias=False)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.outer(self.middle(self.inner(x))))


class Adapted(nn.Module):
    """A frozen layer with a low-rank update, whose dropout does nothing, as LoRA's is by default."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.base = nn.Linear(in_features, out_features).requires_grad_(requires_grad=False)
        self.dropout = nn.ModuleDict({"default": nn.Identity()})
        self.down = nn.Linear(in_features, 4, bias=False)
        self.up = nn.Linear(4, out_features, bias=False)

    def forward(self, x):
        inner = self.up(self.down(self.dropout["default"](x)))
        return self.base(x) + (inner * 2.0 if isinstance(inner, torch.Tensor) else inner)


def adapted():
    torch.manual_seed(6)
    return nn.Sequential(Adapted(64, 64), nn.GELU(), Adapted(64, 64), nn.GELU(), Adapted(64, 10))


class Residual(nn.Module):
    """A block that adds its input in place, as those of a ResNet do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.outer = nn.Linear(64, 64)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.outer(self.act(self.inner(x)))
        y += x
        return self.act(y)


def residual():
    torch.manual_seed(7)
    return nn.Sequential(*[Residual() for _ in range(4)], nn.Linear(64, 10))


def fit(pool, model, **options):
    return pool.fit(
        model,
        digits(),
        **{
            "loss": "cross_entropy",
            "lr": 1e-3,
            "batch_size": 64,
            "strategy": "pipeline",
            "steps": NUM_STEPS,
            **options,
        },
    )


def plain(make, num_steps=NUM_STEPS):
    return plain_losses(make(), digits(), num_steps=num_steps, batch_size=64)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("make", "schedule"),
    [
        (deep, "gpipe"),
        (deep, "zero-bubble"),
        (Skipping, "1f1b"),
        (Tied, "1f1b"),
        (adapted, "1f1b"),
        (residual, "1f1b"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_pipeline_has_the_loss_of_a_plain_loop_and_brings_the_weights_home(pool, make, schedule):
    model, alone = make(), make()
    run = wait(fit(pool, model, schedule=schedule, micro_batch=16, steps=100))
    losses = plain_losses(alone, digits(), num_steps=100, batch_size=64, micro_batch=16)
    assert largest_gap(run.history["loss"], losses) <= 1e-10
    assert largest_relative_gap(model, alone) <= 1e-10
    assert [event.kind for event in run.events].count("planned") == 1


def test_every_stage_takes_part_in_every_step_and_each_sample_counts_once(pool):
    run = wait(fit(pool, deep(), steps=29))
    assert sum(worker.samples for worker in run.workers) == 1797
    assert len([worker for worker in run.workers if worker.compute > 0]) == 3


def test_validation_and_metrics_are_those_of_data_parallel(pool):
    options = {"val": digits(201), "metrics": "accuracy", "epochs": 2, "steps": None}
    divided = wait(fit(pool, deep(), **options))
    whole = wait(fit(pool, deep(), **options, strategy="data"))
    # Each part's accuracy is a float32 of at most 1, rounded by 6e-8 at most; so is their weighted mean.
    for name, bound in (("val_loss", 1e-10), ("val_accuracy", 1.2e-7), ("accuracy", 1.2e-7)):
        assert len(divided.history[name]) == len(whole.history[name])
        assert largest_gap(divided.history[name], whole.history[name]) <= bound


def test_two_pipelines_of_two_are_one_run(four):
    run = wait(fit(four, deep(), strategy="hybrid", mesh="data=2,pipeline=2"))
    assert largest_gap(run.history["loss"], plain(deep)) <= 1e-10
    assert sum(worker.samples for worker in run.workers) == 1797 + 21 * 64


@pytest.mark.faults
def test_of_two_pipelines_the_other_goes_on_and_a_newcomer_makes_them_two_again(four):
    run = fit(four, deep(), strategy="hybrid", mesh="data=2,pipeline=2", steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    left, dead, *_ = four.engines
    os.kill(dead.pid, signal.SIGKILL)
    wait_until(run, lambda run: "died" in [event.kind for event in run.events], what="it is known to be dead")
    at = run.step
    wait_until(run, lambda run: run.step >= at + 20, what="20 steps by one pipeline")
    before = {worker.engine: worker.steps for worker in run.workers}
    (newcomer,) = four.add(1)
    team = {left.id, newcomer}
    wait_until(
        run,
        lambda run: sum(w.steps > before.get(w.engine, 0) + 5 for w in run.workers if w.engine in team) == 2,
        what="5 steps by the pipeline of the one that was left and the new one",
    )
    run.stop()
    wait(run)
    assert largest_gap(run.history["loss"][:50], plain(deep, min(50, run.step))) <= 1e-10


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stage_that_is_killed_is_done_without_and_the_same_step_is_done_again(pool, victim):
    run = fit(pool, deep(), steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    dead = pool.engines[victim]
    os.kill(dead.pid, signal.SIGKILL)
    go_on_and_stop(run, after="died")
    assert largest_gap(run.history["loss"], plain(deep, run.step)) <= 1e-10
    assert [event.engine for event in run.events if event.kind == "died"] == [dead.id]
    assert [event.kind for event in run.events].count("planned") >= 2


@pytest.mark.faults
def test_a_stage_that_stands_still_is_ended_and_the_others_go_on(pool):
    run = fit(pool, deep(), steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    os.kill(pool.engines[1].pid, signal.SIGSTOP)
    go_on_and_stop(run, after="died")
    assert "killed, as the others of its team wait for it" in " ".join(event.text for event in run.events)


@pytest.mark.faults
def test_an_engine_that_joins_becomes_a_stage(pool):
    def planned(run):
        return [event.text for event in run.events if event.kind == "planned"]

    run = fit(pool, deep(), steps=1_000_000)
    wait_until(run, lambda run: run.step >= 10, what="step 10")
    pool.remove(pool.engines[0].id)
    wait_until(run, lambda run: "stage 2" not in planned(run)[-1], what="a pipeline of two")
    (newcomer,) = pool.add(1)
    wait_until(run, lambda run: f"stage 2 on engine {newcomer}" in planned(run)[-1], what="a pipeline of three")
    at = run.step
    wait_until(run, lambda run: run.step >= at + 20, what="20 steps more")
    assert next(worker.steps for worker in run.workers if worker.engine == newcomer) > 0
    run.stop()
    wait(run)


@pytest.mark.faults
def test_a_run_goes_on_when_the_hub_is_killed(pool):
    run = fit(pool, deep(), steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="step 20")
    os.kill(pool.facts.hub.pid, signal.SIGKILL)
    go_on_and_stop(run, after="recovered")
    assert largest_gap(run.history["loss"], plain(deep, run.step)) <= 1e-10


def test_a_pipeline_that_is_resumed_goes_on_with_the_next_step(pool):
    run = wait(fit(pool, deep(), steps=20, checkpoint_every=10))
    resumed = wait(dnb.resume(run.folder, steps=50, pool=pool))
    assert largest_gap(resumed.history["loss"], plain(deep)) <= 1e-10
    assert "1 shards" in next(event.text for event in resumed.events if event.kind == "running")


def test_stages_that_are_modules_are_resumed_with_their_own_model(pool):
    model = deep()
    run = wait(fit(pool, model, stages=[model[:2], model[2:]], steps=10, checkpoint_every=10))
    with pytest.raises(PlanError, match="resume without model="):
        dnb.resume(run.folder, model=deep(), steps=20, pool=pool)
    resumed = wait(dnb.resume(run.folder, steps=20, pool=pool))
    assert largest_gap(resumed.history["loss"], plain(deep, 20)) <= 1e-10


class Failing:
    """A loss that raises until there is a file."""

    def __init__(self, mended):
        self.mended = mended
        self.count = 0

    def __call__(self, output, target):
        self.count += torch.is_grad_enabled()
        if self.count > 40 and not self.mended.exists():
            raise ValueError("the loss is not ready")
        return functional.cross_entropy(output, target)


def test_a_loss_that_raises_pauses_the_run_and_the_same_step_is_tried_again(pool, tmp_path):
    mended = tmp_path / "mended"
    run = fit(pool, deep(), loss=Failing(mended))
    wait_until(run, lambda run: run.status == "paused", what="it has paused")
    assert "ValueError: the loss is not ready" in run.error
    assert "stage 2" in run.error
    mended.touch()
    run.resume()
    wait(run)
    assert largest_gap(run.history["loss"], plain(deep)) <= 1e-10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh": "pipeline=9"}, PlanError, "9 pipeline stages need as many layers"),
        ({"mesh": "data=2,pipeline=2"}, PlanError, "2 pipelines of 2 stages need 4 engines, and the pool has 3"),
        ({"mesh": "date=2"}, ArgumentError, "no mesh axis 'date': did you mean 'data'"),
        ({"schedule": "1f2b"}, ArgumentError, "no schedule '1f2b': did you mean '1f1b'"),
        ({"stages": ["0", "seven"]}, ArgumentError, "the model has no module 'seven'"),
        ({"micro_batch": 15}, PlanError, "micro_batch=16 is the nearest"),
        ({"exact": True}, PlanError, "exact=True needs a gradient per shard"),
        ({"transport": "socket"}, PlanError, "share the hub's memory"),
        ({"strategy": "hybrid"}, PlanError, "mesh='data=2,pipeline=2'"),
        ({"strategy": "data", "stages": ["0", "1"]}, PlanError, "strategy='pipeline'"),
    ],
)
def test_what_no_pipeline_can_is_refused_before_anything_starts(pool, options, error, message):
    with pytest.raises(error, match=message):
        fit(pool, deep(), **options)


def test_a_step_function_is_refused(pool):
    with pytest.raises(PlanError, match="give loss= instead of step="):
        fit(pool, mlp(), loss=None, step=lambda model, batch: model(batch[0]).sum())


def weighted(output, target):
    weight = torch.arange(1, 11, dtype=output.dtype)
    return functional.cross_entropy(output, target, weight=weight)


def summed(output, target):
    weight = torch.arange(1, 11, dtype=output.dtype)
    total = functional.cross_entropy(output, target, weight=weight, reduction="sum")
    return dnb.Sum(total, float(weight[target].sum()))


@pytest.mark.parametrize("loss", [weighted, summed])
def test_a_mean_over_something_else_is_right_as_it_is_and_as_a_sum(pool, loss):
    run = wait(fit(pool, deep(), loss=loss, steps=20, micro_batch=16, shuffle=False))
    model, (x, y) = deep(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for begin in range(0, 20 * 64, 64):
        optimizer.zero_grad()
        loss = weighted(model(x[begin : begin + 64]), y[begin : begin + 64])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert largest_gap(run.history["loss"], losses) <= 1e-10


def test_a_plan_is_carried_out_as_it_was_edited(pool):
    data = digits()
    plan = dnb.plan(deep(), (data[0][:64], data[1][:64]), loss="cross_entropy", strategy="pipeline", pool=pool)
    edited = plan.with_(cuts=["4"], num_micro_batches=4)
    run = wait(fit(pool, deep(), strategy=edited))
    assert largest_gap(run.history["loss"], plain(deep)) <= 1e-10
    told = next(event.text for event in run.events if event.kind == "planned")
    assert told.count("stage") == 2


def test_a_plan_for_another_model_is_refused(pool):
    data = digits()
    plan = dnb.plan(deep(), (data[0][:64], data[1][:64]), loss="cross_entropy", strategy="pipeline", pool=pool)
    with pytest.raises(PlanError, match="this plan is for another model"):
        fit(pool, mlp(), strategy=plan)


@pytest.mark.parametrize("options", [{"strategy": "data"}, {"mesh": "pipeline=2"}, {"mesh": "pipeline=3"}])
def test_low_rank_adapters_by_name_are_trained_as_one_process_does(pool, options):
    model = adapted_net()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    run = wait(fit(pool, model, steps=20, **options))
    assert largest_gap(run.history["loss"], plain(adapted_net, 20)) <= 1e-9
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
