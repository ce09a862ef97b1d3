"""A gang of ranks under torchrun that sleeps between its turns, on a socket file, without using a core."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.rivals.messages import SOCKET_VARIABLE, Failed, Line, Progress, Ready, Reply, Request
from benchmarks.workspace import child_environment

START_SECONDS = 120.0
TURN_SECONDS = 300.0
END_SECONDS = 10.0


class GangError(Exception):
    """A rival could not be started, or failed."""


class Gang:
    """Ranks of one rival, started once.

    Args:
        module: of the rival, run by every rank.
        num_ranks: one process each.
    """

    def __init__(self, module: str, *, num_ranks: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gang-", dir="."))
        self._lines: dict[int, Line] = {}
        self._is_up = False
        # The name of a socket file may have 108 bytes: the folder is the working directory's.
        path = os.path.relpath(self._folder / "s")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen(num_ranks)
        self._log = open(self._folder / "log", "wb")  # noqa: SIM115 - closed with the gang
        # torchrun leaves its log folders where temporary files go.
        own = {SOCKET_VARIABLE: path, "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(self._folder.absolute())}
        self._torchrun = subprocess.Popen(
            _command(module, num_ranks=num_ranks),
            env={**child_environment(), **own},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._welcome(num_ranks)
        except BaseException:
            self.close()
            raise
        self._is_up = True

    @property
    def processes(self) -> list[psutil.Process]:
        """torchrun and everything below it."""
        top = psutil.Process(self._torchrun.pid)
        return [top, *top.children(recursive=True)]

    def turn(self, request: Request, *, on_progress: Callable[[], None] | None = None) -> list[Reply]:
        """Let every rank do the same; their replies in order of rank.

        Raises:
            GangError: a rank failed or is gone.
        """
        for line in self._lines.values():
            line.send(request)
        replies = []
        for rank, line in sorted(self._lines.items()):
            reply = self._reply(rank, line)
            if isinstance(reply, Progress):
                if on_progress is not None:
                    on_progress()
                reply = self._reply(rank, line)
            replies.append(reply)
        return replies

    def close(self) -> None:
        """End every process; ranks that sleep end by themselves as their line closes."""
        processes = self.processes if self._torchrun.poll() is None else []
        for line in self._lines.values():
            line.close()
        self._lines.clear()
        self._server.close()
        try:
            self._torchrun.wait(END_SECONDS if self._is_up else 0.1)
        except subprocess.TimeoutExpired:
            self._torchrun.terminate()
        _, stubborn = psutil.wait_procs(processes, timeout=END_SECONDS / 2)
        for process in stubborn:
            process.kill()
        self._torchrun.wait(END_SECONDS)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _welcome(self, num_ranks: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        self._server.settimeout(1.0)
        while len(self._lines) < num_ranks:
            if self._torchrun.poll() is not None or time.monotonic() > deadline:
                raise GangError(f"{len(self._lines)} of {num_ranks} ranks came up:\n{self._last_words()}")
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            line = Line(connection)
            ready = line.receive_reply(timeout_seconds=START_SECONDS)
            if not isinstance(ready, Ready):
                raise GangError(f"a rank did not come up: {ready}\n{self._last_words()}")
            self._lines[ready.rank] = line

    def _reply(self, rank: int, line: Line) -> Reply:
        reply = line.receive_reply(timeout_seconds=TURN_SECONDS)
        if reply is None:
            raise GangError(f"rank {rank} is gone:\n{self._last_words()}")
        if isinstance(reply, Failed):
            raise GangError(f"rank {rank} failed:\n{reply.traceback}")
        return reply

    def _last_words(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-3000:]


def _command(module: str, *, num_ranks: int) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_ranks}"]
    return [*run, "--master-addr=127.0.0.1", f"--master-port={_free_port()}", "-m", module]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
