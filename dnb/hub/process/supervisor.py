"""The hub's parent: holds its ports and keys, and starts it again when it dies.

Started by `dnb.hub.process.controller`; reads a `HubConfig` from standard input and answers with a `HubBinding`. The
supervisor runs none of the user's code, so nothing that does can end it. It tells the next hub why the ones before have
ended. It listens on the hub's ports from the beginning; whoever calls while no hub is there waits in the queue of the
port.

On Linux hubs and local engines are forks of the supervisor, which has imported torch by then: a new one is there within
milliseconds, and all share the memory of what they imported. Elsewhere, where forking with a system's libraries loaded
is not safe, they are fresh processes, which take the seconds that importing torch takes.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

import msgspec

from dnb.hub.hub_failures import MOST_DEATHS, NUM_KEPT, Crash, Recorder, num_idle_deaths
from dnb.hub.log_limits import close_logs, limit_logs, report_log_counts
from dnb.hub.pool_files import remove_pool_files
from dnb.hub.process import fork_server
from dnb.protocol.base import Record
from dnb.protocol.pool import HubBinding, HubConfig, Process
from dnb.transport.segments import draw_pool_folders, remove_folders
from dnb.transport.sockets.channels import CLIENT_ROLE, ENGINE_ROLE, RoleKeys, local
from dnb.transport.sockets.listeners import HAS_LOCAL_SOCKETS, listen, listen_locally, url_of
from dnb.transport.system.open_files import raise_file_limit
from dnb.transport.system.output import LossyOutput
from dnb.transport.system.processes import end_with_parent, name_process, this_process

log = logging.getLogger(__name__)

# How often the supervisor looks whether the controller lives, and whether the hub does where the system does not tell.
LOOK_SECONDS = 0.1
# How long the supervisor waits before it tries again what the system refuses: another process, say.
AGAIN_SECONDS = 0.2
# How long engines may take to end after the hub; they are the supervisor's to reap.
FAREWELL_SECONDS = 3.0


class Supervisor:
    """Starts hubs, one after the other, until one has ended the pool.

    Args:
        config: from the controller.
    """

    def __init__(self, config: HubConfig) -> None:
        self._folders = draw_pool_folders()
        self._config = msgspec.structs.replace(config, folders=tuple(map(str, self._folders)))
        self._forks = fork_server.CAN_FORK
        self._fork_server = fork_server.ForkServer() if self._forks else None
        self._process = this_process()
        self._keys = RoleKeys()
        self._listeners = {role: listen(config.host) for role in (ENGINE_ROLE, CLIENT_ROLE)}
        if HAS_LOCAL_SOCKETS:
            self._listeners |= {local(role): listen_locally() for role in (ENGINE_ROLE, CLIENT_ROLE)}
        self._hub: int | None = None  # its pid
        self._recorder = Recorder()
        self._crashes: list[Crash] = []
        self._is_ending = False

    @property
    def binding(self) -> HubBinding:
        """The addresses and keys by which the hub is reached."""
        urls = {name: url_of(listener) for name, listener in self._listeners.items()}
        addresses = {
            role: self._keys.address(role, urls[role], local=urls.get(local(role), ""))
            for role in (ENGINE_ROLE, CLIENT_ROLE)
        }
        return HubBinding(
            supervisor=self._process,
            client=addresses[CLIENT_ROLE],
            engine=addresses[ENGINE_ROLE],
            folders=self._config.folders,
            fork_server="" if self._fork_server is None else self._fork_server.name,
        )

    def end(self, _number: int, _frame: FrameType | None) -> None:
        """Let the pool end; for signals."""
        self._is_ending = True
        if self._hub is not None:
            os.kill(self._hub, signal.SIGTERM)
        else:  # while torch is imported, or between two hubs: nobody has joined yet
            self._clear_up()
            os._exit(0)

    def guard(self) -> None:
        """Keep a hub alive until the pool has ended."""
        if self._forks:
            warm_up(with_engines=True)
        generation = 0
        while num_idle_deaths(self._crashes) < MOST_DEATHS:
            began = time.monotonic()
            code = self._run_hub(generation)
            if self._recorder.has_ended_as_meant or self._is_ending:
                if self._fork_server is not None:
                    self._fork_server.wait_until_empty(limit_seconds=FAREWELL_SECONDS)
                return
            generation += 1
            crash = self._recorder.crash(code, lived_seconds=time.monotonic() - began)
            self._crashes = [*self._crashes, crash][-NUM_KEPT:]
            log.error("the hub has ended: %s: it is started again", crash.reason)
        log.critical("%d hubs died as soon as they were started: the pool ends", num_idle_deaths(self._crashes))
        self._clear_up()
        sys.exit(1)

    def _run_hub(self, generation: int) -> int:
        """Start a hub and wait for its end; how it ended, as `subprocess` counts."""
        launch = HubLaunch(
            config=self._config,
            supervisor=self._process,
            keys=self._keys.pairs,
            generation=generation,
            crashes=tuple(self._crashes),
        )
        self._recorder.reset()
        self._hub = self._start(launch)
        while (code := self._wait(self._hub)) is None:
            if os.getppid() != self._config.controller.pid and not self._is_ending:
                log.info("the controller is gone: the pool ends")
                self._is_ending = True
                os.kill(self._hub, signal.SIGTERM)
        self._hub = None
        return code

    def _start(self, launch: HubLaunch) -> int:
        """Start a hub; as often as the system has no room for one it is tried again. Its pid."""
        while True:
            try:
                return self._fork(launch) if self._forks else self._spawn(launch)
            except OSError as error:
                log.error("a hub cannot be started now: %s", error)
                time.sleep(AGAIN_SECONDS)

    def _wait(self, pid: int) -> int | None:
        """Wait a while for the child, forking and reaping engines meanwhile; its exit code, or None while it lives."""
        if self._fork_server is None:
            time.sleep(LOOK_SECONDS)
        else:
            self._attend(self._fork_server, hub=pid)
        report_log_counts()
        ended, status = os.waitpid(pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def _attend(self, fork_server: fork_server.ForkServer, *, hub: int) -> None:
        """Fork and reap engines for a while, or until the hub has ended."""
        try:
            watched = os.pidfd_open(hub)
            try:
                ready, _, _ = select.select([watched, fork_server.fileno()], [], [], LOOK_SECONDS)
            finally:
                os.close(watched)
            if fork_server.fileno() in ready:
                fork_server.serve()
            fork_server.reap()
        except Exception:  # whatever it is, the hub lives on, and with it the run
            log.exception("an engine cannot be started, or reaped")
            time.sleep(LOOK_SECONDS)

    def _fork(self, launch: HubLaunch) -> int:
        pid = os.fork()
        if pid == 0:
            exits = None
            if self._fork_server is not None:
                self._fork_server.close()
                exits = self._fork_server.exits.reader
            _serve(launch, self._listeners, self._recorder, exits=exits)
        return pid

    def _spawn(self, launch: HubLaunch) -> int:
        descriptors = {
            "recorder": self._recorder.descriptor,
            **{role: own.fileno() for role, own in self._listeners.items()},
        }
        command = [sys.executable, "-m", "dnb.hub.process.supervisor", msgspec.json.encode(descriptors).decode()]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=list(descriptors.values()))
        assert child.stdin is not None
        with child.stdin as pipe:
            pipe.write(msgspec.json.encode(launch) + b"\n")
        child.returncode = 0  # waited for by its pid, not by this object
        return child.pid

    def _clear_up(self) -> None:
        remove_folders(self._folders)
        remove_pool_files(self._config)


class HubLaunch(Record, frozen=True):
    """The state that a hub gets from its supervisor when it starts."""

    config: HubConfig
    supervisor: Process
    keys: dict[str, tuple[bytes, bytes]]
    generation: int  # how many hubs the pool had before
    crashes: tuple[Crash, ...] = ()  # of the last ones


def warm_up(*, with_engines: bool = False) -> None:
    """Import what hubs need, and what torch leaves until an optimizer first steps: seconds in all."""
    if with_engines:
        fork_server.warm_up()
        import torch

        torch.set_num_threads(1)  # OpenMP does not survive a fork once it has threads; engines set their own number
    importlib.import_module("dnb.hub.server.service")
    importlib.import_module("dnb.hub.run.active_run")
    importlib.import_module("dnb.hub.parameters.optimizers").warm_up()
    gc.collect()
    gc.freeze()  # else a collection in the fork would copy every page it looks at


def _serve(
    launch: HubLaunch, listeners: dict[str, socket.socket], recorder: Recorder, *, exits: int | None = None
) -> NoReturn:
    """Run the hub. If it ends by an exception, nothing is done that SIGKILL would not have done."""
    code = 1
    try:
        from dnb.hub.server.members.engine_exits import ExitReader
        from dnb.hub.server.service import Service

        name_process("dnb-hub")
        recorder.begin()
        asked: list[int] = []  # by a signal that comes before there is anything to end
        signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # User code that prints must not fill a pipe that nobody reads, nor fail when the disk is full.
        sys.stdout = sys.stderr = LossyOutput(sys.stderr)
        keys = RoleKeys(launch.keys)
        service = Service(
            launch.config,
            keys,
            listeners,
            supervisor=launch.supervisor,
            generation=launch.generation,
            crashes=launch.crashes,
            recorder=recorder,
            exits=ExitReader(exits),
        )
        signal.signal(signal.SIGTERM, lambda *_: service.end("asked to, by a signal"))
        if asked:
            service.end("asked to, by a signal")
        service.serve()
        code = 0
    except BaseException as error:
        log.exception("the hub has failed")
        recorder.leave(error)
    finally:
        close_logs()
        logging.shutdown()
        os._exit(code)  # nothing is left to do, and taking torch's modules apart would take another second


def main() -> None:
    """Bind, answer the controller, then keep a hub alive; or be the hub, where it is not forked."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    limit_logs()
    if len(sys.argv) > 1:
        descriptors = msgspec.json.decode(sys.argv[1], type=dict[str, int])
        recorder = Recorder(descriptors.pop("recorder"))
        listeners = {role: socket.socket(fileno=number) for role, number in descriptors.items()}
        warm_up()
        _serve(msgspec.json.decode(sys.stdin.buffer.readline(), type=HubLaunch), listeners, recorder)
    name_process("dnb-supervisor")
    raise_file_limit()  # for the hubs, too
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=HubConfig)
    supervisor = Supervisor(config)
    signal.signal(signal.SIGTERM, supervisor.end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGTERM)  # at once, also while torch is imported
    sys.stdout.buffer.write(msgspec.json.encode(supervisor.binding) + b"\n")
    sys.stdout.flush()
    supervisor.guard()


if __name__ == "__main__":
    main()
