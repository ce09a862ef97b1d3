from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from dnb.protocol.pool import Process
from dnb.transport.system.processes import (
    activity_of,
    boot_id,
    children_of,
    end_processes,
    has_worked,
    is_alive,
    is_here,
    is_same,
    liveness,
    this_process,
)

# Each child says that it is ready, so that no test has to guess when.
SLEEPER = "import sys, time; print('ready', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)
# Holds the interpreter's lock in one call, in a thread that is not the main one.
HOLDER = """
import sys, threading, time
def hold():
    print('ready', flush=True)
    sum(range(10**12))
threading.Thread(target=hold, daemon=True).start()
time.sleep(60)
"""
# Has a child that has ended, and does not look at it.
NEGLIGENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', '']); "
    "import os; os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT); print(child.pid, flush=True); time.sleep(60)"
)
BRIEF = "import time; print('ready', flush=True); time.sleep(0.2)"

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a child that has said its first line; the line is `child.first_line`."""
    children: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        children.append(child)
        child.first_line = child.stdout.readline().strip()
        return child

    yield run
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def describe(pid: int) -> Process:
    return Process(host=socket.gethostname(), pid=pid, create_time=psutil.Process(pid).create_time())


def later_life(process: Process) -> Process:
    """A record of another process that once had the same pid."""
    return msgspec.structs.replace(process, create_time=process.create_time - 100.0)


# who is alive ------------------------------------------------------------------------------------------------


def test_this_process_is_alive():
    assert is_alive(this_process())


def test_this_process_is_described_by_its_pid():
    assert this_process().pid == os.getpid()


def test_a_running_child_is_alive(start: Start):
    assert is_alive(describe(start(SLEEPER).pid))


def test_the_right_pid_with_another_start_time_is_not_alive():
    assert not is_alive(later_life(this_process()))


def test_a_process_that_was_reaped_is_not_alive(start: Start):
    child = start(SLEEPER)
    process = describe(child.pid)
    child.kill()
    child.wait()
    assert not is_alive(process)


def test_a_zombie_is_not_alive(start: Start):
    child = start(SLEEPER)
    process = describe(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert not is_alive(process)


def test_a_stopped_process_is_alive(start: Start):
    child = start(SLEEPER)
    child.send_signal(signal.SIGSTOP)
    assert is_alive(describe(child.pid))


def test_a_process_is_told_from_one_that_stands_still_and_one_that_is_gone(start: Start):
    child = start(SLEEPER)
    process = describe(child.pid)
    seen = [liveness(process)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        child.send_signal(number)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WCONTINUED | os.WNOWAIT)
        seen.append(liveness(process))
    child.kill()
    child.wait()
    assert [*seen, liveness(process)] == ["alive", "stopped", "alive", "gone"]


def test_a_process_of_another_host_is_taken_as_alive():
    elsewhere = Process(host="somewhere-else", pid=1, create_time=0.0)
    assert is_alive(elsewhere)
    assert liveness(elsewhere) == "alive"


def test_a_process_whose_thread_computes_in_one_call_is_seen_to_work(start: Start):
    process = describe(start(HOLDER).pid)
    before, begin = activity_of(process), time.monotonic()
    assert before is not None
    while (seen := activity_of(process)) is not None and seen.cpu_seconds < before.cpu_seconds + 0.2:
        assert time.monotonic() < begin + 30
    assert seen is not None
    assert has_worked(before, seen, seconds=time.monotonic() - begin)


def test_a_process_that_sleeps_is_not_seen_to_work(start: Start):
    process = describe(start(SLEEPER).pid)
    before = activity_of(process)
    time.sleep(0.5)  # not a wait for anything: so long it does nothing
    seen = activity_of(process)
    assert before is not None
    assert seen is not None
    assert not has_worked(before, seen, seconds=0.5)


def test_nothing_is_seen_of_a_process_that_is_gone_or_elsewhere():
    assert activity_of(later_life(this_process())) is None
    assert activity_of(Process(host="somewhere-else", pid=os.getpid(), create_time=0.0)) is None


def test_a_process_of_another_container_with_this_hosts_name_is_taken_as_alive_and_not_touched(start: Start):
    child = start(SLEEPER)
    process = msgspec.structs.replace(describe(child.pid), boot_id=boot_id(), pid_namespace="1")
    assert end_processes([process], patience_seconds=0.1, first_signal=signal.SIGTERM) == []
    assert (is_here(process), is_alive(process), liveness(process), child.poll()) == (False, True, "alive", None)


def test_a_process_of_an_earlier_boot_is_gone_although_its_pid_and_start_time_fit(start: Start, monkeypatch):
    process = msgspec.structs.replace(describe(start(SLEEPER).pid), boot_id="of-an-earlier-boot")
    monkeypatch.setattr(psutil, "boot_time", lambda: process.create_time + 60)
    assert (is_here(process), is_alive(process), liveness(process)) == (False, False, "gone")


def test_another_host_that_has_this_ones_name_and_started_later_is_not_taken_for_an_earlier_boot():
    process = msgspec.structs.replace(this_process(), boot_id="of-another-host", create_time=time.time())
    assert (is_here(process), is_alive(process)) == (False, True)


def test_a_record_that_says_neither_boot_nor_container_is_told_by_its_hosts_name():
    old = msgspec.structs.replace(this_process(), boot_id="", pid_namespace="")
    assert (is_here(old), is_alive(old), is_same(old, this_process())) == (True, True, True)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has names for both")
def test_a_process_says_in_which_boot_and_container_its_pid_counts():
    me = this_process()
    assert me.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert os.readlink("/proc/self/ns/pid") == f"pid:[{me.pid_namespace}]"


def test_the_children_of_a_process_are_found(start: Start):
    assert start(SLEEPER).pid in [child.pid for child in children_of([this_process()])]


def test_a_process_that_is_gone_has_no_children(start: Start):
    start(SLEEPER)
    assert children_of([later_life(this_process())]) == ()


# how they end --------------------------------------------------------------------------------------------------


def test_a_process_that_ignores_sigterm_is_killed(start: Start):
    child = start(STUBBORN)
    process = describe(child.pid)
    assert end_processes([process], patience_seconds=0.3, first_signal=signal.SIGTERM) == [process]
    assert not is_alive(process)


def test_a_process_that_obeys_sigterm_is_not_killed(start: Start):
    process = describe(start(SLEEPER).pid)
    assert end_processes([process], patience_seconds=10, first_signal=signal.SIGTERM) == []
    assert not is_alive(process)


def test_a_process_that_ends_by_itself_in_time_is_not_killed(start: Start):
    process = describe(start(BRIEF).pid)
    assert end_processes([process], patience_seconds=20) == []


def test_a_process_that_only_has_the_pid_is_not_killed(start: Start):
    child = start(SLEEPER)
    end_processes([later_life(describe(child.pid))], patience_seconds=0.1, first_signal=signal.SIGTERM)
    assert child.poll() is None


def test_a_process_of_another_host_is_not_touched(start: Start):
    child = start(SLEEPER)
    process = msgspec.structs.replace(describe(child.pid), host="somewhere-else")
    end_processes([process], patience_seconds=0.1, first_signal=signal.SIGTERM)
    assert child.poll() is None


def test_several_processes_are_waited_for_together(start: Start):
    processes = [describe(start(STUBBORN).pid) for _ in range(3)]
    begin = time.monotonic()
    end_processes(processes, patience_seconds=0.5, first_signal=signal.SIGTERM)
    assert time.monotonic() - begin < 1.4  # not three times 0.5


def test_a_zombie_of_a_negligent_parent_is_not_waited_for(start: Start):
    parent = start(NEGLIGENT)
    zombie = describe(int(parent.first_line))
    begin = time.monotonic()
    assert end_processes([zombie], patience_seconds=2.0) == []
    assert time.monotonic() - begin < 1.0


def test_a_process_that_becomes_a_zombie_of_a_negligent_parent_counts_as_ended(start: Start):
    parent = start(
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    process = describe(int(parent.first_line))
    begin = time.monotonic()
    assert end_processes([process], patience_seconds=2.0, first_signal=signal.SIGTERM) == []
    assert time.monotonic() - begin < 1.0


def test_a_process_whose_start_was_looked_up_twice_is_the_same():
    me = this_process()
    assert is_same(me, msgspec.structs.replace(me, create_time=me.create_time + 1.0))


@pytest.mark.parametrize(
    "change",
    [{"pid": 1}, {"host": "elsewhere"}, {"create_time": 5.0}, {"boot_id": "earlier"}, {"pid_namespace": "1"}],
    ids=str,
)
def test_other_processes_are_not_the_same(change):
    me = this_process()
    assert not is_same(me, msgspec.structs.replace(me, **change))
    assert not is_same(me, None)
