"""Processes by pid and start time: whether they live, and the ways to end them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from dnb.protocol.pool import Process

# How long a killed process may take to go, and how often it is looked for.
KILL_SECONDS = 5.0
LOOK_SECONDS = 0.02
# Start times are counted from a boot time in whole seconds, which differs by one from look to look, and moves when
# the clock is set. A pid does not come back so soon.
CLOCK_SECONDS = 5.0
# Of a core. Threads that only wait for the interpreter's lock use a hundredth, but wake up all the time: that one of
# them would run tells nothing. A thread that computes gets as much even where 40 others want the same 2 cores.
WORKING_SHARE = 0.05
# Of <linux/prctl.h>: the kernel sends a signal when the parent ends.
PR_SET_PDEATHSIG = 1
# Of <linux/sched.h>: the process is on its way out.
PF_EXITING = 0x4


def this_process() -> Process:
    """Identify the calling process."""
    return _describe(psutil.Process())


def name_process(name: str) -> None:
    """Let `ps -e`, `top` and the like show a name of at most 15 letters for the calling process, on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def end_with_parent(number: signal.Signals) -> None:
    """Let the kernel signal the calling process when the parent ends, on Linux; one that has ended does not count."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@cache
def boot_id() -> str:
    """Return the identifier of this boot of the host, on Linux; else ""."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@cache
def pid_namespace() -> str:
    """Return a name of the table in which this process's pid counts, on Linux; else ""."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def find_process(pid: int) -> Process | None:
    """Find the process of this host that has the pid now; None if there is none."""
    try:
        return _describe(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return None


def is_this_process(process: Process) -> bool:
    """Return whether the process is the caller's own."""
    return process.pid == os.getpid() and _find(process) is not None


def is_here(process: Process) -> bool:
    """Return whether a process's pid can be looked up: it is of this host, this boot of it, and this container."""
    return process.host == socket.gethostname() and all(
        theirs == ours
        for theirs, ours in ((process.boot_id, boot_id()), (process.pid_namespace, pid_namespace()))
        if theirs and ours
    )


def is_of_earlier_boot(process: Process) -> bool:
    """Return whether this host was rebooted since, so that the process is gone; not if another host has its name."""
    has_restarted = bool(process.boot_id and boot_id()) and process.boot_id != boot_id()
    is_older = process.create_time + CLOCK_SECONDS < psutil.boot_time()
    return has_restarted and is_older and process.host == socket.gethostname()


def is_same(one: Process | None, other: Process | None) -> bool:
    """Return whether both are one process, although their start times were looked up apart."""
    if one is None or other is None:
        return one is other
    is_close = abs(one.create_time - other.create_time) < CLOCK_SECONDS
    places = ((one.boot_id, other.boot_id), (one.pid_namespace, other.pid_namespace))
    is_one_place = all(here == there for here, there in places if here and there)
    return (one.host, one.pid) == (other.host, other.pid) and is_close and is_one_place


def is_alive(process: Process) -> bool:
    """Return whether this very process, not a later one with its pid, still runs; True elsewhere, see `is_here`."""
    if is_here(process):
        return _find(process) is not None
    return not is_of_earlier_boot(process)  # only its connection can tell more


def liveness(process: Process) -> Literal["alive", "stopped", "gone"]:
    """Return whether this very process runs, or was stopped by a signal; "alive" elsewhere, see `is_here`."""
    if not is_here(process):
        return "alive" if is_alive(process) else "gone"
    own = _find(process)
    try:
        return "gone" if own is None else "stopped" if own.status() == psutil.STATUS_STOPPED else "alive"
    except psutil.NoSuchProcess:
        return "gone"


def exit_code_of(process: Process) -> int | None:
    """Return the exit code with which this very process of this host ends, as `subprocess` counts; None if unknown.

    It is known from the moment of a signal or exit until the parent has waited for it, on Linux.
    """
    if sys.platform != "linux" or not is_here(process):
        return None
    try:
        if abs(psutil.Process(process.pid).create_time() - process.create_time) >= CLOCK_SECONDS:
            return None
        facts = Path(f"/proc/{process.pid}/stat").read_bytes()
    except (psutil.Error, OSError):
        return None
    fields = facts[facts.rindex(b")") + 2 :].split()  # of proc_pid_stat(5), from the third on
    state, flags, status = fields[0], int(fields[6]), int(fields[49])
    if state in b"Tt" or not (status or state == b"Z" or flags & PF_EXITING):
        return None
    return os.waitstatus_to_exitcode(status)


@dataclass(frozen=True, slots=True)
class Activity:
    """The system's account of a process that says nothing itself."""

    cpu_seconds: float  # of all its threads so far
    waits_for_disk: bool = False  # one of its threads is in a sleep that nothing can interrupt


def has_worked(before: Activity, after: Activity, *, seconds: float) -> bool:
    """Return whether a process has worked between two samples, so many seconds apart."""
    return after.waits_for_disk or after.cpu_seconds - before.cpu_seconds >= WORKING_SHARE * seconds


def activity_of(process: Process) -> Activity | None:
    """Sample the activity of this very process; None if it is gone, or on another host."""
    own = _find(process)
    if own is None:
        return None
    try:
        times = own.cpu_times()
        return Activity(times.user + times.system, _waits_for_disk(own))
    except (psutil.Error, OSError):
        return None


def _waits_for_disk(own: psutil.Process) -> bool:
    """Return whether any thread waits for a disk; a process only shows the state of its main thread."""
    if sys.platform != "linux":
        return own.status() == psutil.STATUS_DISK_SLEEP
    for thread in os.listdir(f"/proc/{own.pid}/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            facts = Path(f"/proc/{own.pid}/task/{thread}/stat").read_bytes()
            if facts[facts.rindex(b")") + 2 :][:1] == b"D":  # the name before it may hold anything
                return True
    return False


def children_of(parents: Iterable[Process]) -> tuple[Process, ...]:
    """Return the children of processes of this host."""
    children: list[Process] = []
    for parent in parents:
        own = _find(parent)
        if own is not None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it, or a child, has ended just now
                for child in own.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        children.append(_describe(child))
    return tuple(children)


def signal_process(process: Process, number: signal.Signals) -> bool:
    """Signal this very process of this host; whether it was there."""
    own = _find(process)
    if own is None:
        return False
    try:
        own.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def end_processes(
    processes: Iterable[Process],
    *,
    patience_seconds: float,
    first_signal: signal.Signals | None = None,
) -> list[Process]:
    """Wait for processes of this host to end, then kill them.

    Args:
        processes: each is touched only if pid and start time both fit.
        patience_seconds: how long they may take.
        first_signal: sent to each at once.

    Returns:
        Those that had to be killed.
    """
    wanted = list(processes)
    if first_signal is not None:
        _signal_all(wanted, first_signal)
    stubborn = _wait_until_gone(wanted, limit_seconds=patience_seconds)
    _signal_all(stubborn, signal.SIGKILL)
    _wait_until_gone(stubborn, limit_seconds=KILL_SECONDS)
    return stubborn


def _wait_until_gone(processes: Iterable[Process], *, limit_seconds: float) -> list[Process]:
    """Return those that still run at the limit. A zombie counts as gone: only its parent can do more."""
    deadline = time.monotonic() + limit_seconds
    while (left := [process for process in processes if _find(process) is not None]) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return left


def _find(process: Process) -> psutil.Process | None:
    if not is_here(process):
        return None
    try:
        own = psutil.Process(process.pid)
        fits = abs(own.create_time() - process.create_time) < CLOCK_SECONDS and own.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return own if fits else None


def _describe(own: psutil.Process) -> Process:
    return Process(
        host=socket.gethostname(),
        pid=own.pid,
        create_time=own.create_time(),
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
    )


def _signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        own = _find(process)
        if own is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                own.send_signal(number)
