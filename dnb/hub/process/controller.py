"""ipyparallel's controller with the hub beside its schedulers; started by the launcher's `controller_cmd`.

The hub's ports are bound before the connection files are written, and its addresses and keys travel inside them: so a
client or engine that has a connection file can reach the hub, under every launcher that brings such files around.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import zmq
from ipyparallel.controller import app
from ipyparallel.controller.app import IPController
from ipyparallel.util import disambiguate_url
from traitlets import Float, Integer, Unicode

from dnb.hub.log_limits import limit_logs, report_log_counts
from dnb.hub.process.heart_monitor import MonitorWatch, run_heart_monitor
from dnb.protocol.pool import HubBinding, HubConfig, HubPlace, Process
from dnb.protocol.versions import POOL_FORMAT, VERSION
from dnb.transport.sockets.listeners import HANDSHAKE_SECONDS
from dnb.transport.system.open_files import raise_file_limit
from dnb.transport.system.processes import this_process


class HubChild:
    """The hub's supervisor, as one more child of the controller."""

    name = "dnb hub"
    module = "dnb.hub.process.supervisor"  # tests start another one

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def open(self, config: HubConfig) -> HubBinding:
        """Start the process and wait until the hub's ports are bound.

        Raises:
            RuntimeError: it ended before that; its output is in the controller's log.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process.stdin as pipe:
            pipe.write(msgspec.json.encode(config) + b"\n")
        with self.process.stdout as pipe:
            line = pipe.readline()
        if not line:
            raise RuntimeError(f"the dnb hub ended with code {self.process.wait()} before it was bound")
        return msgspec.json.decode(line, type=HubBinding)

    def start(self) -> None:
        """Do nothing: the process was started before the connection files were written."""

    def terminate(self) -> None:
        """Ask the hub to end the pool."""
        if self.process is not None:
            self.process.terminate()


class HeldPorts:
    """Ports that this process has drawn and binds later: until then, no other process is given one of them.

    ipyparallel draws all ports of a controller at once and binds them one by one, some of them seconds later. A
    connection of any process of the host that is given one of them meanwhile leaves the pool without that socket.
    """

    def __init__(self) -> None:
        self._holders: list[socket.socket] = []

    def hold(self, port: int) -> bool:
        """Keep it for sockets that ask for it by number; False if it has been given away already."""
        if not CAN_HOLD_PORTS:
            return True
        holder = socket.socket()
        try:
            holder.bind(("", port))
        except OSError:
            holder.close()
            return False
        # ZeroMQ sets it, too: two sockets that both allow it share a port as long as one of them does not listen.
        # Not before the bind, which then would share the port with the holder of another controller.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holders.append(holder)
        return True

    def close(self) -> None:
        """Let go of all of them."""
        while self._holders:
            self._holders.pop().close()


class DnbController(IPController):
    """`ipcontroller` with a hub; same command line."""

    owner_host = Unicode("", config=True, help="host of the kernel that owns the pool")
    owner_pid = Integer(0, config=True, help="its pid")
    owner_create_time = Float(0.0, config=True, help="its start, in seconds since the epoch")
    owner_boot_id = Unicode("", config=True, help="of the kernel of its host")
    owner_pid_namespace = Unicode("", config=True, help="in which its pid counts")

    _hub: HubChild | None = None
    _binding: HubBinding | None = None
    _ports: HeldPorts
    _monitor_options: dict[str, Any]
    _monitor: MonitorWatch | None = None
    _is_ending = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ports = HeldPorts()

    def next_port(self, pool_name: str = "common") -> int:
        """Draw a free port, which stays free for the socket that binds it later."""
        while True:
            num_drawn = self._random_port_count
            port = int(super().next_port(pool_name))
            is_configured = self._random_port_count == num_drawn
            if self._ports.hold(port) or is_configured:  # if a port of the user's choice is taken, binding it says so
                return port

    def init_config_from_env(self) -> None:
        """Take options from the environment; the cluster has a key whether or not its sockets are encrypted."""
        super().init_config_from_env()
        if "key" not in self.config.Session:  # else ipyparallel leaves it empty: it signs payloads, too
            self.config.Session.key = secrets.token_hex(32).encode()

    def init_hub(self) -> None:
        """Prepare ipyparallel's own hub; what it starts does not outlive this process."""
        raise_file_limit()
        # Of all its sockets that are opened from here on: who calls and says nothing is sent away.
        self.context.setsockopt(zmq.HANDSHAKE_IVL, round(1000 * HANDSHAKE_SECONDS))
        app.Process = self._prepare_monitor
        try:
            super().init_hub()
        finally:
            app.Process = multiprocessing.Process
        if not self.restore_engines:
            self.hub.engine_state_file = ""  # nobody reads it, and a full disk would keep it from saying who is gone

    def _prepare_monitor(self, *, kwargs: dict[str, Any], **_options: Any) -> BaseProcess:
        """Stand in for the process class of ipyparallel's heart monitor, which it starts later."""
        self._monitor_options = kwargs
        return self._make_monitor(identities=())

    def _make_monitor(self, *, identities: Iterable[bytes]) -> BaseProcess:
        options = {**self._monitor_options, "hearts": set(identities)}
        return multiprocessing.Process(target=run_heart_monitor, kwargs=options, daemon=True)

    def _start_monitor(self) -> BaseProcess:
        """Start another monitor; it misses those whose engines are registered and do not answer it."""
        monitor = self._make_monitor(identities=self.hub.hearts)
        monitor.start()
        self.heartmonitor_process = monitor
        return monitor

    def _watch_monitor(self) -> None:
        if self._monitor is None and self.heartmonitor_process.pid is not None:
            heartbeats: zmq.Socket[bytes] = self.context.socket(zmq.SUB)
            heartbeats.linger = 0
            heartbeats.setsockopt(zmq.SUBSCRIBE, b"")
            self.connect(heartbeats, disambiguate_url(self.engine_url("hb_ping")))
            self._monitor = MonitorWatch(
                self.heartmonitor_process,
                start=self._start_monitor,
                heartbeats=heartbeats,
                period_seconds=self.hub.heartmonitor_period / 1000,
                log=self.log,
            )
        if self._monitor is not None and not self._is_ending:
            self._monitor.check()

    def save_connection_dict(self, fname: str, cdict: dict[str, Any]) -> None:
        """Write a connection file, with the hub's address for its reader in it."""
        binding = self._open_hub(cdict["key"])
        address = binding.engine if fname == self.engine_json_file else binding.client
        place = HubPlace(
            address=address,
            supervisor=binding.supervisor,
            fork_server=binding.fork_server,
            format=POOL_FORMAT,
            version=VERSION,
        )
        cdict["dnb"] = msgspec.to_builtins(place)
        # Made here: ipyparallel would make it readable by all and then change that.
        path = Path(self.profile_dir.security_dir) / fname
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        super().save_connection_dict(fname, cdict)

    def init_schedulers(self) -> None:
        """Start the schedulers, and count the hub among the children."""
        super().init_schedulers()
        self.children.append(self._hub)

    def terminate_children(self) -> None:
        """End the schedulers and the hub."""
        self._is_ending = True
        if self._hub is not None:
            self._hub.terminate()
        super().terminate_children()

    def start(self) -> None:
        """Serve until the hub or a signal ends the pool."""
        limit_logs(self.log, *map(logging.getLogger, logging.root.manager.loggerDict))
        self.loop.call_later(WATCH_SECONDS, self._watch)
        try:
            super().start()
        finally:
            self._ports.close()

    def _watch(self) -> None:
        assert self._hub is not None
        assert self._hub.process is not None
        report_log_counts()
        if self._hub.process.poll() is not None:
            self._end_without_hub(self._hub.process.returncode)
            return
        self.loop.call_later(WATCH_SECONDS, self._watch)
        self._watch_monitor()

    def _end_without_hub(self, code: int) -> None:
        """End a pool whose supervisor died, and remove what a killed hub could not."""
        from dnb.hub.pool_files import remove_pool_files
        from dnb.transport.segments import named_folders, remove_folders

        self.log.critical("the hub's supervisor ended with code %s: the pool ends", code)
        assert self._binding is not None
        remove_folders(named_folders(self._binding.folders, self.cluster_id))
        remove_pool_files(self._config_for_hub(""))
        self.terminate_children()
        self.loop.stop()

    def _open_hub(self, key: str) -> HubBinding:
        if self._binding is None:
            self._hub = HubChild()
            self._binding = self._hub.open(self._config_for_hub(key))
        return self._binding

    def _config_for_hub(self, key: str) -> HubConfig:
        owner = None
        if self.owner_pid:
            owner = Process(
                host=self.owner_host,
                pid=self.owner_pid,
                create_time=self.owner_create_time,
                boot_id=self.owner_boot_id,
                pid_namespace=self.owner_pid_namespace,
            )
        return HubConfig(
            cluster_id=self.cluster_id,
            key=key,
            security_dir=self.profile_dir.security_dir,
            log_dir=self.profile_dir.log_dir,
            host=self.client_ip or "127.0.0.1",
            controller=this_process(),
            owner=owner,
        )


# Whether a socket that is bound and does not listen keeps a port for one that says SO_REUSEADDR.
CAN_HOLD_PORTS = sys.platform == "linux"
# How soon the controller notices that the supervisor or the heart monitor has died.
WATCH_SECONDS = 0.2


if __name__ == "__main__":
    DnbController.launch_instance()
