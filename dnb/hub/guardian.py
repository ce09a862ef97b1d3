"""The hub's parent: holds its ports and keys, and starts it again when it dies.

Started by `dnb.hub.controller`; reads a `HubConfig` from standard input and answers with a `HubBinding`. The guardian
runs none of the user's code, so nothing that does can end it. It listens on the hub's ports from the beginning; whoever
calls while no hub is there waits in the queue of the port.

On Linux hubs and local engines are forks of the guardian, which has imported torch by then: a new one is there within
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
from functools import partial
from types import FrameType
from typing import NoReturn

import msgspec

from dnb.hub import nursery
from dnb.hub.pool_files import remove_pool_files
from dnb.records import HubBinding, HubConfig, Process, Record
from dnb.transport.channels import CLIENT_ROLE, ENGINE_ROLE, RoleKeys, listen, url_of
from dnb.transport.lives import end_with_parent, name_process, this_process
from dnb.transport.segments import remove_pool_folders

log = logging.getLogger(__name__)

# How often the guardian looks whether the controller lives, and whether the hub does where the system does not tell.
LOOK_SECONDS = 0.1
# When so many hubs in a row have died before they were of any use, the next one leaves the run alone that it finds.
WARY_DEATHS = 3
# And after so many the pool ends: the next one would die of the same.
MOST_DEATHS = 5

# How long engines may take to end after the hub; they are the guardian's to bury.
FAREWELL_SECONDS = 3.0


class Guardian:
    """Starts hubs, one after the other, until one has ended the pool.

    Args:
        config: from the controller.
    """

    def __init__(self, config: HubConfig) -> None:
        self._config = config
        self._forks = nursery.CAN_FORK
        self._nursery = nursery.Nursery(config.cluster_id) if self._forks else None
        self._process = this_process()
        self._keys = RoleKeys()
        self._listeners = {role: listen(config.host) for role in (ENGINE_ROLE, CLIENT_ROLE)}
        self._hub: int | None = None  # its pid
        self._signs, self._sign = os.pipe()  # by which a hub says that it is of use
        os.set_blocking(self._signs, False)
        self._is_ending = False

    @property
    def binding(self) -> HubBinding:
        """How to reach the hub."""
        addresses = {role: self._keys.address(role, url_of(listener)) for role, listener in self._listeners.items()}
        return HubBinding(guardian=self._process, client=addresses[CLIENT_ROLE], engine=addresses[ENGINE_ROLE])

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
        num_deaths = 0  # in a row
        life = 0
        while num_deaths < MOST_DEATHS:
            code = self._run_hub(life, is_wary=num_deaths >= WARY_DEATHS)
            if code == 0 or self._is_ending:
                if self._nursery is not None:
                    self._nursery.wait_until_empty(limit_seconds=FAREWELL_SECONDS)
                return
            life += 1
            num_deaths = 0 if self._was_of_use() else num_deaths + 1
            log.error("the hub ended with code %s: it is started again", code)
        log.critical("%d hubs died as soon as they were started: the pool ends", num_deaths)
        self._clear_up()
        sys.exit(1)

    def _run_hub(self, life: int, *, is_wary: bool) -> int:
        """Start a hub and wait for its end; how it ended, as `subprocess` counts."""
        bequest = Bequest(
            config=self._config, guardian=self._process, keys=self._keys.pairs, life=life, is_wary=is_wary
        )
        self._hub = self._fork(bequest) if self._forks else self._spawn(bequest)
        while (code := self._wait(self._hub)) is None:
            if os.getppid() != self._config.controller.pid and not self._is_ending:
                log.info("the controller is gone: the pool ends")
                self._is_ending = True
                os.kill(self._hub, signal.SIGTERM)
        self._hub = None
        return code

    def _was_of_use(self) -> bool:
        """Whether the hub that has died had done something before."""
        try:
            return bool(os.read(self._signs, 1))
        except BlockingIOError:
            return False

    def _wait(self, pid: int) -> int | None:
        """How the child has ended, or None after a while; meanwhile engines are born and buried."""
        if self._nursery is None:
            time.sleep(LOOK_SECONDS)
        else:
            watched = os.pidfd_open(pid)
            try:
                ready, _, _ = select.select([watched, self._nursery.fileno()], [], [], LOOK_SECONDS)
            finally:
                os.close(watched)
            if self._nursery.fileno() in ready:
                self._nursery.serve()
            self._nursery.bury()
        ended, status = os.waitpid(pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def _fork(self, bequest: Bequest) -> int:
        pid = os.fork()
        if pid == 0:
            _serve(bequest, self._listeners, self._sign)
        return pid

    def _spawn(self, bequest: Bequest) -> int:
        descriptors = {"sign": self._sign, **{role: own.fileno() for role, own in self._listeners.items()}}
        command = [sys.executable, "-m", "dnb.hub.guardian", msgspec.json.encode(descriptors).decode()]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=list(descriptors.values()))
        assert child.stdin is not None
        with child.stdin as pipe:
            pipe.write(msgspec.json.encode(bequest) + b"\n")
        child.returncode = 0  # waited for by its pid, not by this object
        return child.pid

    def _clear_up(self) -> None:
        remove_pool_folders(self._config.cluster_id)
        remove_pool_files(self._config)


class Bequest(Record, frozen=True):
    """What a hub is given by its guardian."""

    config: HubConfig
    guardian: Process
    keys: dict[str, tuple[bytes, bytes]]
    life: int  # how many hubs the pool had before
    is_wary: bool


def warm_up(*, with_engines: bool = False) -> None:
    """Import what hubs need, and what torch leaves until an optimizer first steps: seconds in all."""
    if with_engines:
        nursery.warm_up()
        import torch

        torch.set_num_threads(1)  # OpenMP does not survive a fork once it has threads; engines set their own number
    importlib.import_module("dnb.hub.service")
    importlib.import_module("dnb.hub.active_run")
    importlib.import_module("dnb.hub.optimizers").warm_up()
    gc.collect()
    gc.freeze()  # else a collection in the fork would copy every page it looks at


def _serve(bequest: Bequest, listeners: dict[str, socket.socket], sign: int) -> NoReturn:
    """Be the hub."""
    code = 1
    try:
        from dnb.hub.service import Service

        name_process("dnb-hub")
        keys = RoleKeys(bequest.keys)
        service = Service(
            bequest.config,
            keys,
            listeners,
            guardian=bequest.guardian,
            life=bequest.life,
            is_wary=bequest.is_wary,
            be_of_use=partial(os.write, sign, b"."),
        )
        signal.signal(signal.SIGTERM, lambda *_: service.end("asked to, by a signal"))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout = sys.stderr  # user code that prints must not fill a pipe that nobody reads
        service.serve()
        code = 0
    except BaseException:
        log.exception("the hub failed")
    finally:
        logging.shutdown()
        os._exit(code)  # nothing is left to do, and taking torch's modules apart would take another second


def main() -> None:
    """Bind, answer the controller, then keep a hub alive; or be the hub, where it is not forked."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if len(sys.argv) > 1:
        descriptors = msgspec.json.decode(sys.argv[1], type=dict[str, int])
        sign = descriptors.pop("sign")
        listeners = {role: socket.socket(fileno=number) for role, number in descriptors.items()}
        warm_up()
        _serve(msgspec.json.decode(sys.stdin.buffer.readline(), type=Bequest), listeners, sign)
    name_process("dnb-guardian")
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=HubConfig)
    guardian = Guardian(config)
    signal.signal(signal.SIGTERM, guardian.end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGTERM)  # at once, also while torch is imported
    sys.stdout.buffer.write(msgspec.json.encode(guardian.binding) + b"\n")
    sys.stdout.flush()
    guardian.guard()


if __name__ == "__main__":
    main()
