"""Checkpoints of real runs, and runs that go on from them."""

import json
import logging
import pickle
import shutil
from functools import partial
from pathlib import Path

import ipyparallel
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from safetensors.torch import load_file, save
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import dnb
from dnb.api.runs.run import Run
from dnb.errors import ArgumentError, HubError
from dnb.hub.checkpoints.reader import find_checkpoint
from tests.engines.pools import until, wait, wait_until
from tests.models import adamw, digits, dropout_net, largest_gap, largest_relative_gap, mlp, plain_run, twice
from tests.unit.kept_runs import rewrite

pytestmark = pytest.mark.engines

NUM_STEPS = 60


def exact_run(pool, **options):
    """AdamW, dropout, BatchNorm and a scheduler, over two epochs and a bit."""
    model, _ = twice(dropout_net)
    run = pool.fit(
        model,
        digits(27 * 28),
        val=digits(100),
        loss="cross_entropy",
        optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True),
        scheduler=partial(OneCycleLR, max_lr=1e-2, total_steps=NUM_STEPS + 1),
        batch_size=27,
        steps=NUM_STEPS,
        exact=True,
        **options,
    )
    return model, run


def same_bits(left, right):
    return [name for name, tensor in left.state_dict().items() if not torch.equal(tensor, right.state_dict()[name])]


def checkpoint_of(run, step):
    return run.folder / "checkpoints" / f"step-{step:06d}"


def of_steps(history):
    return [history["loss"], history["lr"]]


@pytest.fixture(scope="module")
def undisturbed(shared, tmp_path_factory):
    """An exact run on two engines with its checkpoints, and the model it trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        model, run = exact_run(shared.of(2), checkpoint_every=17, checkpoint_keep=10)
        wait(run)
    return model, run


@pytest.mark.parametrize("num_engines", [1, 2, 3], indirect=True)
def test_an_exact_run_goes_on_to_the_same_bits_on_another_number_of_engines(undisturbed, shared, num_engines):
    trained, run = undisturbed
    pool = shared.of(num_engines)
    *paths, _last = sorted((run.folder / "checkpoints").glob("step-*"))
    assert paths  # of 17, 34 and 51 some may have been left out under load
    for path in paths:
        model, _ = twice(dropout_net)
        resumed = wait(dnb.resume(path, model=model, pool=pool))
        assert same_bits(model, trained) == []
        assert of_steps(resumed.history) == of_steps(run.history)
        assert largest_gap(resumed.history["val_loss"], run.history["val_loss"]) < 1e-10
        assert (resumed.status, resumed.step) == ("finished", NUM_STEPS)


def test_a_run_goes_on_with_the_losses_of_one_process(pool):
    model, plain = twice(mlp)
    run = wait(pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=20, checkpoint_every=20))
    resumed = wait(dnb.resume(run.folder, model=model, steps=50, pool=pool))
    losses = plain_run(plain, digits(), num_steps=50).losses
    assert largest_gap(resumed.history["loss"], losses) < 1e-10


@pytest.mark.parametrize("kind", ["name", "instance", "callable"])
def test_an_optimizer_of_every_kind_goes_on(pool, kind):
    def optimizer_of(model):
        return {
            "name": "adamw",
            "instance": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
            "callable": partial(torch.optim.AdamW, lr=1e-3, fused=True),
        }[kind]

    model, plain = twice(mlp)
    lr = 1e-3 if kind == "name" else None
    run = wait(pool.fit(model, digits(), loss="cross_entropy", optimizer=optimizer_of(model), lr=lr, steps=10))
    path = run.checkpoint()
    new, _ = twice(mlp)
    resumed = wait(dnb.resume(path, model=new, train=digits(), steps=20, pool=pool))
    losses = plain_run(plain, digits(), num_steps=20).losses
    assert largest_gap(resumed.history["loss"], losses) < 1e-10


def test_an_optimizer_instance_of_the_notebook_gets_the_state(pool):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", optimizer="adamw", lr=1e-3, steps=10))
    path = run.checkpoint()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    wait(dnb.resume(path, model=model, train=digits(), optimizer=optimizer, steps=20, pool=pool))
    assert [state["step"].item() for state in optimizer.state.values()] == [20.0] * 4
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_without_a_model_the_run_has_the_one_that_was_kept(pool):
    model, plain = twice(mlp)
    run = wait(pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=10, checkpoint_every=10))
    resumed = wait(dnb.resume(run.folder, steps=20, pool=pool))
    plain_run(plain, digits(), num_steps=20)
    assert largest_relative_gap(resumed.model, plain) < 1e-10


def test_given_model_and_data_nothing_is_unpickled(pool):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=10, checkpoint_every=10))
    folder = checkpoint_of(run, 10)
    for path in [*folder.glob("job.*"), *folder.glob("data.*")]:
        path.unlink()
    model = mlp(seed=3)
    resumed = wait(dnb.resume(folder, model=model, train=digits(), steps=20, pool=pool))
    losses = plain_run(mlp(), digits(), num_steps=20).losses
    assert largest_gap(resumed.history["loss"], losses) < 1e-10


def test_a_loader_of_the_user_goes_on_in_its_own_order(pool):
    def loader():
        sampler = torch.utils.data.SubsetRandomSampler(range(640), generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(*digits(640)), 32, sampler=sampler)

    run = wait(
        pool.fit(mlp(), loader(), loss="cross_entropy", lr=1e-3, epochs=3, checkpoint_every=25, checkpoint_keep=9)
    )
    for train in (None, loader()):
        resumed = wait(dnb.resume(checkpoint_of(run, 25), train=train, pool=pool))
        assert largest_gap(resumed.history["loss"], run.history["loss"]) < 1e-10


def test_the_last_checkpoint_loads_into_a_plain_model(pool):
    model, _ = twice(dropout_net)
    run = wait(pool.fit(model, digits(), loss="cross_entropy", steps=15, checkpoint_every=10))
    plain = dropout_net()
    plain.load_state_dict(load_file(checkpoint_of(run, 15) / "model.safetensors"))
    assert same_bits(plain, model) == []


def test_a_run_that_is_stopped_leaves_its_last_state(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000, checkpoint_every=1000)
    wait_until(run, lambda run: run.step > 3, what="step 3")
    run.stop()
    wait(run)
    assert [path.name for path in (run.folder / "checkpoints").glob("step-*")][-1:] == [f"step-{run.step:06d}"]
    assert [event.kind for event in run.events[-2:]] == ["checkpoint", "stopped"]


def wide_net():
    """7.7 million parameters: with their moments 92 MB, so that a checkpoint takes longer than a step."""
    return nn.Sequential(nn.Linear(64, 100_000, bias=False), nn.Linear(100_000, 10, bias=True))


@pytest.mark.parametrize("verb", ["finished", "stopped"])
def test_the_end_is_the_last_event_and_comes_when_the_last_checkpoint_is_whole(pool, verb):
    """Each step's checkpoint is due while the one before is being written."""
    steps = 6 if verb == "finished" else 100_000
    run = pool.fit(wide_net(), digits(64), loss="cross_entropy", lr=1e-4, steps=steps, checkpoint_every=1)
    if verb == "stopped":
        wait_until(run, lambda run: run.step > 3, what="step 3")
        run.stop()
    until(lambda: json.loads((run.folder / "run.json").read_text())["status"] == verb, what="the folder says so")
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    find_checkpoint(checkpoint_of(run, events[-1]["step"]), wants=lambda _: ["job.pickle", "data.pickle"])
    wait(run)
    told = [(event.kind, event.step) for event in run.events if event.kind in ("checkpoint", verb)]
    assert told[-2:] == [("checkpoint", run.step), (verb, run.step)]
    assert [(event["kind"], event["step"]) for event in events] == [(event.kind, event.step) for event in run.events]
    written = {event.step for event in run.events if " is in " in event.text}
    assert not written & {event.step for event in run.events if "left out" in event.text}


def test_the_best_checkpoint_by_validation_loss_stays(pool):
    inputs, targets = digits(640)
    run = wait(
        pool.fit(
            mlp(),
            (inputs, targets),
            val=(inputs, targets.roll(1)),  # gets worse and worse
            loss="cross_entropy",
            lr=1e-2,
            epochs=6,
            checkpoint_every=7,
            checkpoint_keep=1,
            checkpoint_best="val_loss",
        )
    )
    best = 10 * (1 + min(range(6), key=run.history["val_loss"].__getitem__))
    kept = sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").glob("step-*"))
    assert kept == sorted({best, 60})


# now


def test_a_checkpoint_may_be_asked_for_while_the_run_goes_on_is_paused_and_has_ended(pool, tmp_path):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000)
    wait_until(run, lambda run: run.step > 3, what="step 3")
    paths = [run.checkpoint()]
    run.pause()
    wait_until(run, lambda run: run.status == "paused", what="the run is paused")
    paths.append(run.checkpoint(tmp_path / "mine"))
    run.stop()
    paths.append(wait(run).checkpoint(tmp_path / "last"))
    steps = [json.loads((path / "checkpoint.json").read_text())["step"] for path in paths]
    assert paths[1:] == [tmp_path / "mine", tmp_path / "last"]
    assert 3 < steps[0] <= steps[1] == steps[2] == run.step
    assert [event.step for event in run.events if event.kind == "checkpoint"][:2] == steps[:2]


def test_a_checkpoint_asked_for_at_every_moment_holds_one_step_and_goes_on_from_it(pool):
    """Parameters, optimizer and history are of the same step: else the loss would differ."""
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=10_000)
    paths = {run.checkpoint() for _ in range(5)}
    run.stop()
    wait(run)
    for path in paths:
        step = int(path.name[5:])
        resumed = wait(dnb.resume(path, model=mlp(), steps=step + 5, pool=pool))
        losses = plain_run(mlp(), digits(), num_steps=min(step + 5, 300)).losses
        assert largest_gap(resumed.history["loss"][:300], losses) < 1e-10
        assert len(resumed.history["loss"]) == step + 5


def test_something_else_in_the_folder_is_refused_and_the_run_goes_on(pool, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000)
    with pytest.raises(ArgumentError, match="thesis exists and is not a checkpoint, so it is not overwritten"):
        run.checkpoint(tmp_path / "thesis")
    assert run.is_active


def test_a_run_that_the_hub_does_not_hold_has_no_checkpoint_now(pool):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=2))
    wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=2))
    with pytest.raises(HubError, match="does not hold a run 'sequential'"):
        run.checkpoint()
    with pytest.raises(HubError, match="its hub is gone"):
        Run.open(run.folder).checkpoint()


# history and events


def test_the_new_run_has_a_folder_of_its_own_with_the_whole_history(pool):
    run = wait(
        pool.fit(mlp(), digits(640), val=digits(64), loss="cross_entropy", epochs=3, checkpoint_every=15, name="first")
    )
    resumed = wait(dnb.resume(checkpoint_of(run, 15), pool=pool))
    read = Run.open(resumed.folder)
    assert (resumed.name, read.step, resumed.first_step) == ("first-2", 30, 15)
    assert read.history["loss"] == resumed.history["loss"]
    assert read.history.column("val_loss")[0].tolist() == [10, 20, 30]
    assert largest_gap(read.history["val_loss"], run.history["val_loss"]) < 1e-10
    assert next(event.text for event in resumed.events if event.kind == "checkpoint") == (
        f"goes on after step 15 of run 'first', from {checkpoint_of(run, 15)}"
    )


def test_a_run_may_be_named_instead_of_its_path_and_continued_again(pool):
    wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=10, checkpoint_every=5, name="named"))
    wait(dnb.resume("named", steps=20, pool=pool))
    third = wait(dnb.resume("named-2", steps=30, pool=pool))
    assert (third.name, third.step, len(third.history["loss"])) == ("named-3", 30, 30)
    assert largest_gap(third.history["loss"], plain_run(mlp(), digits(), num_steps=30).losses) < 1e-10


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_an_event(pool, caplog):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=30, checkpoint_every=10))
    path = checkpoint_of(run, 30) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        resumed = wait(dnb.resume(run.folder, steps=40, pool=pool))
    # Under load a checkpoint is left out while the one before is being written.
    before = max(int(folder.name[-6:]) for folder in path.parent.parent.glob("step-*") if folder != path.parent)
    told = f"{path} does not have the digest with which it was written: step {before} is used, not step 30"
    assert told in caplog.messages
    assert told in [event.text for event in resumed.events]
    assert resumed.first_step == before
    assert largest_gap(resumed.history["loss"], plain_run(mlp(), digits(), num_steps=40).losses) < 1e-10


# bad input


@pytest.fixture
def kept(pool):
    """The checkpoint of a short run."""
    return checkpoint_of(wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=4, checkpoint_every=2)), 2)


def test_resume_is_refused_while_a_run_is_active(pool, kept):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=10_000, name="busy")
    with pytest.raises(ArgumentError, match="run 'busy' is active: wait for it with %dtrain wait"):
        dnb.resume(kept, pool=pool)
    assert run.is_active


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": nn.Linear(64, 10)}, r"is of another model: parameter '0\.weight' of shape \(128, 64\) is in the ch"),
        ({"train": digits(100)}, "train has 100 samples and the run had 1797"),
        ({"optimizer": "sgd"}, "the checkpoint's optimizer is a AdamW, not a SGD"),
        ({"steps": 2}, "is of step 2 of 2, so that nothing is left to do"),
        ({"steps": -1}, "steps must be a positive integer, not -1"),
        ({"loss": "cross_entropi"}, "did you mean 'cross_entropy'"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_pool_trains_on(pool, kept, options, told):
    with pytest.raises(ArgumentError, match=told):
        dnb.resume(kept, pool=pool, **options)
    assert wait(dnb.resume(kept, pool=pool)).status == "finished"


def test_a_path_that_is_no_checkpoint_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dnb.api.resuming.start", None)
    with pytest.raises(ArgumentError, match=r"no checkpoint at .*nowhere: it does not exist"):
        dnb.resume(tmp_path / "nowhere")


def test_a_checkpoint_without_data_asks_for_it(pool, tmp_path):
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=4))
    path = run.checkpoint(tmp_path / "late")
    with pytest.raises(ArgumentError, match=r"holds no data, as it was taken when its run had ended: give train="):
        dnb.resume(path, steps=8, pool=pool)
    assert wait(dnb.resume(path, train=digits(), steps=8, pool=pool)).step == 8


def test_a_pickle_that_cannot_be_read_here_says_what_to_give(pool, kept):
    rewrite(kept, lambda _: None, {"job.pickle": b"\x80\x05cnowhere\nNothing\n."})
    with pytest.raises(ArgumentError, match=r"cannot be read here: ModuleNotFoundError: .*or give model="):
        dnb.resume(kept, pool=pool, trust=True)


def test_a_negative_checkpoint_every_is_refused(pool):
    with pytest.raises(ArgumentError, match="checkpoint_every must be a positive integer, not -5"):
        pool.fit(mlp(), digits(), loss="cross_entropy", checkpoint_every=-5)


# whose it is


class Bomb:
    """An object that leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def halved_loss(output, target):
    return nn.functional.cross_entropy(output, target) / 2


def paths_of(pool):
    """Where hub and engines import from, as far as engines tell."""
    return [path for paths in pool.client[:].apply_sync(ipyparallel.interactive(_own_path)) for path in paths]


def _own_path():
    import sys

    return sys.path


def test_a_stranger_s_checkpoint_goes_on_with_the_user_s_objects_and_none_of_its_own(pool, kept, tmp_path):
    theirs = shutil.copytree(kept, tmp_path / "theirs")
    bomb = pickle.dumps(Bomb(tmp_path / "fired"))
    rewrite(
        theirs,
        lambda manifest: manifest["spec"].update(sys_path=[str(tmp_path / "evil")]),
        {"job.pickle": bomb, "data.pickle": bomb},
    )
    run = wait(dnb.resume(theirs, model=mlp(), train=digits(), steps=8, pool=pool))
    assert (run.status, run.first_step, run.step) == ("finished", 2, 8)
    assert str(tmp_path / "evil") not in paths_of(pool)
    assert not (tmp_path / "fired").exists()


def test_a_stranger_s_pickles_are_refused_and_the_pool_trains_on(pool, kept, tmp_path):
    theirs = shutil.copytree(kept, tmp_path / "theirs")
    rewrite(theirs, lambda _: None, {"job.pickle": pickle.dumps(Bomb(tmp_path / "fired"))})
    with pytest.raises(
        ArgumentError, match=r"keeps model and train as pickles, which run code .*: give model=, train="
    ):
        dnb.resume(theirs, pool=pool)
    assert not (tmp_path / "fired").exists()
    assert wait(dnb.resume(kept, pool=pool)).status == "finished"


def test_one_s_own_functions_come_back_without_trust_and_others_with_it(pool, tmp_path):
    run = wait(pool.fit(mlp(), digits(), loss=halved_loss, lr=1e-3, steps=8, checkpoint_every=4))
    resumed = wait(dnb.resume(checkpoint_of(run, 4), pool=pool))
    assert resumed.history["loss"] == run.history["loss"]
    theirs = shutil.copytree(checkpoint_of(run, 4), tmp_path / "theirs")
    rewrite(theirs, lambda manifest: manifest["spec"].update(sys_path=[str(tmp_path / "modules")]))
    with pytest.raises(ArgumentError, match=r"keeps loss as pickles.*: give loss=, or trust=True"):
        dnb.resume(theirs, model=mlp(), train=digits(), pool=pool)
    assert str(tmp_path / "modules") not in paths_of(pool)
    trusted = wait(dnb.resume(theirs, model=mlp(), train=digits(), trust=True, pool=pool))
    assert trusted.history["loss"] == run.history["loss"]
    assert str(tmp_path / "modules") in paths_of(pool)


def test_an_odd_state_is_refused_by_the_hub_and_the_pool_trains_on(pool, kept, tmp_path):
    theirs = shutil.copytree(kept, tmp_path / "theirs")
    tensors = load_file(theirs / "optimizer.safetensors")
    name = next(name for name in tensors if name.endswith("exp_avg"))
    rewrite(theirs, lambda _: None, {"optimizer.safetensors": save(tensors | {name: torch.ones(1)})})
    with pytest.raises(
        ArgumentError, match="theirs is not as dnb writes checkpoints: ValueError: 'exp_avg of parameter 0' is"
    ):
        dnb.resume(theirs, model=mlp(), train=digits(), steps=8, pool=pool)
    assert wait(dnb.resume(kept, pool=pool)).status == "finished"


# the magic


@pytest.fixture
def shell(pool):
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "dnb")
    shell.user_ns.update({"model": mlp(), "train": digits()})
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def run_line(shell, line):
    result = shell.run_cell(line, store_history=False)
    result.raise_error()
    return result.result


def test_the_magic_writes_a_checkpoint_and_goes_on_from_its_path(shell, capsys, tmp_path):
    run_line(shell, "%dtrain fit model train --loss cross_entropy --lr 1e-3 --steps 10 --checkpoint-every 5")
    run_line(shell, "%dtrain wait")
    run_line(shell, f"%dtrain checkpoint {tmp_path}/mine")
    assert f"the checkpoint is in {tmp_path}/mine" in capsys.readouterr().out
    resumed = run_line(shell, f"%dtrain resume {tmp_path}/mine --model model --steps 20 --trust")
    run_line(shell, "%dtrain wait")
    assert (resumed.first_step, resumed.step) == (10, 20)
    shutil.rmtree(tmp_path / "mine")


def test_the_magic_without_a_path_resumes_the_paused_run(shell):
    run = run_line(shell, "%dtrain fit model train --loss cross_entropy --epochs 5000")
    wait_until(run, lambda run: run.step > 1, what="step 1")
    run_line(shell, "%dtrain pause")
    wait_until(run, lambda run: run.status == "paused", what="the run is paused")
    run_line(shell, "%dtrain checkpoint")
    run_line(shell, "%dtrain resume")
    step = run.step
    wait_until(run, lambda run: run.step > step, what="one more step")
    assert run.status == "running"


def test_data_given_anew_in_which_some_targets_do_not_count_train_as_in_one_process(pool):
    inputs, targets = digits()
    some = torch.where(torch.arange(len(targets)) % 7 < 3, -100, targets)
    model, plain = twice(mlp)
    run = pool.fit(
        model, (inputs, targets), loss="cross_entropy", lr=1e-3, steps=10, checkpoint_every=10, shuffle=False
    )
    resumed = wait(dnb.resume(wait(run).folder, model=model, train=(inputs, some), steps=20, pool=pool))
    optimizer = adamw(plain.parameters())
    losses = plain_run(plain, (inputs, targets), num_steps=10, shuffle=False, optimizer=optimizer).losses
    rest = inputs[10 * 64 :], some[10 * 64 :]
    losses += plain_run(plain, rest, num_steps=10, shuffle=False, optimizer=optimizer).losses
    assert largest_gap(resumed.history["loss"], losses) < 1e-10
