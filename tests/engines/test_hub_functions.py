"""Functions of the user that the hub calls: `after_step`, hooks on gradients and on the optimizer's step."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dnb
from dnb.errors import ArgumentError, RunError
from tests.engines.pools import wait, wait_until
from tests.models import cross_entropy_step, digits, largest_gap, largest_relative_gap, mlp, twice

pytestmark = pytest.mark.engines


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def plain_loop(model, *, num_steps, optimizer, after_step=None, batch_size=64):
    """One process, with a function after every update."""
    losses, batches = [], dnb.batches(digits(), epochs=100, batch_size=batch_size)
    for _ in range(num_steps):
        indices = next(batches)
        optimizer.zero_grad()
        loss = cross_entropy_step(model, [part[indices] for part in digits()])
        loss.backward()
        optimizer.step()
        if after_step is not None:
            with torch.no_grad():
                after_step(model)
        losses.append(loss.item())
    return losses


def clip(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clamp(-0.1, 0.1)  # another tensor takes the place of the old one


class ByHand:
    """An average as people write it."""

    def __init__(self, model):
        self.num_updates = 0
        self.shadow = {name: each.detach().clone() for name, each in model.state_dict().items()}

    def update(self, model):
        self.num_updates += 1
        for name, each in model.state_dict().items():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * each


def counted(own, seen):
    """A function as a cell has it, with a list beside the average."""

    def after(model):
        seen.append(len(seen))
        own.update(model)

    return after


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_weights_that_are_clipped_after_each_update_train_as_in_one_process(pool, transport):
    model, plain = twice(mlp)
    run = wait(
        pool.fit(
            model,
            digits(),
            loss="cross_entropy",
            optimizer=sgd(model),
            after_step=clip,
            steps=12,
            transport=transport,
        )
    )
    losses = plain_loop(plain, num_steps=12, optimizer=sgd(plain), after_step=clip)
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


@pytest.mark.parametrize("avg", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_an_averaged_model_comes_home(pool, avg):
    model, plain = twice(mlp)
    own, expected = (AveragedModel(each, multi_avg_fn=avg) for each in (model, plain))
    wait(pool.fit(model, digits(), loss="cross_entropy", after_step=own.update_parameters, lr=1e-2, steps=10))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    plain_loop(plain, num_steps=10, optimizer=optimizer, after_step=expected.update_parameters)
    assert own.n_averaged == 10
    assert largest_relative_gap(own, expected) < 1e-10


def test_an_average_by_hand_comes_home_at_each_pause_and_is_gone_on_with_by_the_next_fit(pool):
    model, plain = twice(mlp)
    own, expected = ByHand(model), ByHand(plain)
    optimizer, plain_optimizer = sgd(model), sgd(plain)
    for _ in range(2):
        wait(
            pool.fit(
                model,
                digits(),
                loss="cross_entropy",
                optimizer=optimizer,
                after_step=lambda model: own.update(model),
                steps=5,
            )
        )
        plain_loop(plain, num_steps=5, optimizer=plain_optimizer, after_step=expected.update)
    assert own.num_updates == 10
    assert max((own.shadow[name] - expected.shadow[name]).abs().max() for name in own.shadow) < 1e-12


def test_what_after_step_keeps_survives_the_hub_and_goes_on_from_a_checkpoint(pool):
    model, plain = twice(mlp)
    own, expected, seen = ByHand(model), ByHand(plain), []
    after = counted(own, seen)
    run = pool.fit(
        model, digits(), loss="cross_entropy", optimizer=sgd(model), after_step=after, steps=1_000_000, exact=True
    )
    wait_until(run, lambda run: run.step >= 3, what="three steps")
    os.kill(pool.facts.hub.pid, signal.SIGKILL)
    wait_until(run, lambda run: any(event.kind == "recovered" for event in run.events), what="another hub")
    reached = run.step
    wait_until(run, lambda run: run.step >= reached + 3, what="three more steps")
    folder = run.checkpoint()
    run.stop()
    wait(run)
    num_steps = run.step
    plain_loop(plain, num_steps=num_steps, optimizer=sgd(plain), after_step=expected.update)
    assert seen == list(range(num_steps))
    assert max((own.shadow[name] - expected.shadow[name]).abs().max() for name in own.shadow) < 1e-9
    fresh = mlp(1)
    again, seen = ByHand(fresh), []
    more = dnb.resume(
        folder,
        model=fresh,
        train=digits(),
        optimizer=sgd(fresh),
        after_step=counted(again, seen),
        steps=int(folder.name.rpartition("-")[2]) + 1,
    )
    assert wait(more).status == "finished"
    assert again.num_updates == len(seen) == more.step
    with pytest.raises(ArgumentError, match=r"after_step is not that of the checkpoint, which keeps .*shadow"):
        dnb.resume(folder, model=fresh, train=digits(), optimizer=sgd(fresh), after_step=clip, steps=1_000_000)


def test_a_function_that_puts_another_parameter_in_the_place_of_one_fails_the_run(pool):
    def replace(model):
        model[0].weight = nn.Parameter(torch.zeros(3, 3))

    with pytest.raises(RunError, match=r"'0\.weight' of shape \(128, 64\) was replaced: change its values in place"):
        wait(pool.fit(mlp(), digits(), loss="cross_entropy", after_step=replace, steps=3))


def test_what_is_no_function_is_refused_before_anything_starts(pool):
    with pytest.raises(ArgumentError, match=r"after_step is a int: give a callable\(model\)"):
        pool.fit(mlp(), digits(), loss="cross_entropy", after_step=3)


def bounded(gradient):
    """A bound that shows whether a hook saw a part's gradient or that of the whole batch."""
    return gradient.clamp(-1e-3, 1e-3)


def only_signs(parameter):
    parameter.grad.sign_()


def hooked(model):
    model[0].weight.register_hook(bounded)
    model[0].bias.register_hook(lambda gradient: gradient * 0)
    model[2].weight.register_post_accumulate_grad_hook(only_signs)
    return model


@pytest.mark.parametrize("options", [{}, {"transport": "socket"}, {"exact": True}, {"strategy": "pipeline"}], ids=str)
def test_hooks_on_parameters_see_the_gradient_of_the_whole_batch(pool, options):
    model, plain = map(hooked, twice(mlp))
    before = model[0].bias.detach().clone()
    run = wait(pool.fit(model, digits(), loss="cross_entropy", optimizer="sgd", lr=1e-3, steps=10, **options))
    losses = plain_loop(plain, num_steps=10, optimizer=torch.optim.SGD(plain.parameters(), lr=1e-3))
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10
    assert torch.equal(model[0].bias, before)


def test_hooks_on_the_optimizer_s_step_run_in_the_hub_and_what_they_keep_comes_home(pool):
    def prepare(model):
        optimizer, norms = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), []

        def clip_after(optimizer, _args, _kwargs):
            norms.append(optimizer.param_groups[0]["params"][0].norm().item())
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.data.clamp_(-0.1, 0.1)

        optimizer.register_step_post_hook(clip_after)
        return optimizer, norms

    model, plain = twice(mlp)
    (optimizer, norms), (plain_optimizer, expected) = prepare(model), prepare(plain)
    run = wait(pool.fit(model, digits(), loss="cross_entropy", optimizer=optimizer, steps=8))
    losses = plain_loop(plain, num_steps=8, optimizer=plain_optimizer)
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10
    assert norms == pytest.approx(expected, rel=1e-10)
