"""Runs that were rehearsed: refused before they start, told what they change, held against the notebook."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from dnb.errors import ArgumentError, RunError
from tests.engines.pools import wait_until
from tests.models import cross_entropy_step, digits, largest_gap, mlp, plain_run

pytestmark = pytest.mark.engines


def own_loop(model, batch):
    loss = cross_entropy_step(model, batch)
    loss.backward(retain_graph=True)
    return loss


def test_a_step_function_with_a_loop_of_its_own_starts_nothing_and_moves_no_weight(pool):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def step(model, batch):
        loss = cross_entropy_step(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    with pytest.raises(ArgumentError, match=r"step calls backward\(\) itself.*leave out .*optimizer\.step\(\)"):
        pool.fit(model, digits(), step=step)
    assert all(parameter.equal(kept) for parameter, kept in zip(model.parameters(), before, strict=True))


def test_a_loop_of_its_own_that_comes_in_mid_run_is_refused_where_it_is_called(pool):
    run = pool.fit(mlp(), digits(), step=cross_entropy_step, steps=1_000_000)
    wait_until(run, lambda run: run.step > 0, what="a step")
    run.pause()
    run.resume(step=own_loop)
    with pytest.raises(RunError, match=r"step calls backward\(\) itself: it returns the loss"):
        run.wait(60)
    run.stop()


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_a_forward_that_clips_its_weights_is_refused_on_both_transports(pool, transport):
    class Clips(nn.Linear):
        def forward(self, inputs):
            with torch.no_grad():
                self.weight.clamp_(-0.05, 0.05)
            return super().forward(inputs)

    with pytest.raises(ArgumentError, match=r"forward writes parameter 'weight' in place .*after_step"):
        pool.fit(Clips(64, 10), digits(), loss="cross_entropy", transport=transport)


class Opens(Dataset):
    """Opens its file at the first sample."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __len__(self):
        return 128

    def __getitem__(self, index):
        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115
        self.file.seek(index * 6)
        return torch.tensor(list(self.file.read(6))) / 255, index % 3


def test_a_data_set_that_opens_its_file_at_the_first_sample_trains(pool):
    Path("blob").write_bytes(bytes(number % 251 for number in range(768)))
    samples = Opens(os.path.abspath("blob"))
    run = pool.fit(nn.Linear(6, 3).float(), samples, loss="cross_entropy", batch_size=32).wait()
    assert run.status == "finished"
    assert samples.file is None


def test_numpy_s_float64_trains_a_float32_model_as_float32_does(pool, float32):
    inputs, targets = digits()
    model, plain = mlp(), mlp()
    run = pool.fit(model, (inputs.double().numpy(), targets.numpy()), loss="cross_entropy", lr=1e-3, steps=20).wait()
    seen = plain_run(plain, (inputs.float(), targets), num_steps=20)
    assert largest_gap(run.history["loss"], seen.losses) < 1e-5
    assert "train's X is float64 and the model's parameters float32: taken as float32" in [e.text for e in run.events]


class KeepsMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(64)

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0).detach()
        return inputs - self.mean


def test_an_attribute_that_forward_changes_is_an_event(pool):
    run = pool.fit(nn.Sequential(KeepsMean(), nn.Linear(64, 10)), digits(), loss="cross_entropy", steps=2).wait()
    assert any("'0.mean', not a buffer: it does not come home" in event.text for event in run.events)


def test_one_engine_that_computes_something_else_than_the_notebook_is_refused(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool, notebook = shared.of(1), os.getpid()

    def step(model, batch):
        return cross_entropy_step(model, batch) * (1.0 if os.getpid() == notebook else 2.0)

    run = pool.fit(mlp(), digits(), step=step, steps=5)
    with pytest.raises(RunError, match=r"engines disagree: .* on engine \d+ and .* in the notebook"):
        run.wait()
    shared.calm()
