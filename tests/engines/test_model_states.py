"""State of models besides parameters: buffers by their rules, and modes that users have set."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dnb
from dnb.errors import ArgumentError, RunError
from tests.engines.pools import wait, wait_until
from tests.models import digits, largest_gap, plain_losses, twice

pytestmark = pytest.mark.engines


class RunFacts(nn.Module):
    """Counts samples, and keeps the sum of the last part's pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("pixels", torch.zeros(()))

    def forward(self, inputs):
        if self.training:
            self.seen += len(inputs)
            self.pixels = inputs.sum()
        return self.layer(inputs)


def train(pool, model, *, num_steps=4, **options):
    data = digits(64)
    return wait(pool.fit(model, data, loss="cross_entropy", batch_size=32, steps=num_steps, shuffle=False, **options))


def state_events(run):
    return [event.text for event in run.events if event.kind == "state"]


@pytest.mark.parametrize("transport", ["memory", "socket"])
@pytest.mark.parametrize("exact", [False, True])
def test_buffers_follow_their_rules(pool, transport, exact):
    model = RunFacts()
    run = train(pool, model, transport=transport, exact=exact, buffers={"seen": "sum", "pixels": "first"})
    num_first = 8 if exact else 16  # samples of the first of 4 shards, or of the first of 2 engines
    assert (model.seen.item(), model.pixels.item()) == (4 * 32, digits(64)[0][32 : 32 + num_first].sum().item())
    assert state_events(run) == []


def test_without_a_rule_the_first_part_counts_and_that_is_told(pool):
    model = RunFacts()
    run = train(pool, model)
    assert model.seen.item() == 4 * 16
    (told,) = state_events(run)
    assert told.startswith("engines have made different things of buffer 'pixels': what the engine with the batch's")


def frozen_norm_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 10))
    model[1].eval().requires_grad_(False)
    model[3].eval()
    return model


@pytest.mark.parametrize("strategy", ["data", "pipeline"])
def test_modules_that_were_set_to_evaluation_stay_in_it_also_after_an_evaluation(pool, strategy):
    model, plain = twice(frozen_norm_net)
    before = model[1].running_mean.clone()
    run = wait(
        pool.fit(model, digits(96), val=digits(32), loss="cross_entropy", batch_size=32, epochs=2, strategy=strategy)
    )
    assert torch.equal(model[1].running_mean, before)
    assert largest_gap(run.history["loss"], plain_losses(plain, digits(96), num_steps=6, batch_size=32)) < 1e-10
    assert [module.training for module in model] == [True, False, True, False, True]


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(pool):
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10)).eval()
    run = train(pool, model)
    assert model[1].num_batches_tracked.item() == 4
    assert "evaluation mode" in state_events(run)[0]


class Positions(nn.Module):
    """A table of positions that is made longer when a batch needs it, as rotary and mask caches are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.register_buffer("table", torch.zeros(3, 8), persistent=False)
        self.register_buffer("mask", None)

    def forward(self, tokens):
        if tokens.shape[1] > len(self.table):
            self.table = torch.linspace(-1, 1, 8 * tokens.shape[1], dtype=self.table.dtype).reshape(-1, 8)
            self.mask = torch.ones(tokens.shape[1], dtype=self.table.dtype)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2, dtype=self.table.dtype))
        return self.out(self.embed(tokens) + self.table[: tokens.shape[1]]).transpose(1, 2)


def tokens():
    found = torch.randint(0, 9, (64, 7), generator=torch.Generator().manual_seed(1))
    return found, found


@pytest.mark.parametrize("options", [{}, {"transport": "socket"}, {"exact": True}, {"loss_over": "batch"}], ids=str)
def test_buffers_that_grow_or_are_added_in_forward_train_as_in_one_process(pool, options):
    model, plain = twice(Positions)
    run = wait(pool.fit(model, tokens(), loss="cross_entropy", batch_size=16, steps=8, **options))
    assert largest_gap(run.history["loss"], plain_losses(plain, tokens(), num_steps=8, batch_size=16)) < 1e-10
    assert {name: buffer.shape for name, buffer in model.named_buffers()} == {
        name: buffer.shape for name, buffer in plain.named_buffers()
    }
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.table, plain.table)


class Counting(nn.Module):
    """Counts its forwards where only `get_extra_state` shows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.count = nn.Linear(64, 10), 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]

    def forward(self, inputs):
        self.count += self.training
        return self.layer(inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"transport": "socket"}, {"exact": True}, {"loss_over": "batch"}, {"loss_over": "batch", "exact": True}],
    ids=str,
)
def test_extra_state_comes_home_as_from_one_process(pool, options):
    model = nn.Sequential(Counting(), nn.Tanh())
    run = train(pool, model, num_steps=5, **options)
    assert (run.status, model[0].count) == ("finished", 5)


class Both(Positions):
    """Grows a buffer, and counts its forwards."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def get_extra_state(self):
        return {"count": self.count, "last": torch.tensor([self.count])}

    def set_extra_state(self, state):
        self.count = state["count"]

    def forward(self, tokens):
        self.count += self.training
        return super().forward(tokens)


def test_states_of_every_shape_are_in_checkpoints_and_a_resumed_run_goes_on_with_them(pool):
    model, whole = twice(Both)
    options = {"loss": "cross_entropy", "batch_size": 16}
    wait(pool.fit(whole, tokens(), steps=8, **options))
    run = wait(pool.fit(model, tokens(), steps=4, checkpoint_every=4, **options))
    folder = run.folder / "checkpoints" / "step-000004"
    state = load_file(folder / "model.safetensors") | torch.load(folder / "extra_state.pt")
    loaded = Both()
    loaded.register_buffer("mask", torch.empty(7))
    loaded.register_buffer("late", torch.empty(2))
    loaded.load_state_dict(state)
    assert (loaded.count, torch.equal(loaded.embed.weight, model.embed.weight)) == (4, True)
    resumed = wait(dnb.resume(folder, steps=8))
    assert (resumed.model.count, resumed.model.table.shape) == (8, (7, 8))
    assert torch.equal(resumed.model.embed.weight, whole.embed.weight)


def test_states_of_every_shape_survive_the_hub(pool):
    model = Both()
    run = pool.fit(model, tokens(), loss="cross_entropy", batch_size=16, steps=1_000_000)
    wait_until(run, lambda run: run.step >= 20, what="20 steps are done")
    pool.chaos.hub()
    wait_until(run, lambda run: run.step >= 60, what="40 steps more are done")
    run.stop()
    wait(run)
    assert model.count == run.step
    assert model.table.shape == (7, 8)


def test_an_extra_state_that_cannot_travel_is_refused(pool):
    model = Counting()
    model.count = object()
    with pytest.raises(ArgumentError, match="the extra state of 'the model' cannot be kept"):
        train(pool, model)


def test_a_buffer_that_gets_another_shape_cannot_be_added_up(pool):
    run = pool.fit(Positions(), tokens(), loss="cross_entropy", batch_size=16, buffers={"table": "sum"})
    with pytest.raises(RunError, match="buffer 'table' has got another shape or dtype in forward"):
        run.wait()
    run.stop()


@pytest.mark.parametrize("make", [Counting, Positions])
def test_states_come_home_from_a_pipeline(pool, make):
    torch.manual_seed(0)
    if make is Counting:
        model, data = nn.Sequential(Counting(), nn.Tanh(), nn.Linear(10, 10)), digits(64)
    else:
        model, data = nn.Sequential(Positions(), nn.Identity()), tokens()
    plain = copy.deepcopy(model)
    options = {"loss": "cross_entropy", "batch_size": 16, "steps": 4, "shuffle": False, "strategy": "pipeline"}
    run = wait(pool.fit(model, data, stages=[model[0], model[1:]], **options))
    plain_losses(plain, data, num_steps=4, batch_size=16)
    assert run.status == "finished"
    if make is Counting:
        assert model[0].count == 4 * 8  # micro-batches
    else:
        assert torch.equal(model[0].table, plain[0].table)
