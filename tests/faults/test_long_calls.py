"""User code that holds the interpreter's lock in one native call, so that its engine cannot beat; in real pools."""

import ctypes
import functools
import json
import os
import re
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.engines.pools import until, wait
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]

# More than twice what an engine may be silent.
CALL_SECONDS = 1.1
NUM_STEPS = 3


@functools.cache
def rate(call, size):
    """How large an argument the call takes per second."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        call(size)
        seconds.append(time.perf_counter() - begin)
    return size / min(seconds)


def add(size):
    sum(range(round(size)))


def read(size):
    json.loads("[" + "0," * round(size / 2) + "0]")


def match(size):
    re.search("(?:x|y)+z", "x" * round(size**0.5))  # every beginning is tried: the square of its length


def sleep(seconds):
    ctypes.PyDLL(None).usleep(round(seconds * 1e6))


SIZES = {add: 1_000_000, read: 200_000, match: 1_000_000}


class Holding:
    """Holds the lock for a while, but in the process that made it: the notebook's, where all is tried first."""

    def __init__(self, call=add, seconds=CALL_SECONDS):
        self.call = call
        self.seconds = seconds
        self.here = os.getpid()

    def __call__(self):
        if os.getpid() == self.here:
            return
        if self.call is sleep:
            sleep(self.seconds)
        else:
            self.call(self.seconds * rate(self.call, SIZES[self.call]))


class Loss(Holding):
    def __call__(self, output, target):
        if torch.is_grad_enabled():
            super().__call__()
        return functional.cross_entropy(output, target)


class Metric(Holding):
    def __call__(self, output, target):
        super().__call__()
        return (output.argmax(1) == target).float().mean()


class Stage(nn.Module):
    """Holds the lock in forward."""

    def __init__(self, seconds):
        super().__init__()
        self.hold = Holding(seconds=seconds)

    def forward(self, x):
        self.hold()
        return x


class Data(torch.utils.data.Dataset):
    """Takes one long call to be unpickled."""

    def __init__(self):
        self.tensors = digits()
        self.hold = Holding(seconds=3.0)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.hold()

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return self.tensors[0][index], self.tensors[1][index]


def kinds(run):
    return {event.kind for event in run.events}


def train(pool, **options):
    return pool.fit(mlp(), digits(), **{"lr": 1e-3, "steps": NUM_STEPS, **options})


def check_losses(run):
    assert (run.status, run.step) == ("finished", NUM_STEPS)
    plain = plain_losses(mlp(), digits(), num_steps=NUM_STEPS, batch_size=64)
    assert largest_gap(run.history["loss"], plain) <= 1e-10


@pytest.mark.parametrize("options", [{}, {"exact": True, "transport": "socket"}], ids=str)
def test_engines_that_compute_in_one_call_in_every_step_are_busy_and_not_hung(pool, options):
    run = train(pool, loss=Loss(), shards=2, **options)
    until(lambda: "busy" in kinds(run) or not run.is_active, what="an engine cannot beat")
    assert "hung" not in [engine.state for engine in pool.engines]
    check_losses(wait(run))
    assert kinds(run) & {"hung", "recovered", "died"} == set()


@pytest.mark.parametrize("call", [read, match])
def test_it_does_not_matter_which_call_holds_the_lock(pool, call):
    run = train(pool, loss=Loss(call))
    check_losses(wait(run))
    assert kinds(run) & {"hung", "recovered", "died"} == set()


@pytest.mark.parametrize("options", [{"exact": True}, {"transport": "socket"}], ids=str)
def test_a_run_whose_engines_are_silent_in_every_step_comes_to_its_end(pool, options):
    """The call sleeps: nothing tells it from one that hangs."""
    run = train(pool, loss=Loss(sleep), shards=2, **options)
    check_losses(wait(run))
    assert "hung" in kinds(run)


def test_an_evaluation_whose_metric_holds_the_lock_comes_to_its_end(pool):
    run = train(pool, loss="cross_entropy", metrics={"right": Metric(sleep)}, val=digits(200), shards=2)
    check_losses(wait(run))
    assert len(run.history["val_right"]) == 1


def test_data_that_take_one_long_call_to_be_unpickled_are_waited_for(pool):
    run = pool.fit(mlp(), Data(), loss="cross_entropy", lr=1e-3, steps=NUM_STEPS)
    check_losses(wait(run))
    (began,) = [event.text for event in run.events if event.kind == "running"]
    assert began.startswith("2 engines, ")


def test_a_stage_that_holds_the_lock_is_not_killed(pool):
    model = nn.Sequential(nn.Linear(64, 32), Stage(2.5), nn.Tanh(), nn.Linear(32, 10))
    run = wait(pool.fit(model, digits(), loss="cross_entropy", steps=1, micro_batch=64, strategy="pipeline"))
    assert run.status == "finished"
    assert kinds(run) & {"hung", "died"} == set()
