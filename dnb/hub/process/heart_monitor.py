"""ipyparallel's heart monitor, watched: one that has died or stands still is replaced by another.

It is a process beside the controller. Without it no engine can be registered, none that vanishes is missed, and
engines that get no heartbeat for half a minute end.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import zmq
from ipyparallel.controller.heartmonitor import start_heartmonitor

from dnb.transport.system.processes import end_with_parent, find_process

# So many heartbeats that did not come, and at least so long: it stands still. A busy machine may be slow to send.
MISSED_HEARTBEATS = 20
STILL_SECONDS = 5.0
# A new one must import nothing, but may be slow to come up where the machine is busy.
FIRST_HEARTBEAT_SECONDS = 20.0
# After one that died without a heartbeat, the next waits so long; twice as long each time, up to the second figure.
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0


def run_heart_monitor(**options: Any) -> None:
    """Run ipyparallel's heart monitor in this process, which ends with its controller, also with a killed one."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT):  # not as the controller's, which ends its children
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)
    controller = multiprocessing.parent_process()
    assert controller is not None
    assert controller.pid is not None
    if find_process(controller.pid) is not None:  # it has not been killed just before that
        start_heartmonitor(**options)


class MonitorWatch:
    """Decides when a heart monitor is replaced; `check` is called several times a second.

    Args:
        process: the first monitor, which has been started.
        start: starts another one, which takes over the engines that still answer.
        heartbeats: gets every heartbeat that the monitors send.
        period_seconds: between two heartbeats.
        log: of the controller.
        clock: monotonic.
    """

    def __init__(
        self,
        process: BaseProcess,
        *,
        start: Callable[[], BaseProcess],
        heartbeats: zmq.Socket[bytes],
        period_seconds: float,
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.process = process
        self._start = start
        self._heartbeats = heartbeats
        self._still_seconds = max(MISSED_HEARTBEATS * period_seconds, STILL_SECONDS)
        self._log = log
        self._clock = clock
        self._checked_at = self._heard_at = clock()
        self._has_beaten = False
        self._is_gone = False  # and another one is to be started
        self._wait_seconds = FIRST_WAIT_SECONDS
        self._start_at = 0.0

    def check(self) -> None:
        """Replace the monitor if that is necessary."""
        now = self._clock()
        self._read_heartbeats(now)
        if not self._is_gone:
            self._check_process(now)
        if self._is_gone and now >= self._start_at:
            self._replace(now)

    def _read_heartbeats(self, now: float) -> None:
        if now - self._checked_at > STILL_SECONDS / 2:  # it was this process that stood still
            self._heard_at = now
        self._checked_at = now
        while self._heartbeats.poll(0):
            self._heartbeats.recv()
            self._heard_at, self._has_beaten, self._wait_seconds = now, True, FIRST_WAIT_SECONDS

    def _check_process(self, now: float) -> None:
        limit = self._still_seconds if self._has_beaten else FIRST_HEARTBEAT_SECONDS
        if not self.process.is_alive():
            self._log.error("the heart monitor ended with code %s: another one is started", self.process.exitcode)
            self._is_gone = True
        elif now - self._heard_at > limit:
            self._log.error("the heart monitor has not beaten for %.0f s: it is replaced", now - self._heard_at)
            self._end()
            self._is_gone = True
        if self._is_gone:
            self._start_at = now if self._has_beaten else now + self._wait_seconds
            self._wait_seconds = min(2 * self._wait_seconds, LONGEST_WAIT_SECONDS)

    def _replace(self, now: float) -> None:
        try:
            self.process = self._start()
        except OSError as error:  # no memory, too many processes
            self._log.error("no heart monitor can be started: no engine can join or be missed until one is: %s", error)
            self._start_at = now + self._wait_seconds
            self._wait_seconds = min(2 * self._wait_seconds, LONGEST_WAIT_SECONDS)
            return
        self._is_gone = self._has_beaten = False
        self._heard_at = now

    def _end(self) -> None:
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)  # also ends one that was stopped
        self.process.join(1.0)
