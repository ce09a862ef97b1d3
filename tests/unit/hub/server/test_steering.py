"""One kernel steers a pool, any number look on, and the pool ends with the one that steers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from dnb.errors import ArgumentError, PoolError
from dnb.hub.server.no_run import NoRun
from dnb.hub.server.steering import Steering
from dnb.protocol.client_messages import Control, GetMembers, Hello
from dnb.protocol.pool import Process
from dnb.protocol.versions import POOL_FORMAT
from dnb.transport.system.processes import this_process

ALIVE = this_process()
DEAD = msgspec.structs.replace(ALIVE, create_time=1.0)  # another process has its pid by now
STOP = Control(run="digits", verb="stop")


@dataclass
class Spec:
    linger_seconds: float = 10.0


@dataclass
class Run:
    status: str = "running"
    is_over: bool = False
    spec: Spec = field(default_factory=Spec)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def greet(steering: Steering, owner: Process, *, mode: Any, identity: bytes = b"a") -> bool:
    return steering.greet(identity, Hello(owner=owner, mode=mode, format=POOL_FORMAT, version="1"))


def test_a_kernel_that_looks_on_may_not_steer_while_the_one_that_steers_lives():
    steering = Steering(ALIVE)
    greet(steering, DEAD, mode="watch")
    with pytest.raises(ArgumentError, match="steers this pool, this one only watches"):
        steering.check(b"a", STOP)


def test_a_kernel_that_looks_on_may_ask_for_whatever_changes_nothing():
    steering = Steering(ALIVE)
    greet(steering, DEAD, mode="watch")
    steering.check(b"a", GetMembers())
    assert steering.owner == ALIVE


def test_a_kernel_that_looks_on_takes_over_from_a_dead_one_by_what_it_asks():
    steering = Steering(DEAD)
    greet(steering, ALIVE, mode="watch")
    steering.changed = False
    steering.check(b"a", STOP)
    assert (steering.owner, steering.changed) == (ALIVE, True)


def test_a_kernel_that_wants_to_steer_is_refused_while_another_does():
    with pytest.raises(ArgumentError, match=rf"the kernel with pid {ALIVE.pid} .* steers this pool"):
        greet(Steering(ALIVE), DEAD, mode="steer")


def test_a_kernel_that_is_refused_looks_on():
    steering = Steering(ALIVE)
    with pytest.raises(ArgumentError):
        greet(steering, DEAD, mode="steer")
    assert steering.kernels == {b"a": DEAD}


def test_a_kernel_of_another_format_is_not_let_in():
    steering = Steering(None)
    with pytest.raises(PoolError, match=r"attach with the hub's version of dnb, or end the pool"):
        steering.greet(b"a", Hello(owner=ALIVE, mode="steer", format=POOL_FORMAT + 1, version="99"))
    assert (steering.owner, steering.kernels) == (None, {})


def test_a_pool_without_a_run_ends_with_its_kernel():
    assert Steering(DEAD).find_end(NoRun()) == "its kernel is gone"


def test_a_pool_does_not_end_while_its_kernel_lives():
    assert Steering(ALIVE).find_end(NoRun()) == ""


def test_a_pool_that_never_had_a_kernel_does_not_end_with_one():
    assert Steering(None).find_end(NoRun()) == ""


def test_a_pool_does_not_end_while_its_run_advances():
    clock = Clock()
    steering = Steering(DEAD, clock=clock)
    run: Any = Run()
    assert steering.find_end(run) == ""
    clock.now += 1000.0
    assert steering.find_end(run) == ""


def test_a_pool_whose_run_has_ended_without_its_kernel_lingers_for_another_one():
    clock = Clock()
    steering = Steering(DEAD, clock=clock)
    run: Any = Run()
    steering.find_end(run)
    run.status, run.is_over = "done", True
    clock.now += 10.0
    assert steering.find_end(run) == ""
    clock.now += 0.5
    assert steering.find_end(run) == "its kernel is gone, and nobody attached"


def test_a_pool_whose_run_was_over_before_its_kernel_died_ends_at_once():
    run: Any = Run(status="done", is_over=True)
    assert Steering(DEAD).find_end(run) == "its kernel is gone"


def test_a_pool_whose_run_ends_under_a_kernel_that_has_attached_ends_with_that_one():
    clock = Clock()
    steering = Steering(DEAD, clock=clock)
    run: Any = Run()
    steering.find_end(run)
    greet(steering, DEAD, mode="steer")
    run.status, run.is_over = "done", True
    assert steering.find_end(run) == "its kernel is gone"
