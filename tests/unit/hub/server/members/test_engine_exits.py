from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from dnb.hub.server.members.engine_exits import ExitReader, ExitWriter
from dnb.protocol.pool import Process
from dnb.transport.system.processes import exit_code_of, this_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how a process ended is in /proc")

WAIT = "import time; print('ready', flush=True); time.sleep(60)"
ENDS = {
    "import ctypes; ctypes.string_at(0)": -signal.SIGSEGV,
    "import os; os.abort()": -signal.SIGABRT,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "import os; os._exit(3)": 3,
    "pass": 0,
}


def started(code: str) -> tuple[subprocess.Popen[bytes], Process]:
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process = Process(host=socket.gethostname(), pid=child.pid, create_time=psutil.Process(child.pid).create_time())
    return child, process


def ended(code: str) -> tuple[subprocess.Popen[bytes], Process]:
    """A child that has ended, and that nobody has waited for."""
    child, process = started(code)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child, process


def buried(child: subprocess.Popen[bytes]) -> int:
    """How it ended, as the system says once."""
    _, status = os.waitpid(child.pid, 0)
    child.returncode = 0  # waited for here, not by this object
    child.stdout.close()
    return status


@pytest.fixture
def waiting() -> Iterator[tuple[subprocess.Popen[bytes], Process]]:
    child, process = started(WAIT)
    child.stdout.readline()
    yield child, process
    child.kill()
    child.wait()
    child.stdout.close()


@pytest.mark.parametrize(("code", "told"), ENDS.items())
def test_the_system_says_how_a_process_ended_until_somebody_has_waited_for_it(code: str, told: int):
    child, process = ended(code)
    assert exit_code_of(process) == told
    buried(child)
    assert exit_code_of(process) is None


def test_a_process_that_was_killed_is_known_to_end_at_once(waiting: tuple[subprocess.Popen[bytes], Process]):
    child, process = waiting
    child.kill()
    assert exit_code_of(process) == -signal.SIGKILL
    assert ExitReader(None).ending([(5, process), (6, this_process())]) == [5]


def test_a_process_that_goes_on_or_was_stopped_has_no_exit_code(waiting: tuple[subprocess.Popen[bytes], Process]):
    child, process = waiting
    assert exit_code_of(process) is None
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert exit_code_of(process) is None


def test_the_guardian_says_how_those_ended_that_it_has_waited_for():
    writer = ExitWriter()
    reader = ExitReader(writer.reader)
    children = [ended(code) for code in ENDS]
    for child, _ in children:
        writer.write(child.pid, buried(child))
    assert [reader.code_of(process) for _, process in children] == list(ENDS.values())
    os.close(writer.reader)


def test_of_processes_elsewhere_and_of_strangers_nothing_is_known():
    reader = ExitReader(None)
    assert reader.code_of(Process(host="somewhere-else", pid=1, create_time=0.0)) is None
    assert reader.code_of(this_process()) is None
    child, process = ended("pass")
    buried(child)
    assert reader.code_of(process) is None


def test_a_pipe_that_nobody_reads_holds_nobody_up():
    writer = ExitWriter()
    for pid in range(10_000):
        writer.write(pid, 0)
    os.close(writer.reader)
