"""Starting a pool, and taking over one that a dead kernel left."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import ipyparallel
import msgspec
import psutil
from traitlets.config import Config

from dnb.errors import PoolError
from dnb.hub.pool_files import client_file
from dnb.planning.capacity import check_num_engines, choose_num_threads
from dnb.pool.engine_pool import EnginePool
from dnb.pool.engine_starter import Registry, count_ready, last_words, quiet_log, start_joining, thread_environment
from dnb.pool.fork_launcher import PoolCluster, PrivateControllerLauncher, engine_launcher, fork_limit
from dnb.pool.host_checks import check_encryption, check_files, check_launcher, check_loopback, check_writable
from dnb.progress import Report, long_work
from dnb.protocol.pool import HubPlace, PoolFacts, Process
from dnb.protocol.versions import POOL_FORMAT, RecordHeader, explain_unreadable, name_dnb, name_this_dnb
from dnb.transport.system.processes import find_process, is_alive, this_process

log = logging.getLogger(__name__)

P = TypeVar("P", bound=EnginePool)
MakePool = Callable[..., P]

# A heartbeat of ipyparallel's heart monitor registers a new engine: its default of 3 s makes every start 3 s longer.
HEARTBEAT_MILLISECONDS = 250
HEARTBEAT_MISSES = 120  # as long as the default allows: 30 s
# For a pool that is there to answer; ipyparallel's own 10 s are too short where the machine is busy.
CONNECT_SECONDS = 60.0
# For a controller that starts: how long it may take before it is looked whether it lives; twice as long each time.
FIRST_CONNECT_SECONDS = 1.0
LOOK_SECONDS = 0.02
# What is started as the controller.
CONTROLLER_COMMAND = [sys.executable, "-m", "dnb.hub.process.controller"]
# IPython would take a new temporary folder at every look.
NO_FOLDER = re.compile(r"IPython (?:dir|parent) '(.*)' is not a writable location")


def start_pool(
    make: MakePool[P],
    *,
    n: int,
    profile_dir: Path,
    launcher: str,
    threads_per_engine: int | None,
    timeout_seconds: float,
) -> P:
    """Start a controller with its hub, and engines; return when all of them have answered.

    Args:
        make: the pool class.
        n: number of engines.
        profile_dir: of IPython, see `profile_folder`.
        launcher: "local", or another of ipyparallel's engine launchers.
        threads_per_engine: for torch; None shares the host's cores out.
        timeout_seconds: for the whole start.

    Raises:
        ArgumentError: n is not a number of engines that this host can hold.
        PoolError: the pool did not come up; everything that had been started is ended.
    """
    check_launcher(launcher)
    check_encryption()
    check_loopback()
    check_num_engines(n, free_bytes=psutil.virtual_memory().available)
    cores = os.cpu_count() or 1
    num_threads = threads_per_engine or choose_num_threads(cores, num_engines=n)
    check_files(n)
    check_writable(profile_dir)
    cluster = _cluster(profile_dir, launcher=launcher, num_threads=num_threads, timeout_seconds=timeout_seconds)
    controller = _Controller(cluster, deadline=time.monotonic() + timeout_seconds)
    try:
        with long_work(f"starting {n} engine{'s' if n > 1 else ''}") as report:
            return _bring_up(controller, cluster, make, n=n, num_threads=num_threads, report=report)
    except BaseException as error:
        output = controller.last_words()
        cluster.stop_cluster_sync()
        if isinstance(error, TimeoutError | ipyparallel.TimeoutError):
            way_out = f"%dtrain start -n {n} --timeout-seconds {2 * timeout_seconds:g} waits longer"
            raise PoolError(f"the pool of {n} engines did not come up: {error}. {way_out}{output}") from error
        if isinstance(error, PoolError | RuntimeError | OSError | ipyparallel.error.KernelError):
            raise PoolError(f"the pool of {n} engines did not come up: {error}{output}") from error
        raise
    finally:
        controller.close()


def adopt_pool(
    make: MakePool[P], facts: PoolFacts, *, profile_dir: Path, mode: Literal["steer", "watch"] = "steer"
) -> P:
    """Take over a living pool whose kernel is gone, or look on at one that another kernel steers.

    Raises:
        PoolError: it cannot be reached.
    """
    try:
        connection = _read_connection(facts.cluster_id, profile_dir)
        with long_work(f"connecting to the pool {facts.cluster_id}"):
            client = ipyparallel.Client(
                connection,
                profile_dir=str(profile_dir),
                ipython_dir=str(profile_dir.parent),
                cluster_id=facts.cluster_id,
                timeout=CONNECT_SECONDS,
            )
    except (OSError, ValueError, KeyError, msgspec.MsgspecError, ipyparallel.TimeoutError) as error:
        raise PoolError(f"the pool {facts.cluster_id} cannot be reached: {error}") from error
    try:
        return make(client, connection, cluster=None, mode=mode, **_folders(profile_dir))
    except BaseException:
        client.close(linger=False)
        raise


def _read_connection(cluster_id: str, profile_dir: Path) -> dict[str, Any]:
    """Return what a client's connection file says.

    Raises:
        ValueError: it is none, or not one of a pool of this version of dnb.
    """
    path = client_file(cluster_id, profile_dir / "security")
    connection = json.loads(path.read_bytes())
    if not isinstance(connection, dict) or not isinstance(connection.get("dnb"), dict):
        raise ValueError(f"{path} is not the connection file of a pool")
    header = msgspec.convert(connection["dnb"], type=RecordHeader)
    if header.format != POOL_FORMAT:
        raise ValueError(
            f"its hub is {name_dnb(header.version, header.format)}, and this is {name_this_dnb()}: use one version"
        )
    try:
        msgspec.convert(connection["dnb"], HubPlace)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"{path} is of {name_dnb(header.version, header.format)}: {explain_unreadable(error)}"
        ) from error
    return connection


def profile_folder(profile: str | None) -> Path:
    """Return the folder of an IPython profile: the one named, else that of the notebook's own kernel.

    Raises:
        PoolError: it can be found, or made, nowhere but in a temporary folder, where no other kernel would look.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=NO_FOLDER.pattern, category=UserWarning)
            return Path(ipyparallel.Cluster(profile=profile or "", load_profile=False, log=quiet_log()).profile_dir)
    except UserWarning as warning:
        found = NO_FOLDER.search(str(warning))
        raise PoolError(
            f"IPython's folder, in which a pool keeps its connection files, cannot be made or written in "
            f"{found[1] if found else warning}: mend its permissions, or set IPYTHONDIR to a folder that you can write"
        ) from None
    except OSError as error:
        raise PoolError(
            f"the profile {(profile or 'default')[:60]!r} cannot be made ({error.strerror}): name another one with "
            "%dtrain start --profile NAME, or set IPYTHONDIR to a folder that you can write"
        ) from error


class _Controller:
    """The controller of a pool that starts: nothing is waited for any longer than it lives.

    Args:
        cluster: that has not been started.
        deadline: of the start, on the monotonic clock.
    """

    def __init__(self, cluster: ipyparallel.Cluster, *, deadline: float) -> None:
        self._cluster = cluster
        self._deadline = deadline
        self._process: Process | None = None
        self._output: TextIO | None = None

    @property
    def seconds_left(self) -> float:
        """The seconds until the deadline; never less than a check takes."""
        return max(self._deadline - time.monotonic(), LOOK_SECONDS)

    def start(self) -> None:
        """Start it; return before it serves."""
        self._cluster.start_controller_sync()
        launcher = self._cluster.controller
        # Held open, as whoever sees it end removes the file: this kernel, and JupyterLab's part of ipyparallel.
        with contextlib.suppress(FileNotFoundError):
            self._output = open(launcher.output_file, errors="replace")  # noqa: SIM115
        self._process = find_process(launcher.pid)

    def connect(self) -> ipyparallel.Client:
        """Return a client of it.

        Raises:
            PoolError: it has ended.
            TimeoutError: it does not answer.
        """
        # ipython_dir: else the client looks for one anew, and prints a warning if the home cannot be written.
        folder = str(Path(self._cluster.profile_dir).parent)
        patience = FIRST_CONNECT_SECONDS
        while True:
            self.check()
            limit = min(patience, self.seconds_left)
            try:
                return self._cluster.connect_client_sync(ipython_dir=folder, timeout=limit)
            except ipyparallel.TimeoutError:
                if limit < patience:
                    raise
                patience *= 2

    def wait(self, holds: Callable[[], bool], *, missing: Callable[[], str]) -> None:
        """Wait until something holds that needs the controller.

        Raises:
            PoolError: it has ended.
            TimeoutError: `missing` is what it says.
        """
        while not holds():
            self.check()
            if time.monotonic() > self._deadline:
                raise TimeoutError(missing())
            time.sleep(LOOK_SECONDS)

    def check(self) -> None:
        """Raise `PoolError` if it has ended."""
        if self._process is None or not is_alive(self._process):
            raise PoolError("its controller has ended")

    def last_words(self) -> str:
        """Return the last lines of its output, for an error."""
        if self._output is None:
            return ""
        with self._output as file:
            return last_words(file.read())

    def close(self) -> None:
        """Close its output, which is not needed any more."""
        if self._output is not None:
            self._output.close()


def _bring_up(
    controller: _Controller,
    cluster: ipyparallel.Cluster,
    make: MakePool[P],
    *,
    n: int,
    num_threads: int,
    report: Report,
) -> P:
    report("the controller is on its way")
    controller.start()
    cluster.start_engines_sync(n, **fork_limit(cluster, seconds=controller.seconds_left))
    client = controller.connect()
    try:
        registry = Registry(client)
        report(lambda: f"{len(client.ids)} of {n} are there")
        registered = client.wait_for_engines(n, block=False, interactive=False)  # it sees, too, if they end instead
        controller.wait(
            lambda: registered.done() or len(registry.poll()) >= n,
            missing=lambda: f"{n - len(client.ids)} of them have not registered",
        )
        if not registered.cancel():
            registered.result()
        profile_dir = Path(cluster.profile_dir)
        connection = _read_connection(cluster.cluster_id, profile_dir)
        _join_all(controller, client, cluster, num_threads=num_threads, report=report)
        return make(client, connection, cluster=cluster, **_folders(profile_dir))
    except BaseException:
        client.close(linger=False)
        raise


def _join_all(
    controller: _Controller,
    client: ipyparallel.Client,
    cluster: ipyparallel.Cluster,
    *,
    num_threads: int,
    report: Report,
) -> None:
    """Let every engine import torch, start its worker and meet the hub."""
    file = f"{cluster.profile_dir}/security/ipcontroller-{cluster.cluster_id}-engine.json"
    calls = start_joining(
        client,
        client.ids,
        connection_file=file,
        num_threads=num_threads,
        timeout_seconds=controller.seconds_left,
    )
    report(lambda: f"{count_ready(calls)} of {len(calls)} have met the hub")
    controller.wait(
        lambda: count_ready(calls) == len(calls),
        missing=lambda: f"{len(calls) - count_ready(calls)} of them have not met the hub",
    )
    for call in calls.values():
        call.get()


def _cluster(profile_dir: Path, *, launcher: str, num_threads: int, timeout_seconds: float) -> ipyparallel.Cluster:
    me = this_process()
    options = Config()
    options.ControllerLauncher.controller_cmd = CONTROLLER_COMMAND
    options.ControllerLauncher.connection_info_timeout = timeout_seconds
    options.EngineLauncher.environment = thread_environment(num_threads)
    return PoolCluster(
        profile_dir=str(profile_dir),
        controller=PrivateControllerLauncher,
        engines=engine_launcher(launcher),
        config=options,
        controller_args=[
            # Schedulers as threads: one process instead of eight, and nothing of the training goes through them.
            "--IPController.use_threads=True",
            # What cells run and print is for those alone who can read the connection files.
            "--IPController.enable_curve=True",
            f"--HeartMonitor.period={HEARTBEAT_MILLISECONDS}",
            f"--HeartMonitor.max_heartmonitor_misses={HEARTBEAT_MISSES}",
            f"--DnbController.owner_host={me.host}",
            f"--DnbController.owner_pid={me.pid}",
            f"--DnbController.owner_create_time={me.create_time!r}",
            f"--DnbController.owner_boot_id={me.boot_id}",
            f"--DnbController.owner_pid_namespace={me.pid_namespace}",
        ],
        delay=0.0,
        shutdown_atexit=False,  # the hub ends the pool, also when the kernel is killed
        log=quiet_log(),
    )


def _folders(profile_dir: Path) -> dict[str, Any]:
    return {"security_dir": profile_dir / "security", "log_dir": profile_dir / "log"}
