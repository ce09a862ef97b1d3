"""A run's folder and a checkpoint that dnb 0.1.0 wrote before its files were moved are read as they were then.

A model of two linear layers, BatchNorm, AdamW and StepLR, exact, on two engines: nine steps, a checkpoint after six.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dnb.api.runs.run import Run
from dnb.hub.checkpoints.format import HISTORY_FILE, MODEL_FILE, OPTIMIZER_FILE
from dnb.hub.checkpoints.reader import find_checkpoint
from dnb.notebook.commands.magics import DtrainMagics
from dnb.notebook.live.compare import find_run, table_text
from dnb.transport.pickling.payloads import unpack
from dnb.transport.state_trees import put_together
from dnb.user_code.accuracy import accuracy

DATA = Path(__file__).parents[1] / "data"
RUN = DATA / "run_of_before"
CHECKPOINT = DATA / "checkpoint_of_before"
LOSSES = [
    1.2183987763100896, 1.0921111781892496, 1.2175359507565076, 1.1062493284569763, 1.122003902085815,
    1.1447541692790384, 1.1447660352514286, 1.0403959403878977, 1.0697229326034337,
]  # fmt: skip


def test_the_folder_of_a_run_is_read_whole():
    run = Run.open(RUN)
    assert (run.name, run.status, run.step, run.num_steps) == ("before", "finished", 9, 9)
    assert list(run.history["loss"]) == LOSSES
    assert list(run.history["lr"]) == [0.01] * 4 + [0.005] * 4 + [0.0025]
    assert {"accuracy", "grad_norm", "samples_per_second", "val_accuracy", "val_loss"} <= set(run.history.keys())


def test_its_events_and_the_use_of_its_engines_are_read():
    run = Run.open(RUN)
    assert [event.kind for event in run.events] == [
        "joined", "joined", "running", "checkpoint", "checkpoint", "finished",
    ]  # fmt: skip
    assert run.events[0].text == "engine 1 has model and data"
    assert run.events[0].engine == 1
    assert run.utilisation.engines == (0, 1)


def test_a_folder_of_before_there_was_a_log_of_output_has_none():
    run = Run.open(RUN)
    assert not (RUN / "output.log").exists()
    assert run.output == []


def test_it_is_found_by_its_name_compared_and_shown(tmp_path, monkeypatch, capsys):
    shutil.copytree(RUN, tmp_path / ".dnb" / "runs" / "before")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dnb.api.pools._pool", None)
    found = find_run("before", names={})
    assert table_text({"before": found}).splitlines()[1].split()[:4] == ["before", "finished", "9", "1.0697"]
    DtrainMagics(SimpleNamespace(user_ns={})).dtrain("dashboard before")
    assert capsys.readouterr().out.startswith("before: finished after 9 steps")


@pytest.fixture
def checkpoint():
    found, damages = find_checkpoint(CHECKPOINT, wants=lambda manifest: manifest.files)
    assert damages == []
    return found


def test_a_checkpoint_is_whole_by_its_digests(checkpoint):
    assert checkpoint.manifest.step == 6
    assert checkpoint.manifest.spec.name == "before"
    assert checkpoint.manifest.versions["dnb"] == "0.1.0"


def test_tensors_of_a_checkpoint_are_read_by_their_names(checkpoint):
    tensors = checkpoint.read(MODEL_FILE)
    assert sorted(tensors) == [
        "0.bias", "0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight",
        "3.bias", "3.weight",
    ]  # fmt: skip
    assert tensors["0.weight"].shape == (8, 4)
    assert checkpoint.read(HISTORY_FILE)["step/loss"].tolist() == LOSSES[:6]


def test_states_of_optimizer_and_scheduler_are_put_together(checkpoint):
    tensors = checkpoint.read(OPTIMIZER_FILE)
    state = put_together(checkpoint.manifest.optimizer.tree, tensors)
    assert sorted(state["state"]) == [0, 1, 2, 3, 4, 5]
    assert state["state"][0]["exp_avg"].shape == (8, 4)
    assert state["param_groups"][0]["betas"] == (0.9, 0.999)
    scheduler = put_together(checkpoint.manifest.scheduler.tree, tensors)
    assert (scheduler["step_size"], scheduler["last_epoch"], scheduler["_last_lr"]) == (4, 6, [0.005])


def test_the_objects_of_a_checkpoint_are_unpickled(checkpoint):
    job = unpack(
        bytes(checkpoint.load("job.pickle")),
        checkpoint.manifest.spec.job,
        memory=memoryview(checkpoint.load("job.buffers")),
    )
    assert [type(layer).__name__ for layer in job.model] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert job.metrics == {"accuracy": accuracy}
    assert (job.order.num_samples, job.order.batch_size) == (48, 16)
