"""The records of a pool: on disk for other kernels, in memory for the next hub, and as answers for whoever asks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from dnb.hub.handover import POOL_FILE, PoolHandover, read_handover, write_handover
from dnb.hub.pool_files import write_pool_file
from dnb.hub.server.members.fault_injection import FaultInjector
from dnb.hub.server.members.membership import Membership, PoolEngine
from dnb.hub.server.run_slot import RunSlot
from dnb.hub.server.steering import Steering
from dnb.protocol.client_messages import Members, PoolState
from dnb.protocol.pool import EngineState, EngineStatus, HubConfig, HubRestart, PoolFacts, Process
from dnb.protocol.versions import POOL_FORMAT, VERSION
from dnb.transport.system.processes import children_of, is_alive, this_process

log = logging.getLogger(__name__)

# How often a disk is tried again that did not take the pool's record.
WRITE_AGAIN_SECONDS = 1.0
# How long a new hub expects the engines of the one before: those that live are back within a tenth of that.
RETURN_SECONDS = 5.0


class PoolRecords:
    """Describes a pool, and keeps what is written of it up to date.

    Args:
        config: from the controller.
        supervisor: the parent.
        restarts: the hubs of before.
        folders: of the pool's memory.
        members: the engines.
        steering: the kernels.
        slot: the run.
        injector: of faults.
        count_sent: counts the records sent to each engine over its wires.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        supervisor: Process,
        restarts: tuple[HubRestart, ...],
        folders: Sequence[Path],
        members: Membership,
        steering: Steering,
        slot: RunSlot,
        injector: FaultInjector,
        count_sent: Callable[[], Mapping[int, int]],
    ) -> None:
        self._config = config
        self._supervisor = supervisor
        self._process = this_process()
        self._restarts = restarts
        self._folders = folders
        self._members = members
        self._steering = steering
        self._slot = slot
        self._injector = injector
        self._count_sent = count_sent
        self._began = time.monotonic()
        self._write_again = self._keep_again = 0.0  # when disk and memory are tried again, on the monotonic clock
        self._disk_fault = ""  # that was logged

    # what is written

    def restore(self) -> None:
        """Take over what the hub before has left of the pool."""
        handover = read_handover(self._folders, POOL_FILE, PoolHandover)
        if handover is not None:
            self._steering.restore(handover)
            self._members.restore(handover)
            self._injector.num_killed = handover.num_killed
            self._injector.stopped = dict(handover.stopped)
        self._members.changed = self._members.has_other_engines = True

    def flush(self) -> None:
        """Write what has changed, unless that was tried just now."""
        now = time.monotonic()
        if self._members.has_other_engines and now >= self._write_again:
            self.write_pool_file()
        elif (self._members.changed or self._steering.changed or self._slot.changed) and now >= self._keep_again:
            self._keep_again = now + WRITE_AGAIN_SECONDS
            self.write_handovers()

    def write_pool_file(self) -> None:
        """Write the pool's record, then what the next hub will find."""
        # Looking for children goes over all processes of the host, 13 ms were seen: no step waits for that. The nanny
        # of an engine that has just joined ends with its engine.
        facts = self._facts(poll=not self._slot.held.is_active)
        try:
            write_pool_file(Path(self._config.security_dir), facts)
        except OSError as error:
            # Only other kernels read it: nothing that this one does waits for it.
            self._members.has_other_engines = True
            self._write_again = time.monotonic() + WRITE_AGAIN_SECONDS
            if str(error) != self._disk_fault:
                self._disk_fault = str(error)
                log.warning("the pool's record is not up to date, and is written as soon as it can be: %s", error)
        else:
            self._members.has_other_engines = False
            if self._disk_fault:
                self._disk_fault = ""
                log.warning("the pool's record is up to date again")
        self._members.changed = True
        self.write_handovers()

    def write_handovers(self) -> None:
        """Write what the next hub will find, where it has changed."""
        if self._members.changed or self._steering.changed:
            is_kept = write_handover(self._folders, POOL_FILE, self._handover())
            self._members.changed = self._steering.changed = not is_kept
            self._slot.write_stats()
        self._slot.write_handover()

    def _handover(self) -> PoolHandover:
        members, steering = self._members, self._steering
        return PoolHandover(
            owner=steering.owner,
            kernels={name.hex(): kernel for name, kernel in steering.kernels.items()},
            kernel_versions={name.hex(): version for name, version in steering.versions.items()},
            engines=(*members.returning.values(), *members.facts),
            spares=members.all_spares,
            leaving=(*members.leaving, *members.retiring),
            wanted_spares=members.wanted_spares,
            restart=steering.restart,
            dead=tuple(members.dead),
            num_killed=self._injector.num_killed,
            stopped=tuple(self._injector.stopped.items()),
            helpers=tuple(members.helpers),
            num_owed=members.num_owed,
        )

    # what is answered

    def members(self) -> Members:
        """Return the numbers of the engines, and what the pool does when they end."""
        members = self._members
        return Members(
            workers=members.workers,
            spares=members.spares,
            leaving=(*sorted(members.retiring), *sorted(members.leaving)),
            wanted_spares=members.wanted_spares,
            num_died=len(members.dead),
            num_killed=self._injector.num_killed,
            restart=self._steering.restart,
            last_restart=self._restarts[-1].reason if self._restarts else "",
            num_owed=members.num_owed,
            num_threads=members.num_threads,
        )

    def state(self) -> PoolState:
        """Return the pool and its engines."""
        is_new = time.monotonic() - self._began < RETURN_SECONDS
        returning = sorted(self._members.returning) if is_new else ()
        return PoolState(facts=self._facts(), engines=self._statuses(), returning=tuple(returning))

    def _facts(self, *, poll: bool = True) -> PoolFacts:
        return PoolFacts(
            cluster_id=self._config.cluster_id,
            supervisor=self._supervisor,
            hub=self._process,
            controller=self._config.controller,
            helpers=self.helpers(poll=poll),
            engines=tuple(self._members.facts),
            owner=self._steering.owner,
            run=self._slot.name,
            run_status=self._slot.status,
            returning=tuple(self._members.returning.values()),
            restarts=self._restarts,
            folders=tuple(map(str, self._folders)),
            format=POOL_FORMAT,
            version=VERSION,
        )

    def helpers(self, *, poll: bool = True) -> tuple[Process, ...]:
        """Return the processes beside hub, controller and engines that end with the pool."""
        members = self._members
        if poll:
            # Remembered, as the children of a controller that was killed can no longer be found.
            parents = [self._config.controller, *(facts.process for facts in members.facts)]
            own = {self._process.pid, self._supervisor.pid}
            members.helpers |= {child for child in children_of(parents) if child.pid not in own}
        return tuple(helper for helper in members.helpers if is_alive(helper))

    def _statuses(self) -> tuple[EngineStatus, ...]:
        heartbeats, working, sent = self._members.heartbeats, self._slot.held.working, self._count_sent()
        return tuple(
            _status(
                engine,
                is_busy=number in working or number in heartbeats.busy,
                is_silent=number in heartbeats.silent,
                num_on_wires=sent.get(number, 0),
            )
            for number, engine in sorted(self._members.engines.items())
        )


def _status(engine: PoolEngine, *, is_busy: bool, is_silent: bool, num_on_wires: int) -> EngineStatus:
    state: EngineState = "busy" if is_busy else "spare" if engine.is_spare else "ready"
    state = "hung" if is_silent else state
    rss_bytes = None
    try:
        process = psutil.Process(engine.facts.process.pid)
        rss_bytes = process.memory_info().rss
        if process.status() == psutil.STATUS_STOPPED:
            state = "hung"
    except psutil.Error as error:
        log.info("engine %d cannot be looked at: %s", engine.facts.engine, error)
    return EngineStatus(
        facts=engine.facts,
        state=state,
        rss_bytes=rss_bytes,
        messages_in=engine.messages_in,
        messages_out=engine.messages_out + num_on_wires,
        slowdown=engine.slowdown,
    )
