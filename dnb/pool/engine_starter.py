"""More engines for a pool that is there: started, registered, joined to the hub, or ended again without a trace."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ipyparallel
import psutil
from ipyparallel.cluster.launcher import LocalEngineSetLauncher

from dnb.engine.process.worker import join_pool
from dnb.errors import PoolError
from dnb.pool.fork_launcher import ForkedEngineSetLauncher, fork_limit
from dnb.progress import Report, long_work
from dnb.protocol.pool import EngineFacts, Process
from dnb.transport.system.processes import children_of, end_processes, find_process, is_alive

# How often is looked whether engines have registered, or have ended instead.
LOOK_SECONDS = 0.05
# How often a controller is asked which engines it knows.
ASK_SECONDS = 0.5
# How long its answer, and the client's own thread, may take where nothing else waits for them.
ANSWER_SECONDS, ADD_SECONDS = 5.0, 1.0
# How long engines that did not come up get to end by themselves, and then their nannies.
END_SECONDS = 3.0
# Whose processes are this host's.
LOCAL_LAUNCHERS = (LocalEngineSetLauncher, ForkedEngineSetLauncher)
# Lines of a process's output that go into an error.
OUTPUT_LINES = 12


class Registry:
    """The engines that ipyparallel's controller knows: as its client was told, and as it says itself when asked.

    A client hears of an engine by a notification, and under load misses some.

    Args:
        client: connected to the controller.
    """

    def __init__(self, client: ipyparallel.Client) -> None:
        self._client = client
        self._answer: Any = None
        self._asked = float("-inf")

    def poll(self) -> list[int]:
        """Return the engines known by now; asks anew now and then, and never waits. For one thread."""
        self._read_answer()
        if self._answer is None and time.monotonic() - self._asked > ASK_SECONDS:
            self._ask()
        return list(self._client.ids)

    def catch_up(self, *, limit_seconds: float) -> list[int]:
        """Return the engines known when the controller has answered, or after the time is up."""
        deadline = time.monotonic() + limit_seconds
        self._ask()
        while self._answer is not None and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS / 10)
            self._read_answer()
        return list(self._client.ids)

    def _ask(self) -> None:
        self._asked = time.monotonic()
        self._answer = self._client._send(self._client._query_stream, "connection_request")

    def _read_answer(self) -> None:
        if self._answer is None or not self._answer.done():
            return
        answer, self._answer = self._answer, None
        engines = answer.result()["content"].get("engines", {})
        missed = {number: name for number, name in engines.items() if int(number) not in self._client.ids}
        if missed:  # added by the client's own thread, which takes notifications, too
            added = threading.Event()

            def add() -> None:
                self._client._update_engines(missed)
                added.set()

            self._client._io_loop.add_callback(add)
            added.wait(ADD_SECONDS)


class EngineStarter:
    """Starts engines, one call at a time; what did not come up is ended.

    Args:
        client: connected to the controller.
        cluster: that started it; None if another kernel did, whose cluster file is then read.
        cluster_id: of the pool.
        profile_dir: where the connection files are.
    """

    def __init__(
        self, client: ipyparallel.Client, *, cluster: ipyparallel.Cluster | None, cluster_id: str, profile_dir: Path
    ) -> None:
        self._client = client
        self._cluster = cluster
        self._cluster_id = cluster_id
        self._profile_dir = profile_dir
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End what is being started, as the pool ends."""
        self._cancelled.set()

    def start(self, n: int, *, num_threads: int, timeout_seconds: float) -> list[int]:
        """Start engines and wait until the hub has welcomed them; their ids.

        Args:
            n: how many.
            num_threads: for torch, each.
            timeout_seconds: for all of it.

        Raises:
            PoolError: not all came up in time; those that did take part, the others are ended.
        """
        with self._lock, long_work(f"starting {n} engine{'s' if n > 1 else ''}") as report:
            cluster = self._cluster = self._cluster or reopen_cluster(self._profile_dir, self._cluster_id)
            attempt = _Attempt(self._client, n, deadline=time.monotonic() + timeout_seconds, cancelled=self._cancelled)
            limit = fork_limit(cluster, seconds=timeout_seconds)
            earlier = set(cluster.engines)
            try:
                set_id = cluster.start_engines_sync(n, environment=thread_environment(num_threads), **limit)
                attempt.watch(cluster.engines[set_id], stop=partial(cluster.stop_engines_sync, set_id))
                attempt.wait_until_registered(report)
                file = self._profile_dir / "security" / f"ipcontroller-{self._cluster_id}-engine.json"
                attempt.join(report, connection_file=str(file), num_threads=num_threads)
            except BaseException as error:
                if not attempt.is_watched:  # the first of several may be there
                    for set_id in cluster.engines.keys() - earlier:
                        attempt.own(cluster.engines[set_id])
                attempt.end_the_rest()
                if isinstance(error, TimeoutError | RuntimeError | OSError | ipyparallel.error.RemoteError | PoolError):
                    raise PoolError(attempt.failure(error, timeout_seconds=timeout_seconds)) from error
                raise
            return sorted(attempt.joined)


class _Attempt:
    """One start of some engines.

    Args:
        client: connected to the controller.
        num_engines: that are to come up.
        deadline: on the monotonic clock.
        cancelled: set if nobody wants them any more.
    """

    def __init__(
        self, client: ipyparallel.Client, num_engines: int, *, deadline: float, cancelled: threading.Event
    ) -> None:
        self._client = client
        self._num_engines = num_engines
        self._deadline = deadline
        self._cancelled = cancelled
        self._registry = Registry(client)
        self._before = set(self._registry.catch_up(limit_seconds=ANSWER_SECONDS))
        self._launcher: Any = None
        self._stop: Callable[[], object] | None = None
        self._processes: list[Process] = []
        self.joined: dict[int, EngineFacts] = {}

    @property
    def is_watched(self) -> bool:
        """True if it knows of what was started."""
        return self._launcher is not None

    def watch(self, launcher: Any, *, stop: Callable[[], object]) -> None:
        """Find the processes, where they are this host's; else keep only the way to stop all of them."""
        self._stop = stop
        self.own(launcher)
        if type(launcher) in LOCAL_LAUNCHERS and len(self._processes) < self._num_engines:
            raise RuntimeError("an engine ended at once")

    def own(self, launcher: Any) -> None:
        """Find the processes that this launcher has started so far, where they are this host's."""
        self._launcher = launcher
        if type(launcher) in LOCAL_LAUNCHERS:  # their subclasses have the pids of other hosts
            found = [find_process(each.pid) for each in list(launcher.launchers.values()) if each.pid > 0]
            self._processes = [process for process in found if process is not None]

    def wait_until_registered(self, report: Report) -> None:
        """Wait until ipyparallel knows all of them."""
        report(lambda: f"{len(self._new_ids())} of {self._num_engines} are there")
        self._wait(lambda: len(set(self._registry.poll()) - self._before) >= self._num_engines)

    def join(self, report: Report, *, connection_file: str, num_threads: int) -> None:
        """Let them import torch and meet the hub."""
        left = max(self._deadline - time.monotonic(), LOOK_SECONDS)
        calls = start_joining(
            self._client,
            self._new_ids(),
            connection_file=connection_file,
            num_threads=num_threads,
            timeout_seconds=left,
        )

        report(lambda: f"{count_ready(calls)} of {len(calls)} have met the hub")

        def all_have_joined() -> bool:
            for engine, call in calls.items():
                if engine not in self.joined and call.ready():
                    self.joined[engine] = call.get()
            return len(self.joined) == len(calls)

        self._wait(all_have_joined)

    def end_the_rest(self) -> None:
        """End what did not join; where processes are not known, all of it or nothing."""
        staying = {facts.process.pid for facts in self.joined.values()}
        ending = [process for process in self._processes if process.pid not in staying]
        nannies = children_of(ending)
        # The nannies tell ipyparallel that their engines are gone, and end by themselves.
        end_processes(ending, patience_seconds=END_SECONDS, first_signal=signal.SIGTERM)
        end_processes(nannies, patience_seconds=END_SECONDS)
        if self._stop is not None and not self._processes and not self.joined:
            self._stop()

    def failure(self, error: BaseException, *, timeout_seconds: float) -> str:
        """Say what went wrong, what became of it, and what the engines said."""
        num_missing = self._num_engines - len(self.joined)
        came = f"; {', '.join(map(str, sorted(self.joined)))} joined" if self.joined else ""
        reason, way_out = str(error), ""
        if isinstance(error, TimeoutError):
            reason = f"the limit of {timeout_seconds:g} s is over"
            way_out = f". %dtrain add {num_missing} --timeout-seconds {2 * timeout_seconds:g} waits longer"
        return (
            f"{num_missing} of {self._num_engines} engines did not come up, and were ended: "
            f"{reason}{came}{way_out}{self._output()}"
        )

    def _new_ids(self) -> list[int]:
        return sorted(set(self._client.ids) - self._before)

    def _wait(self, holds: Callable[[], bool]) -> None:
        while not holds():
            for process in self._processes:
                if not is_alive(process):
                    raise RuntimeError("an engine ended at once")
            if time.monotonic() > self._deadline:
                raise TimeoutError
            if self._cancelled.wait(LOOK_SECONDS):
                raise RuntimeError("the pool was shut down meanwhile")

    def _output(self) -> str:
        return "" if self._launcher is None else last_words(self._launcher.get_output())


def start_joining(
    client: ipyparallel.Client,
    engines: Iterable[int],
    *,
    connection_file: str,
    num_threads: int,
    timeout_seconds: float,
) -> dict[int, Any]:
    """Ask engines to start their workers; the calls under way, which come to `EngineFacts`."""
    return {
        engine: client[engine].apply_async(
            join_pool,
            engine,
            num_threads=num_threads,
            connection_file=connection_file,
            timeout_seconds=timeout_seconds,
        )
        for engine in engines
    }


def count_ready(calls: Mapping[int, Any]) -> int:
    """Count the calls that have come back."""
    return sum(call.done() for call in calls.values())  # not ready(): that is for one thread


def reopen_cluster(profile_dir: Path, cluster_id: str) -> ipyparallel.Cluster:
    """Reopen a cluster that another kernel started, as far as starting more engines needs it.

    Not `Cluster.from_file`: that would watch processes which are not ours to watch, and rewrite the file.

    Raises:
        PoolError: its file does not say how engines are started.
    """
    path = profile_dir / "security" / f"cluster-{cluster_id}.json"
    try:
        launcher = json.loads(path.read_text())["engines"]["class"].replace(":", ".")  # it writes what it cannot read
    except (OSError, ValueError, KeyError) as error:
        raise PoolError(
            f"this pool was started by another kernel, and {path} does not say how ({error}): "
            "%dtrain shutdown and %dtrain start -n N open a pool that can grow"
        ) from error
    return ipyparallel.Cluster(
        profile_dir=str(profile_dir),
        cluster_id=cluster_id,
        cluster_file="",  # the other kernel's stays as it is
        engines=launcher,
        delay=0.0,
        shutdown_atexit=False,
        log=quiet_log(),
    )


def last_words(output: str) -> str:
    """Return the end of a process's output, as it is added to an error."""
    lines = output.strip().splitlines()[-OUTPUT_LINES:]
    return "\n" + "\n".join(lines) if lines else ""


def thread_environment(num_threads: int) -> dict[str, str]:
    """Return what keeps an engine's libraries to so many threads, from their import on."""
    return {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def quiet_log() -> logging.Logger:
    """Return a log for ipyparallel, which prints into notebooks unless it is given one."""
    quiet = logging.getLogger("dnb.ipyparallel")
    quiet.setLevel(logging.ERROR)
    return quiet


def free_bytes() -> int:
    """Return the memory that new processes of this host may use."""
    return int(psutil.virtual_memory().available)
