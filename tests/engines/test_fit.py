"""Runs on a real pool: what a user sees, and what is refused."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dnb
from dnb.api.runs.run_folders import RUNS_FOLDER
from dnb.errors import ArgumentError, RunError, ShippingError
from dnb.hub.handover import POOL_FILE
from dnb.hub.history.run_files import read_history
from tests.engines.pools import PATIENCE_SECONDS, wait
from tests.models import DigitRows, digits, largest_gap, largest_relative_gap, mlp, plain_losses

pytestmark = pytest.mark.engines


def fit(pool, model=None, train=None, **options):
    options = {"loss": "cross_entropy", "lr": 1e-3, **options}
    return pool.fit(mlp() if model is None else model, digits() if train is None else train, **options)


def wait_for_step(run, step):
    reached = threading.Event()
    run.add_listener(lambda run: reached.set() if run.step >= step else None)
    assert reached.wait(PATIENCE_SECONDS), f"step {step} was not reached in {PATIENCE_SECONDS} s: {run}"


def weighted_step(model, batch):
    loss = torch.nn.functional.cross_entropy(model(batch["pixels"]), batch["target"], reduction="sum")
    return dnb.Sum(loss, len(batch["target"])), {"half": 0.5}


# What a user sees


def test_fit_returns_at_once_and_the_run_finishes_by_itself(pool):
    run = fit(pool, steps=5)
    assert run.status in ("starting", "running")
    assert wait(run).status == "finished"


def test_the_history_has_one_value_per_step_and_per_epoch(pool):
    run = wait(fit(pool, val=digits(200), metrics="accuracy", epochs=2))
    rows = {name: len(values) for name, values in run.history.items()}
    per_step = dict.fromkeys(["loss", "lr", "samples_per_second", "seconds", "grad_norm", "accuracy"], 58)
    assert rows == {**per_step, "val_loss": 2, "val_accuracy": 2, "digest": 6}  # after each 10th step and the last


def test_the_history_tells_when_each_step_was_done_and_how_large_its_gradient_was(pool):
    run = wait(fit(pool, steps=3, optimizer="sgd"))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = next(iter(DataLoader(TensorDataset(*digits()), 64, shuffle=True, generator=generator)))
    model = mlp()
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert run.history["grad_norm"][0] == pytest.approx(norm.item(), rel=1e-10)
    assert 0 < run.history["seconds"][0] < run.history["seconds"][1] < run.history["seconds"][2] <= run.elapsed_seconds


def test_a_run_tells_how_its_engines_spent_their_time_and_what_they_hold(pool):
    run = wait(fit(pool, steps=20))
    spans = run.utilisation.spans(limit=10)
    assert spans.engines == tuple(worker.engine for worker in run.workers)
    assert np.nansum(spans.shares, axis=2).max() == pytest.approx(1.0)
    assert run.samples_at(np.array([1, 20])).tolist() == [64, 1280]
    assert sorted(shard for worker in run.workers for shard in worker.shards) == list(range(run.num_shards))
    assert {worker.device for worker in run.workers} == {"cpu"}
    assert all(worker.heartbeat_age_seconds < 60 for worker in run.workers)
    assert len(dnb.Run.open(run.folder).utilisation) == len(run.utilisation)


def test_validation_over_the_engines_is_that_of_one_process(pool):
    model = mlp()
    inputs, targets = digits(333)
    run = wait(fit(pool, model, val=(inputs, targets), metrics="accuracy", epochs=1))
    model.eval()
    with torch.no_grad():
        output = model(inputs)
    expected = torch.nn.functional.cross_entropy(output, targets).item()
    assert run.history["val_loss"][-1] == pytest.approx(expected, rel=1e-10)
    assert run.history["val_accuracy"][-1] == pytest.approx((output.argmax(1) == targets).float().mean().item())


def test_arrays_a_data_set_and_a_loader_train_alike(pool):
    inputs, targets = digits()
    forms = [
        {"train": (inputs.numpy(), targets.numpy())},
        {"train": TensorDataset(inputs, targets)},
        {"train": DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)},
    ]
    losses = [wait(fit(pool, steps=20, **form)).history["loss"] for form in forms]
    assert losses[0] == losses[1] == losses[2]


def test_a_step_function_over_dictionaries_with_a_sum_trains_as_the_mean_does(pool):
    run = wait(fit(pool, train=DigitRows(), loss=None, step=weighted_step, steps=20))
    assert largest_gap(run.history["loss"], plain_losses(mlp(), digits(), num_steps=20, batch_size=64)) < 1e-10
    assert run.history["half"] == [0.5] * 20


def test_a_loss_defined_on_the_spot_travels(pool):
    def squared(output, target):
        return ((output - torch.nn.functional.one_hot(target, 10)) ** 2).mean()

    assert wait(fit(pool, loss=squared, steps=3)).status == "finished"


def test_the_shares_of_every_worker_add_up_to_its_time(pool):
    run = wait(fit(pool, steps=40))
    assert [w.compute + w.wait + w.data + w.idle for w in run.workers] == pytest.approx([1.0, 1.0])
    assert all(worker.compute > 0 for worker in run.workers)


def test_events_tell_the_run_s_story_in_order(pool):
    run = wait(fit(pool, steps=2))
    assert [event.kind for event in run.events] == ["joined", "joined", "running", "finished"]


def test_the_run_s_folder_holds_every_step(pool):
    run = wait(fit(pool, steps=9, name="kept"))
    rows = read_history(run.folder)
    assert [(row.kind, row.step) for row in rows] == [*(("step", step) for step in range(1, 10)), ("evaluation", 9)]
    assert [row.values["loss"] for row in rows[:9]] == run.history["loss"]
    assert rows[9].values == {"digest": run.history["digest"][-1]}
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"


def test_a_run_that_has_ended_is_read_from_its_folder(pool):
    run = wait(fit(pool, steps=9, name="kept"))
    again = dnb.attach("kept")
    assert (again.status, again.step, again.history["loss"]) == ("finished", 9, run.history["loss"])


def test_at_most_two_messages_each_way_per_engine_and_step(pool):
    before = {status.facts.engine: status for status in pool.statuses}
    wait(fit(pool, steps=100))
    for status in pool.statuses:
        old = before[status.facts.engine]
        assert status.messages_in - old.messages_in <= 2 * 100 + 1  # and one when the run was loaded
        assert status.messages_out - old.messages_out <= 2 * 100 + 2  # and one to load, one to unload


def test_no_gradient_goes_through_ipyparallel(pool):
    asked = len(pool.client.history)
    wait(fit(pool, steps=20))
    assert len(pool.client.history) == asked


def test_the_data_lie_in_memory_once_and_every_engine_maps_them(pool):
    run = fit(pool, epochs=300, name="mapped")
    wait_for_step(run, 1)
    maps = [Path(f"/proc/{engine.pid}/maps").read_text() for engine in pool.engines]
    folder = pool.segment_folders[0].name
    assert [f"{folder}/mapped-data" in text for text in maps] == [True, True]


def test_a_cell_on_the_training_engines_is_answered_while_they_train(pool):
    run = fit(pool, epochs=2000)
    wait_for_step(run, 1)
    before = run.step
    pids = pool.client[:].apply_sync(lambda: __import__("os").getpid())
    assert run.status == "running"
    wait_for_step(run, before + 1)
    assert sorted(pids) == sorted(engine.pid for engine in pool.engines)


def test_stop_keeps_what_was_trained(pool):
    model, untrained = mlp(), mlp()
    run = fit(pool, model, epochs=5000)
    wait_for_step(run, 5)
    run.stop()
    wait(run)
    assert run.status == "stopped"
    assert not torch.equal(model[0].weight, untrained[0].weight)
    assert torch.isfinite(model[0].weight).all()


def test_a_paused_run_stands_still_with_its_state_at_home_and_goes_on(pool):
    model = mlp()
    run = fit(pool, model, epochs=100)
    wait_for_step(run, 3)
    run.pause()
    wait(run)
    plain = mlp()
    losses = plain_losses(plain, digits(), num_steps=run.step, batch_size=64)
    assert run.status == "paused"
    assert largest_gap(run.history["loss"], losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10
    at = run.step
    run.resume()
    wait_for_step(run, at + 1)


def test_a_new_learning_rate_counts_from_the_next_step(pool):
    run = fit(pool, epochs=5000)
    wait_for_step(run, 2)
    run.set(lr=5e-4)
    run.stop()
    wait(run)
    rates = run.history["lr"]
    assert rates == sorted(rates, reverse=True)
    assert set(rates) <= {1e-3, 5e-4}


def test_an_optimizer_of_the_notebook_holds_its_state_at_the_end(pool):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    wait(fit(pool, model, optimizer=optimizer, lr=None, steps=7))
    assert [state["step"].item() for state in optimizer.state.values()] == [7.0] * 4


def test_a_scheduler_is_stepped_with_every_step(pool):
    run = wait(fit(pool, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5), steps=5))
    assert run.history["lr"] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])


def test_the_history_becomes_a_table(pool):
    frame = wait(fit(pool, val=digits(64), epochs=1)).history.to_pandas()
    assert frame.index[-1] == 29
    assert np.isnan(frame["val_loss"].iloc[0])
    assert frame["val_loss"].iloc[-1] > 0


# What goes wrong


def test_labels_out_of_range_pause_the_run_with_engine_step_and_traceback(pool):
    inputs, targets = digits()
    run = fit(pool, train=(inputs, targets + 10), batch_size=1797)
    told = r"paused at step 1: IndexError: Target \d+ is out of bounds. \(engines? \d.*nothing of this step was applied"
    with pytest.raises(RunError, match=rf"(?s){told}.*Traceback"):
        wait(run)
    assert (run.status, run.step) == ("paused", 0)


def test_the_pool_is_usable_after_a_run_whose_user_code_failed(pool):
    inputs, targets = digits()
    run = fit(pool, train=(inputs, targets + 10))
    with pytest.raises(RunError):
        wait(run)
    run.stop()
    assert wait(run).status == "stopped"
    assert wait(fit(pool, steps=2)).status == "finished"


def test_an_optimizer_that_fails_in_a_step_fails_the_run(pool):
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError("no step")

    run = fit(pool, optimizer=lambda parameters: Broken(parameters, lr=0.1), lr=None)
    with pytest.raises(RunError, match=r"(?s)step 1: ZeroDivisionError: no step.*Traceback"):
        wait(run)
    assert run.status == "failed"


def test_a_nan_loss_pauses_at_its_step_with_nothing_applied(pool):
    inputs, targets = digits(640)
    inputs = inputs.clone()
    inputs[5 * 64 + 3] = float("nan")  # the 6th batch, as nothing is shuffled
    model, plain = mlp(), mlp()
    run = fit(pool, model, train=(inputs, targets), shuffle=False)
    with pytest.raises(
        RunError, match=rf"paused at step 6: the loss is nan \(engine {pool.engines[0].id}, shard 2: .*nothing of this"
    ):
        wait(run)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for first in range(0, 5 * 64, 64):
        optimizer.zero_grad()
        batch = slice(first, first + 64)
        torch.nn.functional.cross_entropy(plain(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    assert (run.status, run.step) == ("paused", 5)
    assert largest_relative_gap(model, plain) < 1e-10


def test_a_second_fit_is_refused_while_a_run_is_active(pool):
    run = fit(pool, epochs=5000, name="first")
    with pytest.raises(ArgumentError, match=r"run 'first' is active: .*%dtrain stop"):
        fit(pool)
    assert run.is_active


def test_an_attribute_that_cannot_travel_is_named(pool):
    model = mlp()
    model.lock = threading.Lock()
    with pytest.raises(ShippingError, match=r"model\.lock \(a lock\) cannot be sent"):
        fit(pool, model)


def test_a_refused_run_leaves_no_shared_memory(pool):
    def files():
        found = [path for folder in pool.segment_folders if folder.exists() for path in folder.iterdir()]
        return [path.name for path in found if path.name != POOL_FILE]  # which lives as long as the pool

    with pytest.raises(dnb.RunError, match="TypeError"):
        fit(pool, optimizer=lambda parameters: torch.optim.SGD(parameters, no_such_option=1), lr=None)
    assert files() == []
    assert not RUNS_FOLDER.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 1798}, ArgumentError, "batch_size=1798 is larger than the data set of 1797 samples"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be a positive integer, not 0"),
        ({"loss": "cross_entropi"}, ArgumentError, "no loss 'cross_entropi': did you mean 'cross_entropy'"),
        ({"optimizer": "adamv"}, ArgumentError, "no optimizer 'adamv': did you mean 'adam"),
        ({"optimizer": "lbfgs"}, ArgumentError, "LBFGS evaluates the loss several times"),
        ({"strategy": "pipelin"}, ArgumentError, "no strategy 'pipelin': did you mean 'pipeline'"),
        ({"transport": "pigeon"}, ArgumentError, "no transport 'pigeon'"),
        ({"epochs": 0}, ArgumentError, "epochs must be a positive integer"),
        ({"lr": -1}, ArgumentError, "lr must be a positive number"),
        ({"shards": 65}, ArgumentError, "shards=65 is more than the 64 samples"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(pool, options, error, message):
    with pytest.raises(error, match=message):
        fit(pool, **options)
    assert not RUNS_FOLDER.exists()


def test_parts_of_different_length_are_refused_with_both(pool):
    inputs, targets = digits()
    with pytest.raises(ArgumentError, match="1797 and 1790 samples"):
        fit(pool, train=(inputs, targets[:1790]))


def test_a_model_without_trainable_parameters_is_refused(pool):
    with pytest.raises(ArgumentError, match="no trainable parameters, all 4 are frozen"):
        fit(pool, mlp().requires_grad_(requires_grad=False))


def test_a_model_that_was_changed_meanwhile_is_told_and_the_run_still_ends(pool):
    model = mlp()
    run = fit(pool, model, epochs=5000)
    wait_for_step(run, 2)
    model[2] = torch.nn.Linear(128, 7)
    run.stop()
    with pytest.raises(RunError, match="the trained state could not be copied into the notebook's model: RuntimeError"):
        wait(run)
    assert run.status == "stopped"


def test_in_a_script_wait_tells_each_epoch_and_the_end_in_a_line(pool, capsys):
    run = dnb.fit(mlp(), digits(), loss="cross_entropy", val=digits(200), epochs=2, name="told", pool=pool)
    wait(run)
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" · ")[0] for line in told if "epoch" in line][-1:] == [f"{run.name}: epoch 2 of 2"]
    assert told[-1].startswith(f"{run.name}: finished after 58 steps in ")


def test_a_run_that_is_not_to_be_shown_is_silent(pool, capsys):
    wait(dnb.fit(mlp(), digits(), loss="cross_entropy", steps=3, display="none", pool=pool))
    assert capsys.readouterr().out == ""


def test_what_is_no_display_is_refused_before_a_run_begins(pool):
    before = pool.run
    with pytest.raises(ArgumentError, match=r"display='wigdet' is no display; did you mean 'widget'"):
        dnb.fit(mlp(), digits(), loss="cross_entropy", display="wigdet", pool=pool)
    assert pool.run is before


def test_a_run_is_plotted_as_a_figure_of_plotly(pool):
    run = wait(fit(pool, steps=5, val=digits(100), metrics="accuracy"))
    names = [trace.name for trace in run.plot().data]
    assert {"training", "validation", "accuracy", "val_accuracy"} <= set(names)
