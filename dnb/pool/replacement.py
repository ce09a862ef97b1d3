"""A thread that keeps a pool's number of engines: it starts some in the place of those that died.

Those that a run's work has ended are replaced whatever the policy: the run has paused, and is to go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from dnb.errors import DnbError, HubError, PoolError
from dnb.protocol.client_messages import Members

log = logging.getLogger(__name__)

RestartPolicy = Literal["never", "always"]

# How often the hub is asked who is there.
LOOK_SECONDS = 0.25
# More deaths than this within that time are a crash loop: what kills the engines would kill the next ones, too.
MOST_DEATHS = 5
CRASH_LOOP_SECONDS = 30.0


class ReplacementPolicy:
    """The engines that are owed to a pool: those that died, if they are replaced or the hub says so, missing spares.

    Args:
        restart: whether the dead are replaced.
        members: of the pool as it is now; who died before is not owed.
    """

    def __init__(self, restart: RestartPolicy, members: Members) -> None:
        self._restart = restart
        self._num_died = members.num_died
        self._num_crashed = members.num_died - members.num_killed
        self._owed = 0
        self._crashes: deque[float] = deque()

    def count(self, members: Members, *, now: float) -> int:
        """Return how many to start now.

        Args:
            members: of the pool.
            now: seconds from any origin.
        """
        died, self._num_died = members.num_died - self._num_died, members.num_died
        num_crashed = members.num_died - members.num_killed  # what chaos killed is no crash
        self._crashes.extend([now] * (num_crashed - self._num_crashed))
        self._num_crashed = max(num_crashed, self._num_crashed)
        if self._restart == "always":
            self._owed = max(self._owed + died, 0)
        missing_spares = members.wanted_spares - len(members.spares) if members.workers else 0
        return max(self._owed, members.num_owed, missing_spares, 0)

    def has_nothing_to_keep(self, members: Members) -> bool:
        """Tell whether the pool is as it is wanted, and may become smaller."""
        return self._restart == "never" and not members.num_owed and not members.wanted_spares

    def started(self, number: int) -> None:
        """Count engines that have come up."""
        self._owed = max(self._owed - number, 0)

    def failed(self, *, now: float) -> None:
        """Count a failed start like a death."""
        self._crashes.append(now)

    def is_crash_loop(self, *, now: float) -> bool:
        """Tell whether there were too many deaths of late."""
        while self._crashes and now - self._crashes[0] > CRASH_LOOP_SECONDS:
            self._crashes.popleft()
        return len(self._crashes) > MOST_DEATHS


class EngineReplacer(threading.Thread):
    """Asks the hub who is there, and has engines started in the place of those that are missing.

    Args:
        restart: whether the dead are replaced; missing spares always are.
        poll: asks the hub.
        start: starts so many engines; blocks until they have joined.
        size_lock: held while it decides and starts, so that nobody else starts engines for the same reason.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        restart: RestartPolicy,
        *,
        poll: Callable[[], Members],
        start: Callable[[int], object],
        size_lock: threading.Lock,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="dnb-replacer", daemon=True)
        self._look = poll
        self._start_engines = start
        self._size_lock = size_lock
        self._clock = clock
        self._stopped = threading.Event()
        self._replacements = ReplacementPolicy(restart, poll())
        self.trouble = ""
        self.is_done = False  # it ends, as there was nothing to keep; set while `size_lock` is held

    def stop(self) -> None:
        """Start nothing more; what is being started is not waited for."""
        self._stopped.set()

    def run(self) -> None:
        """Look until it is stopped or of no use, or the engines die faster than they can be replaced."""
        while not self.trouble and not self._stopped.wait(LOOK_SECONDS):
            try:
                with self._size_lock:
                    if not self._replace():
                        return
            except (HubError, PoolError) as error:
                log.info("the pool's engines are not kept any more: %s", error)
                return

    def _replace(self) -> bool:
        """Start those that are missing; whether there is anything to be kept."""
        members = self._look()
        if self._replacements.has_nothing_to_keep(members):
            self.is_done = True
            return False
        number = self._replacements.count(members, now=self._clock())
        if self._replacements.is_crash_loop(now=self._clock()):
            self.trouble = (
                f"more than {MOST_DEATHS} engines died within {CRASH_LOOP_SECONDS:g} s, and are not replaced any more: "
                'find out why, then %dtrain add N, or pool.restart = "always" to go on replacing'
            )
            log.warning(self.trouble)
        elif number and not self._stopped.is_set():
            self._start(number)
        return True

    def _start(self, number: int) -> None:
        try:
            self._start_engines(number)
        except DnbError as error:
            self._replacements.failed(now=self._clock())
            if not self._stopped.is_set():
                log.warning("an engine could not be replaced: %s", error)
        else:
            self._replacements.started(number)
