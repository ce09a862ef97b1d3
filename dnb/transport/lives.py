"""Which processes live, by pid and start time, and how they are ended."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterable

import psutil

from dnb.records import Process


def this_process() -> Process:
    """The process that calls."""
    return _describe(psutil.Process())


def is_alive(process: Process) -> bool:
    """Whether this very process, not a later one with its pid, still runs; True on another host."""
    if process.host != socket.gethostname():
        return True  # only its connection can tell
    return _find(process) is not None


def children_of(parents: Iterable[Process]) -> tuple[Process, ...]:
    """The children of processes of this host."""
    found = [own for parent in parents if (own := _find(parent)) is not None]
    return tuple(_describe(child) for own in found for child in own.children())


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
    found = {own: process for process in processes if (own := _find(process)) is not None}
    for own in found:
        if first_signal is not None:
            _signal(own, first_signal)
    _, stubborn = psutil.wait_procs(list(found), timeout=patience_seconds)
    for own in stubborn:
        _signal(own, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=patience_seconds)
    return [found[own] for own in stubborn]


def _find(process: Process) -> psutil.Process | None:
    if process.host != socket.gethostname():
        return None
    try:
        own = psutil.Process(process.pid)
        fits = own.create_time() == process.create_time and own.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return own if fits else None


def _describe(own: psutil.Process) -> Process:
    return Process(host=socket.gethostname(), pid=own.pid, create_time=own.create_time())


def _signal(own: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        own.send_signal(number)
