"""Harm done on purpose, to real processes."""

import subprocess
import sys

import psutil
import pytest

from dnb.errors import ArgumentError
from dnb.hub.server.members.fault_injection import FaultInjector
from dnb.protocol.client_messages import InjectFault
from dnb.protocol.engine_messages import Slow
from dnb.protocol.pool import EngineFacts, Process
from dnb.transport.system.processes import find_process, signal_process
from tests.fake_runs import wait_until


@pytest.fixture
def victim():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def facts(process: Process) -> EngineFacts:
    return EngineFacts(engine=1, process=process, cores=1, memory_bytes=1, device="cpu", torch_version="2")


def state_of(child) -> str:
    return psutil.Process(child.pid).status()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_killed_engine_is_gone_and_counted(victim):
    fault_injector = FaultInjector(lambda *_: None)
    assert fault_injector.act(InjectFault(verb="kill", engine=1), facts(find_process(victim.pid))) == (
        "engine 1 is killed on purpose"
    )
    assert (victim.wait(10), fault_injector.num_killed) == (-9, 1)


def test_a_stopped_engine_goes_on_when_its_time_is_over_and_not_before(victim):
    clock = Clock()
    fault_injector = FaultInjector(lambda *_: None, clock=clock)
    fault_injector.act(InjectFault(verb="stop", engine=1, amount=5.0), facts(find_process(victim.pid)))
    clock.now = 4.9
    fault_injector.poll()
    wait_until(lambda: state_of(victim) == psutil.STATUS_STOPPED)
    clock.now = 5.0
    fault_injector.poll()
    wait_until(lambda: state_of(victim) != psutil.STATUS_STOPPED)


def test_all_that_are_stopped_go_on_when_the_hub_ends(victim):
    fault_injector = FaultInjector(lambda *_: None)
    fault_injector.act(InjectFault(verb="stop", engine=1, amount=1e6), facts(find_process(victim.pid)))
    wait_until(lambda: state_of(victim) == psutil.STATUS_STOPPED)
    fault_injector.close()
    wait_until(lambda: state_of(victim) != psutil.STATUS_STOPPED)


def test_an_engine_is_told_how_slow_to_be():
    sent = []
    fault_injector = FaultInjector(lambda engine, record: sent.append((engine, record)))
    fault_injector.act(
        InjectFault(verb="slow", engine=1, amount=4.0), facts(Process(host="far", pid=1, create_time=0.0))
    )
    assert sent == [(1, Slow(factor=4.0))]


@pytest.mark.parametrize("verb", ["kill", "stop"])
def test_an_engine_of_another_host_is_not_signalled(verb):
    with pytest.raises(ArgumentError, match=rf"engine 1 is on far, where the hub on .* cannot {verb} it.*slow 1 4x"):
        FaultInjector(lambda *_: None).act(
            InjectFault(verb=verb, engine=1, amount=1.0), facts(Process(host="far", pid=1, create_time=0.0))
        )


def test_a_later_process_with_the_pid_of_an_engine_is_left_alone(victim):
    now = find_process(victim.pid)
    earlier = Process(host=now.host, pid=now.pid, create_time=now.create_time - 1000)
    assert not signal_process(earlier, 9)
    with pytest.raises(ArgumentError, match="engine 1 has just ended"):
        FaultInjector(lambda *_: None).act(InjectFault(verb="kill", engine=1), facts(earlier))
