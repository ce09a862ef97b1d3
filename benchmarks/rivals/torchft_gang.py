"""torchft's lighthouse and replicas, started, killed and watched from the benchmark."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import Case
from benchmarks.workspace import child_environment

# An interpreter of a virtual environment that has torchft: it wants releases of its own beside it.
PYTHON_VARIABLE = "BENCH_TORCHFT_PYTHON"
NOT_INSTALLED = (
    "torchft is not installed here: python -m venv ENV; ENV/bin/pip install torchft -c constraints.txt; "
    f"export {PYTHON_VARIABLE}=ENV/bin/python"
)
START_SECONDS, LOOK_SECONDS, END_SECONDS = 120.0, 0.01, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """torchft's settings that decide how soon a death is seen, and how long is waited for others."""

    heartbeat_milliseconds: int = 100  # the manager's default
    heartbeat_timeout_milliseconds: int = 5000  # the lighthouse's default
    join_timeout_milliseconds: int = 60000  # the lighthouse's default
    tick_milliseconds: int = 100  # the lighthouse's default
    timeout_seconds: float = 60.0  # of collectives, the manager's default

    def __str__(self) -> str:
        return (
            f"heartbeat {self.heartbeat_milliseconds} ms, its time-out {self.heartbeat_timeout_milliseconds} ms, "
            f"join time-out {self.join_timeout_milliseconds} ms, tick {self.tick_milliseconds} ms"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A committed step, as one replica saw it."""

    time: float  # seconds since the epoch
    step: int
    num_participants: int
    did_work: bool


def find_python() -> Path | None:
    """The interpreter that has torchft, if there is one."""
    named = os.environ.get(PYTHON_VARIABLE)
    return Path(named) if named and Path(named).exists() else None


class Replicas:
    """Replicas that train one case.

    Args:
        python: that has torchft.
        case: from its initial weights.
        folder: for logs.
        limits: of lighthouse and managers.
        number: of replicas that the data are split for.
    """

    def __init__(self, python: Path, case: Case, *, folder: Path, limits: Limits, number: int) -> None:
        self._python = python
        self._case = case
        self._folder = folder
        self._limits = limits
        self._number = number
        self._lives = 0
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, Path] = {}
        self._port = _free_port()
        self._lighthouse = self._open_lighthouse()

    def start(self, replica: int) -> None:
        """Start a replica, anew if it was killed."""
        self._lives += 1
        self._logs[replica] = self._folder / f"replica-{replica}-{self._lives}.jsonl"
        self._logs[replica].touch()
        command = [
            str(self._python), "-m", "benchmarks.rivals.torchft_replica",
            "--case", self._case.name,
            "--replica", str(replica),
            "--num-replicas", str(self._number),
            "--lighthouse", f"http://127.0.0.1:{self._port}",
            "--log", str(self._logs[replica]),
            "--timeout-seconds", str(self._limits.timeout_seconds),
            "--heartbeat-milliseconds", str(self._limits.heartbeat_milliseconds),
        ]  # fmt: skip
        self.processes[replica] = self._popen(command, f"replica-{replica}-{self._lives}.log")

    def commits(self, replica: int) -> list[Commit]:
        """What a replica's present life has committed."""
        lines = self._logs[replica].read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [Commit(time=when, step=step, num_participants=count, did_work=did) for when, step, count, did in rows]

    def wait_for(self, replica: int, *, num_commits: int, num_participants: int = 1) -> None:
        """Block until a replica has committed so many more steps of so many replicas.

        Raises:
            TimeoutError: it did not.
        """
        begin = len(self.commits(replica))
        deadline = time.monotonic() + START_SECONDS
        while True:
            new = self.commits(replica)[begin:]
            if sum(each.num_participants >= num_participants for each in new) >= num_commits:
                return
            if time.monotonic() > deadline or self.processes[replica].poll() is not None:
                raise TimeoutError(f"torchft's replica {replica} stands still at {self.commits(replica)[-1:]}")
            time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        """Kill all of it: there is nothing to save."""
        for process in [*self.processes.values(), self._lighthouse]:
            process.kill()
            process.wait(END_SECONDS)

    def _open_lighthouse(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        command = [
            str(self._python.parent / "torchft_lighthouse"),
            "--bind", f"127.0.0.1:{self._port}",
            "--min_replicas", "1",
            "--heartbeat_timeout_ms", str(limits.heartbeat_timeout_milliseconds),
            "--join_timeout_ms", str(limits.join_timeout_milliseconds),
            "--quorum_tick_ms", str(limits.tick_milliseconds),
        ]  # fmt: skip
        return self._popen(command, "lighthouse.log")

    def _popen(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        environment = {**child_environment(), "PYTHONWARNINGS": "ignore", "RUST_LOG": "error"}
        with (self._folder / log).open("wb") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


@contextmanager
def open_replicas(python: Path, case: Case, *, folder: Path, limits: Limits, number: int) -> Iterator[Replicas]:
    """Replicas that take part, all of them; ended at the end."""
    folder.mkdir()
    replicas = Replicas(python, case, folder=folder, limits=limits, number=number)
    try:
        for replica in range(number):
            replicas.start(replica)
        replicas.wait_for(0, num_commits=5, num_participants=number)
        yield replicas
    finally:
        replicas.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
