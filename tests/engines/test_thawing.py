"""Parameters that user code thaws or freezes in mid-run train from that step on, as in one process."""

import pytest
import torch
from torch import nn

import dnb
from dnb.errors import RunError
from tests.engines.pools import wait, wait_until
from tests.models import digits, largest_gap, largest_relative_gap, plain_run

pytestmark = pytest.mark.engines

NUM_STEPS = 24
THAWING_STEPS = 7, 14


class Partly(nn.Module):
    """Its first layers are frozen, the last one trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 16), nn.Linear(16, 300), nn.Linear(300, 10)
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)

    def forward(self, inputs):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


def marked_digits():
    """With a column that marks a sample of two batches: at each of them a layer is thawed."""
    inputs, targets = digits()
    marks = torch.zeros(len(inputs), dtype=torch.int64)
    order = [*dnb.batches((inputs, targets), batch_size=64)]
    for mark, step in enumerate(THAWING_STEPS, 1):
        marks[order[step - 1][9 * mark]] = mark
    return inputs, targets, marks


def thaw_at_marks(model, batch):
    """Gradual unfreezing by what is in the batch."""
    inputs, targets, marks = batch
    if torch.is_grad_enabled() and len(inputs) > 8:  # not where a few samples are rehearsed
        if (marks == 1).any():
            model.second.requires_grad_(True)
        if (marks == 2).any():
            model.first.requires_grad_(True)
    return nn.functional.cross_entropy(model(inputs), targets)


def alone(*, num_steps=NUM_STEPS, make=None, model=None, step=thaw_at_marks, **options):
    """The same in one process."""
    model = Partly() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2) if make is None else make(model)
    plain = plain_run(model, marked_digits(), num_steps=num_steps, step=step, optimizer=optimizer, **options)
    return model, plain.losses


def thaw_event(run):
    return [event.text for event in run.events if event.kind == "thawed"]


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_layers_that_are_thawed_in_mid_run_train_as_in_one_process(pool_of, transport):
    model, (plain, losses) = Partly(), alone(clip_norm=0.5)
    options = {"lr": 1e-2, "clip_norm": 0.5, "steps": NUM_STEPS, "transport": transport}
    run = wait(pool_of.fit(model, marked_digits(), step=thaw_at_marks, **options))
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-8
    assert not torch.equal(model.first.weight, Partly().first.weight)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def two_groups(model):
    """As people write them; the first layer is in neither, and stays as it is."""
    return torch.optim.AdamW(
        [
            {"params": model.second.parameters(), "lr": 1e-3, "weight_decay": 0.1},
            {"params": model.third.parameters()},
        ],
        lr=1e-2,
    )


@pytest.mark.parametrize("make", [momentum, two_groups])
def test_a_thawed_parameter_is_trained_by_the_group_of_the_optimizer_that_holds_it(pool, make):
    model, (plain, losses) = Partly(), alone(make=make)
    run = pool.fit(model, marked_digits(), step=thaw_at_marks, optimizer=make(model), steps=NUM_STEPS)
    assert largest_gap(wait(run).history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-8
    assert torch.equal(model.first.weight, Partly().first.weight) == (make is two_groups)


def test_an_exact_run_that_thaws_has_the_same_bits_on_one_engine_and_on_three(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = []
    for num_engines in (1, 3):
        models.append(Partly())
        run = shared.of(num_engines).fit(
            models[-1], marked_digits(), step=thaw_at_marks, lr=1e-2, steps=NUM_STEPS, exact=True, shards=4
        )
        wait(run)
    left, right = (model.state_dict() for model in models)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_run_says_from_which_step_on_a_parameter_is_trained(pool):
    run = wait(pool.fit(Partly(), marked_digits(), step=thaw_at_marks, lr=1e-2, steps=NUM_STEPS))
    assert thaw_event(run) == [
        "parameter 'second.bias' and 1 more was thawed: trained from step 7 on",
        "parameter 'first.bias' and 1 more was thawed: trained from step 14 on",
    ]


class Unfreezing:
    """Thaws in the hub, after an update."""

    def __init__(self, *, refreezes: bool) -> None:
        self.num_steps, self.refreezes = 0, refreezes

    def __call__(self, model) -> None:
        self.num_steps += 1
        if self.num_steps == 4:
            model.second.requires_grad_(True)
        if self.num_steps == 10 and self.refreezes:
            model.second.requires_grad_(False)
            model.third.bias.requires_grad_(False)


def plain_step(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("refreezes", [False, True])
def test_what_after_step_thaws_or_freezes_counts_from_the_next_step_on(pool, refreezes):
    model, plain, losses = Partly(), Partly(), []
    after, optimizer = Unfreezing(refreezes=refreezes), torch.optim.AdamW(plain.parameters(), 1e-2)
    for indices in [*dnb.batches(marked_digits(), batch_size=64)][:NUM_STEPS]:
        optimizer.zero_grad()
        loss = plain_step(plain, [part[indices] for part in marked_digits()])
        loss.backward()
        optimizer.step()
        after(plain)
        losses.append(loss.item())
    run = pool.fit(
        model,
        marked_digits(),
        step=plain_step,
        after_step=Unfreezing(refreezes=refreezes),
        lr=1e-2,
        steps=NUM_STEPS,
    )
    assert largest_gap(wait(run).history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-8


def test_a_run_goes_on_from_a_checkpoint_with_what_was_thawed(pool):
    options = {"step": thaw_at_marks, "lr": 1e-2}
    model, (plain, losses) = Partly(), alone(num_steps=40)
    first = wait(pool.fit(model, marked_digits(), steps=40, checkpoint_every=30, **options))
    again = Partly()
    second = wait(dnb.resume(first.folder / "checkpoints" / "step-000030", pool=pool, model=again))
    assert largest_gap(second.history["loss"][30:], losses[30:]) < 1e-10
    assert largest_relative_gap(again, plain) < 1e-8
    assert model.first.weight.requires_grad


def test_an_engine_that_joins_later_trains_what_was_thawed(pool):
    run = pool.fit(Partly(), marked_digits(), step=thaw_at_marks, lr=1e-2, steps=1_000_000)
    wait_until(run, lambda run: len(thaw_event(run)) == 2 and run.step > 30, what="both were thawed")
    pool.add(1)
    reached = run.step + 30
    wait_until(run, lambda run: run.step > reached, what="it takes part")
    run.stop()
    wait(run)
    assert largest_gap(run.history["loss"], alone(num_steps=run.step)[1]) < 1e-8


class Normalized(Partly):
    """With a BatchNorm, so that engines can compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, inputs):
        return super().forward(self.norm(inputs))


def test_engines_that_compute_together_refuse_a_parameter_that_is_thawed(pool):
    run = pool.fit(Normalized(), marked_digits(), step=thaw_at_marks, lr=1e-2, steps=NUM_STEPS, sync_batchnorm=True)
    sentence = r"parameter '\w+\.\w+' was frozen when the run began .* fit with strategy='data', or let it be trainable"
    with pytest.raises(RunError, match=sentence):
        wait(run)
    run.stop()


def test_a_run_whose_loss_is_over_the_batch_trains_what_is_thawed(pool):
    model, plain = ThawsInForward(), ThawsInForward()
    inputs, targets = digits()
    losses, optimizer = [], torch.optim.AdamW(plain.parameters(), 1e-2)
    for indices in [*dnb.batches((inputs, targets), batch_size=64)][:NUM_STEPS]:
        optimizer.zero_grad()
        value = rooted(plain(inputs[indices]), targets[indices])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    run = wait(pool.fit(model, (inputs, targets), loss=rooted, lr=1e-2, steps=NUM_STEPS))
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-8
    assert thaw_event(run)


def rooted(output, target):
    """It looks at the whole batch."""
    return nn.functional.cross_entropy(output, target).sqrt()


class ThawsInForward(Partly):
    """Lets its second layer train from the fourth batch of a training on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_batches = 0

    def forward(self, inputs):
        if self.training and torch.is_grad_enabled() and len(inputs) > 8:
            self.num_batches += 1
            if self.num_batches == 4:
                self.second.requires_grad_(True)
        return super().forward(inputs)


def test_a_proof_ends_where_a_parameter_is_thawed(pool):
    run = wait(pool.fit(Partly(), marked_digits(), step=thaw_at_marks, lr=1e-2, steps=NUM_STEPS))
    proof = run.prove(20)
    assert proof.is_same
    assert proof.steps[-1].step == 6
    assert "trained from step 7 on" in proof.notes[0]


def test_a_second_fit_goes_on_with_what_was_thawed_in_the_first(pool):
    model = Partly()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = wait(pool.fit(model, marked_digits(), step=thaw_at_marks, optimizer=optimizer, steps=NUM_STEPS))
    assert len(thaw_event(first)) == 2
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.first.weight.clone()
    wait(pool.fit(model, marked_digits(), step=plain_step, optimizer=optimizer, steps=2))
    assert not torch.equal(model.first.weight, before)


class Whole(Partly):
    """All of it trains at first."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(True)


def freeze_at_first_mark(model, batch):
    """And thaw at the second: whatever engine sees them, it is for all."""
    inputs, targets, marks = batch
    if torch.is_grad_enabled() and len(inputs) > 8:
        if (marks == 1).any():
            model.second.requires_grad_(False)
        if (marks == 2).any():
            model.second.requires_grad_(True)
    return nn.functional.cross_entropy(model(inputs), targets)


@pytest.mark.parametrize("options", [{}, {"exact": True, "shards": 4}, {"transport": "socket"}, {"micro_batch": 16}])
def test_what_one_engine_freezes_and_thaws_is_frozen_and_thawed_on_all(pool, options):
    model, (plain, losses) = Whole(), alone(model=Whole(), step=freeze_at_first_mark)
    run = wait(pool.fit(model, marked_digits(), step=freeze_at_first_mark, lr=1e-2, steps=NUM_STEPS, **options))
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-8


def freeze_where_there_is_no_mark(model, batch):
    """In one part of a batch, and not in the other."""
    inputs, targets, marks = batch
    if torch.is_grad_enabled() and len(inputs) > 8:
        model.second.requires_grad_(bool((marks > 0).any()))
    return nn.functional.cross_entropy(model(inputs), targets)


def test_a_parameter_that_stays_frozen_for_one_part_of_a_step_alone_is_refused(pool):
    run = pool.fit(Whole(), marked_digits(), step=freeze_where_there_is_no_mark, lr=1e-2, steps=NUM_STEPS)
    with pytest.raises(
        RunError, match=r"'second\.\w+' is frozen for a part of the batch and trained for another.*after_step="
    ):
        wait(run)
    assert run.step == THAWING_STEPS[0] - 1
    run.stop()


def test_an_engine_that_joins_later_freezes_what_the_others_have_frozen(pool):
    model = Whole()
    run = pool.fit(model, marked_digits(), step=FreezesOnce(), lr=1e-2, steps=1_000_000)
    wait_until(run, lambda run: run.step > 30, what="step 30")
    pool.add(1)
    reached = run.step + 30
    wait_until(run, lambda run: run.step > reached, what="it takes part")
    run.stop()
    wait(run)
    assert largest_gap(run.history["loss"], alone(num_steps=run.step, model=Whole(), step=FreezesOnce())[1]) < 1e-8
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == [
        "second.weight",
        "second.bias",
    ]


class FreezesOnce:
    """At the first mark that it sees, and not when the sample comes again."""

    def __init__(self) -> None:
        self.has_frozen = False

    def __call__(self, model, batch):
        inputs, targets, marks = batch
        if torch.is_grad_enabled() and len(inputs) > 8 and (marks == 1).any() and not self.has_frozen:
            self.has_frozen = True
            model.second.requires_grad_(False)
        return nn.functional.cross_entropy(model(inputs), targets)
