"""Losses and metrics that are no means over samples, on real engines, against one process."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import dnb
from dnb.errors import ArgumentError, RunError
from dnb.user_code.accuracy import accuracy
from tests.engines.pools import wait
from tests.models import adamw, digits, largest_gap, mlp, plain_run, twice

pytestmark = [pytest.mark.engines, pytest.mark.numeric]

NUM_STEPS = 50
IGNORED = -100


class Padded(Dataset):
    """Rows of tokens, of which only the later ones have some that do not count."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 11, (256, 7), generator=generator)
        self.targets = torch.randint(0, 11, (256, 7), generator=generator)
        for row, length in enumerate(torch.randint(1, 8, (256,), generator=generator).tolist()):
            if row >= 16:
                self.targets[row, length:] = IGNORED

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index], self.targets[index]


def tagger():
    return nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11))


def of_tokens(output, target):
    return functional.cross_entropy(output.transpose(1, 2), target)


def own_sum(output, target):
    total = functional.cross_entropy(output.transpose(1, 2), target, reduction="sum")
    return dnb.Sum(total, float((target != IGNORED).sum()))


def tokens_step(model, batch):
    return of_tokens(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("transport", "loss"),
    [("memory", of_tokens), ("socket", of_tokens), ("memory", own_sum)],
    ids=["memory", "socket", "sum"],
)
def test_tokens_that_do_not_count_are_left_out_as_in_one_process(pool_of, transport, loss):
    model, plain = twice(tagger)
    data = Padded()
    run = wait(pool_of.fit(model, data, val=data, loss=loss, lr=1e-2, batch_size=32, steps=16, transport=transport))
    given = {"step": tokens_step, "optimizer": adamw(plain.parameters(), 1e-2), "batch_size": 32}
    losses = plain_run(plain, (data.tokens, data.targets), num_steps=16, **given).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10
    expected = of_tokens(plain(data.tokens), data.targets).item()
    assert run.history["val_loss"][-1] == pytest.approx(expected, abs=1e-9)


def measured_tokens(model, batch):
    output, counts = model(batch[0]), batch[1] != IGNORED
    right = (output.argmax(2) == batch[1])[counts].double().mean()
    return of_tokens(output, batch[1]), {"right": right, "rows": (output.argmax(2) == batch[1]).double().mean()}


def test_metrics_of_a_step_count_the_tokens_that_its_loss_counts(pool):
    model, data = tagger(), Padded()
    with torch.no_grad():
        right, rows = measured_tokens(model, (data.tokens, data.targets))[1].values()
    run = wait(pool.fit(model, data, val=data, step=measured_tokens, lr=1e-9, batch_size=256, steps=1))
    for prefix in ("", "val_"):
        assert run.history[f"{prefix}right"] == pytest.approx([right.item()], abs=1e-12)
        assert run.history[f"{prefix}rows"] == pytest.approx([rows.item()], abs=1e-12)
    assert not [event for event in run.events if event.kind == "metrics"]


class Full(Padded):
    """The same, of which all tokens count."""

    def __init__(self):
        super().__init__()
        self.targets = self.targets.clamp(min=0)


def two_terms(model, batch):
    output = model(batch[0])
    return of_tokens(output, batch[1]) + 0.1 * output.square().mean()


def test_a_mean_over_tokens_may_be_added_to_one_over_samples_where_all_tokens_count(pool):
    model, plain = twice(tagger)
    data = Full()
    run = wait(pool.fit(model, data, val=data, step=two_terms, lr=1e-2, batch_size=32, steps=16))
    given = {"step": two_terms, "optimizer": adamw(plain.parameters(), 1e-2), "batch_size": 32}
    losses = plain_run(plain, (data.tokens, data.targets), num_steps=16, **given).losses
    assert largest_gap(run.history["loss"], losses) <= 1e-10
    expected = two_terms(plain, (data.tokens, data.targets)).item()
    assert run.history["val_loss"][-1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_step_in_which_some_do_not_count_is_refused(pool, part):
    train, val = (Padded(), Full()) if part == "train" else (Full(), Padded())
    run = pool.fit(tagger(), train, val=val, step=two_terms, lr=1e-2, batch_size=32, epochs=2, shuffle=False)
    told = r"the loss adds a mean over targets to another term, and parts .* \([\d.]+ for each of \d+ samples"
    with pytest.raises(RunError, match=told):
        wait(run)
    assert run.step == (0 if part == "train" else 8)


@pytest.mark.parametrize("way", ["step", "loss"])
def test_a_sum_over_the_batch_stays_a_sum(pool, way):
    def summed(output, target):
        return functional.cross_entropy(output, target, reduction="sum")

    def step(model, batch):
        return summed(model(batch[0]), batch[1])

    model, plain = twice(mlp)
    given = {"step": step} if way == "step" else {"loss": nn.CrossEntropyLoss(reduction="sum")}
    run = wait(pool.fit(model, digits(), lr=1e-3, steps=NUM_STEPS, **given))
    losses = plain_run(plain, digits(), num_steps=NUM_STEPS, step=step).losses
    assert largest_gap([loss / 64 for loss in run.history["loss"]], [loss / 64 for loss in losses]) <= 1e-10
    assert [e.text for e in run.events if e.kind == "loss"] == [
        "this loss is a sum over the samples of a batch: those of its parts are added up"
    ]


def test_a_step_over_the_whole_batch_is_refused_before_anything_starts(pool):
    def step(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1]).sqrt()

    with pytest.raises(ArgumentError, match=r"^step's loss is no mean over samples: of \d of them it is .*dnb\.Sum"):
        pool.fit(mlp(), digits(), step=step)
    assert not pool.facts.run_status or pool.run is None or not pool.run.is_active


# Metrics --------------------------------------------------------------------------------------------


def f_score(output, target):
    """F1 of the digit 3."""
    found, is_so = output.argmax(1) == 3, target == 3
    return 2 * (found & is_so).sum() / (found.sum() + is_so.sum()).clamp(min=1)


class FScore:
    """The same, with a state of its own."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.hits = self.all = torch.tensor(0)

    def update(self, output, target):
        found, is_so = output.argmax(1) == 3, target == 3
        self.hits = self.hits + (found & is_so).sum()
        self.all = self.all + found.sum() + is_so.sum()

    def compute(self):
        return 2 * self.hits / self.all.clamp(min=1)


def test_metrics_that_are_no_means_over_samples_are_those_of_all_of_them(pool):
    model, plain = twice(mlp)
    metrics = {"f1": f_score, "own_f1": FScore(), "accuracy": accuracy}
    run = wait(pool.fit(model, digits(), val=digits(600), loss="cross_entropy", metrics=metrics, epochs=2))
    plain_losses = plain_run(plain, digits(), num_steps=len(run.history["loss"])).losses
    assert largest_gap(run.history["loss"], plain_losses) <= 1e-10
    x, y = digits(600)
    output = model(x)
    assert run.history["val_f1"][-1] == pytest.approx(f_score(output, y).item())
    assert run.history["val_own_f1"][-1] == run.history["val_f1"][-1]
    assert run.history["val_accuracy"][-1] == pytest.approx((output.argmax(1) == y).double().mean().item())
    batch = next(dnb.batches(digits()))
    assert run.history["f1"][0] == pytest.approx(f_score(mlp()(digits()[0][batch]), digits()[1][batch]).item())
    assert [e.text for e in run.events if e.kind == "metrics"] == [
        "metrics 'f1', 'own_f1' are computed of all samples at once: outputs are gathered, and one engine evaluates "
        "all validation data"
    ]
