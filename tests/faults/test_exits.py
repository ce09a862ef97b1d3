"""User code that ends an engine, or the line to the hub, in the middle of a step."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.engines.pools import wait, wait_until
from tests.models import digits, largest_gap, mlp, plain_losses

pytestmark = [pytest.mark.engines, pytest.mark.faults]

AT = 10


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """Three engines."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(3)
    shared.calm()


def exit_at_once():
    os._exit(3)


def kill_oneself():
    os.kill(os.getpid(), signal.SIGKILL)


def close_every_line():
    """As a cut cable would: every stream of this process is shut."""
    for name in os.listdir("/proc/self/fd"):
        try:
            line = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket
            continue
        with line:
            try:
                if line.type == socket.SOCK_STREAM and not line.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    line.shutdown(socket.SHUT_RDWR)
            except OSError:  # not connected
                continue


class Ending:
    """A loss that does something fatal in one process, in forward or backward of its tenth step."""

    def __init__(self, pid, act, where):
        self.pid = pid
        self.act = act
        self.where = where
        self.count = 0

    def __call__(self, output, target):
        self.count += torch.is_grad_enabled()
        is_due = os.getpid() == self.pid and self.count == AT and torch.is_grad_enabled()
        if is_due and self.where == "forward":
            self.act()
        if is_due and self.where == "backward":
            output.register_hook(lambda _: self.act())
        return functional.cross_entropy(output, target)


@pytest.mark.parametrize("transport", ["memory", "socket"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("act", [exit_at_once, kill_oneself], ids=lambda act: act.__name__)
def test_what_an_engine_held_when_it_ended_is_done_by_the_others_and_counts_once(pool, act, where, transport):
    victim = pool.engines[1]
    run = wait(
        pool.fit(mlp(), digits(), loss=Ending(victim.pid, act, where), lr=1e-3, steps=50, transport=transport, shards=6)
    )
    assert [(event.kind, event.engine) for event in run.events if event.kind == "died"] == [("died", victim.id)]
    assert largest_gap(run.history["loss"], plain_losses(mlp(), digits(), num_steps=50, batch_size=64)) <= 1e-10
    assert sum(worker.samples for worker in run.workers) == 1797 + 21 * 64


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed by /proc")
@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_an_engine_whose_lines_are_closed_costs_no_step(pool, transport):
    victim = pool.engines[1]
    loss = Ending(victim.pid, close_every_line, "forward")
    run = wait(pool.fit(mlp(), digits(), loss=loss, lr=1e-3, steps=50, transport=transport))
    assert [event.engine for event in run.events if event.kind == "died"][:1] == [victim.id]
    assert largest_gap(run.history["loss"], plain_losses(mlp(), digits(), num_steps=50, batch_size=64)) <= 1e-10
    assert sum(worker.samples for worker in run.workers) == 1797 + 21 * 64


class Leaving(nn.Module):
    """A loss that calls `sys.exit`, as a script would, until there is a file."""

    def __init__(self, mended: Path) -> None:
        super().__init__()
        self.mended = mended
        self.count = 0

    def forward(self, output, target):
        self.count += torch.is_grad_enabled()
        if self.count >= AT and not self.mended.exists():
            sys.exit("this is not a script")
        return functional.cross_entropy(output, target)


def test_a_function_that_calls_sys_exit_pauses_the_run_and_ends_no_engine(pool, tmp_path):
    engines = [engine.pid for engine in pool.engines]
    mended = tmp_path / "mended"
    run = pool.fit(mlp(), digits(), loss=Leaving(mended), lr=1e-3, steps=50)
    wait_until(run, lambda run: run.status == "paused", what="it has paused")
    assert [engine.pid for engine in pool.engines] == engines
    assert "SystemExit: this is not a script" in run.error
    mended.touch()
    run.resume()
    wait(run)
    assert largest_gap(run.history["loss"], plain_losses(mlp(), digits(), num_steps=50, batch_size=64)) <= 1e-10
