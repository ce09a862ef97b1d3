"""User code that fails in mid-run: the run pauses, the code is mended in a cell, and the run goes on from that step."""

import pytest
import torch
from torch import nn

import dnb
from dnb.errors import ArgumentError, RunError, ShippingError
from tests.engines.pools import let_join, start_engine, wait, wait_until
from tests.models import cross_entropy_step, digits, largest_gap, mlp, plain_run

pytestmark = pytest.mark.engines

BAD_SAMPLE = 5 * 64 + 3  # in the 6th batch, as nothing is shuffled


def marked_digits():
    inputs, targets = digits(640)
    inputs = inputs.clone()
    inputs[BAD_SAMPLE] = 77.0
    return inputs, targets


def picky_step(model, batch):
    if (batch[0] == 77.0).any():
        raise ValueError("a pixel of 77")
    return cross_entropy_step(model, batch)


def clipping_step(model, batch):
    return cross_entropy_step(model, (batch[0].clamp(max=1.0), batch[1]))


def plain_clipping_losses(num_steps):
    """One process whose step function was right from the beginning."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = marked_digits()
    losses = []
    for first in range(0, num_steps * 64, 64):
        optimizer.zero_grad()
        loss = clipping_step(model, (inputs[first : first + 64], targets[first : first + 64]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fit_picky(pool, **options):
    return pool.fit(mlp(), marked_digits(), **{"step": picky_step, "lr": 1e-3, "shuffle": False, **options})


def test_a_failure_names_engine_step_shard_and_sample(pool):
    run = fit_picky(pool)
    with pytest.raises(RunError, match="ValueError: a pixel of 77") as caught:
        wait(run)
    assert "step 6" in str(caught.value)
    assert f"engine {pool.engines[0].id}: shard 2, sample {BAD_SAMPLE}" in str(caught.value)
    assert "picky_step" in caught.value.remote_traceback
    assert run.error_traceback == caught.value.remote_traceback


def test_a_run_that_failed_goes_on_from_that_step_with_a_mended_function(pool):
    run = fit_picky(pool)
    with pytest.raises(RunError):
        wait(run)
    assert (run.status, run.step) == ("paused", 5)
    run.resume(step=clipping_step)
    assert wait(run).status == "finished"
    assert largest_gap(run.history["loss"], plain_clipping_losses(10)) < 1e-10


def test_a_mended_loss_takes_the_place_of_a_step_function(pool):
    run = fit_picky(pool)
    with pytest.raises(RunError):
        wait(run)
    run.resume(loss="cross_entropy")
    assert wait(run).status == "finished"


def test_a_run_that_is_resumed_as_it_was_fails_at_the_same_step_again(pool):
    run = fit_picky(pool)
    for _ in range(2):
        with pytest.raises(RunError, match="a pixel of 77"):
            wait(run)
        assert (run.status, run.step) == ("paused", 5)
        run.resume()


def test_an_engine_that_joins_later_has_the_mended_function_too(pool):
    engine = start_engine(pool)
    run = fit_picky(pool, epochs=2000)
    with pytest.raises(RunError):
        wait(run)
    run.resume(step=clipping_step)
    let_join(pool, engine)
    wait_until(run, lambda run: any(worker.steps > 3 for worker in run.workers[2:]), what="the joiner works")
    assert run.status == "running"


def test_a_checkpoint_after_that_goes_on_with_the_mended_function(pool):
    run = fit_picky(pool, epochs=2, checkpoint_every=1)
    with pytest.raises(RunError):
        wait(run)
    run.resume(step=clipping_step)
    wait(run)
    resumed = wait(dnb.resume(run.folder, epochs=4, pool=pool))
    assert (resumed.status, resumed.step) == ("finished", 40)  # the bad sample came twice more
    again = wait(dnb.resume(resumed.checkpoint(), train=marked_digits(), epochs=5, pool=pool))
    assert (again.status, again.step) == ("finished", 50)


def test_a_checkpoint_before_that_has_the_function_that_failed(pool, tmp_path):
    run = fit_picky(pool)
    with pytest.raises(RunError):
        wait(run)
    path = run.checkpoint(tmp_path / "before")
    run.stop()
    wait(run)
    with pytest.raises(RunError, match="a pixel of 77"):
        wait(dnb.resume(path, pool=pool))


def test_functions_that_are_given_to_resume_come_before_those_that_were_mended(pool):
    run = fit_picky(pool)
    with pytest.raises(RunError):
        wait(run)
    run.resume(loss="cross_entropy")
    path = wait(run).checkpoint()
    with pytest.raises(RunError, match="a pixel of 77"):
        wait(dnb.resume(path, model=mlp(), train=marked_digits(), step=picky_step, epochs=2, pool=pool))


def contrast(output, target):
    logits = output @ output.T
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def summed(output, target):
    return nn.functional.cross_entropy(output, target, reduction="sum")


def not_yet(output, target):
    raise ValueError("not yet")


@pytest.mark.parametrize("strategy", ["data", "pipeline"])
def test_a_mended_loss_that_is_no_mean_over_samples_is_refused_and_another_goes_on(pool, strategy):
    run = pool.fit(mlp(), digits(256), loss=not_yet, lr=1e-3, shuffle=False, steps=4, strategy=strategy)
    with pytest.raises(RunError, match="not yet"):
        wait(run)
    run.resume(loss=contrast)
    with pytest.raises(
        RunError, match=r"step 1: ReturnError: this loss looks at the whole batch, and this run gathers"
    ):
        wait(run)
    run.resume(loss=summed)
    with pytest.raises(RunError, match=r"step 1: ReturnError: this loss is a sum over samples, and the run has begun"):
        wait(run)
    weighted = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0))
    run.resume(loss=weighted)
    wait(run)
    plain = plain_run(
        mlp(), digits(256), num_steps=4, shuffle=False, step=lambda model, batch: weighted(model(batch[0]), batch[1])
    )
    assert largest_gap(run.history["loss"], plain.losses) < 1e-10


def root_step(model, batch):
    return cross_entropy_step(model, batch).sqrt()


NO_MEAN = r"ReturnError: step's loss is no mean over samples: of 8 of them it is .*dnb\.Sum"


def test_a_mended_step_that_is_no_mean_over_samples_is_refused_and_another_goes_on(pool):
    run = fit_picky(pool)
    with pytest.raises(RunError):
        wait(run)
    run.resume(step=root_step)
    with pytest.raises(RunError, match=f"step 6: {NO_MEAN}"):
        wait(run)
    run.resume(step=clipping_step)
    assert wait(run).status == "finished"
    assert largest_gap(run.history["loss"], plain_clipping_losses(10)) < 1e-10


def test_so_is_one_that_is_given_to_a_run_that_is_resumed(pool):
    path = wait(pool.fit(mlp(), digits(256), step=cross_entropy_step, lr=1e-3, epochs=1)).checkpoint()
    with pytest.raises(RunError, match=f"step 5: {NO_MEAN}"):
        wait(dnb.resume(path, model=mlp(), train=digits(256), step=root_step, epochs=2, pool=pool))


def test_functions_are_replaced_only_while_a_run_is_paused(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000)
    with pytest.raises(ArgumentError, match="not paused"):
        run.resume(step=cross_entropy_step)
    assert run.is_active


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ({"step": 3}, ArgumentError, "step is a int"),
        ({"loss": "crossentropy"}, ArgumentError, "no loss 'crossentropy'"),
        ({"step": picky_step, "loss": "cross_entropy"}, ArgumentError, "loss or step, not both"),
        ({"loss": nn.MSELoss(reduction="none")}, ArgumentError, "reduction='none'"),
        ({"step": (_ for _ in ()).__next__}, ShippingError, "cannot be sent"),
    ],
    ids=["a_number", "an_unknown_name", "both", "one_for_each_sample", "a_generator"],
)
def test_what_is_no_function_is_refused_and_the_run_stays_paused(pool, functions, error, message):
    run = fit_picky(pool)
    with pytest.raises(RunError):
        wait(run)
    with pytest.raises(error, match=message):
        run.resume(**functions)
    assert run.status == "paused"
