"""ipyparallel's local engines, but forked by the pool's supervisor instead of started by a command."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipyparallel
import psutil
import traitlets
from ipyparallel.cluster.launcher import (
    LocalControllerLauncher,
    LocalEngineLauncher,
    LocalEngineSetLauncher,
    ipengine_cmd_argv,
)

from dnb.errors import PoolError
from dnb.hub.process.fork_server import ANSWER_SECONDS, CAN_FORK, fork_engine
from dnb.transport.system.private_files import open_private

log = logging.getLogger(__name__)


class PrivateControllerLauncher(LocalControllerLauncher):
    """A controller of this host whose log only its user may read."""

    entrypoint_name = "local"  # for ipyparallel's other tools, which read the cluster's file

    def start(self) -> Any:
        """Start it."""
        close_log_to_others(self.output_file)
        return super().start()


# By which ipyparallel hands engines the cluster's key.
CONNECTION_VARIABLE = "IPP_CONNECTION_INFO"


class ForkedEngineLauncher(LocalEngineLauncher):
    """One engine; a command of the user's own is started as it is."""

    def get_env(self) -> dict[str, str]:
        """Return what ipyparallel adds to the environment, less the keys: an engine of this host reads their file."""
        return _without_keys(super().get_env())

    def start(self) -> Any:
        """Let the supervisor fork it; return when it is there, before it has registered."""
        if self.engine_cmd != ipengine_cmd_argv:
            close_log_to_others(self.output_file)
            return super().start()
        output = open_private(Path(self.output_file), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            self.pid = fork_engine(
                self._fork_server(),
                [*self.cluster_args, *self.engine_args],
                environment={**_without_keys(os.environ), **self.get_env()},
                folder=os.path.abspath(self.work_dir),
                output=output,
                timeout_seconds=max(self.parent.answer_by - time.monotonic(), 0.1),
            )
        finally:
            os.close(output)
        self.process = psutil.Process(self.pid)
        self.notify_start(self.pid)
        self._start_waiting()
        return self.pid

    def _fork_server(self) -> str:
        """Return where the supervisor takes orders: as the connection file says, which only this user can read."""
        path = Path(self.profile_dir) / "security" / f"ipcontroller-{self.cluster_id}-engine.json"
        try:
            name: str = json.loads(path.read_text())["dnb"]["nursery"]
        except (OSError, ValueError, KeyError) as error:
            raise PoolError(
                f"{path} does not say where engines are started: {type(error).__name__}: {error}"
            ) from error
        return name

    def _wait(self) -> None:
        """Tell when the process has ended: it is the supervisor's child, so its end is seen, its exit code is not."""
        try:
            watched = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has ended already
            watched = None
        if watched is not None:
            try:
                while not self._stop_waiting.is_set() and self.state == "running":
                    if select.select([watched], [], [], self.poll_seconds)[0]:
                        break
            finally:
                os.close(watched)
        stop_data = {"exit_code": None, "pid": self.pid, "identifier": self.identifier}
        self.loop.add_callback(lambda: self.notify_stop(stop_data))


class ForkedEngineSetLauncher(LocalEngineSetLauncher):
    """Several engines of this host."""

    launcher_class = ForkedEngineLauncher
    answer_by = traitlets.Float(help="when the supervisor must have answered, on the monotonic clock")

    @traitlets.default("answer_by")
    def _answer_in_time(self) -> float:
        return time.monotonic() + ANSWER_SECONDS


def close_log_to_others(path: str) -> None:
    """Make a log that ipyparallel opens then: it makes its own for all to read.

    Raises:
        OSError: it cannot be made.
    """
    os.close(open_private(Path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND))


class PoolCluster(ipyparallel.Cluster):
    """A cluster whose file, which only other kernels and tools read, holds nobody up where the disk fails."""

    def to_dict(self) -> dict[str, Any]:
        """Return what its file says: that it is ipyparallel's."""
        described: dict[str, Any] = super().to_dict()
        described["cluster"]["class"] = f"{ipyparallel.Cluster.__module__}.{ipyparallel.Cluster.__name__}"
        return described

    def write_cluster_file(self) -> None:
        """Replace it in one move; the one before stays if that fails."""
        path = Path(self.cluster_file)
        aside = path.with_name(f"{path.name}.new")
        try:
            with os.fdopen(open_private(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
                json.dump(self.to_dict(), file)
            aside.replace(path)
        except OSError as error:
            log.warning("%s is not up to date: %s", path, error.strerror)
            with contextlib.suppress(OSError):
                aside.unlink()

    def remove_cluster_file(self) -> None:
        """Remove it, if that can be."""
        with contextlib.suppress(OSError):
            super().remove_cluster_file()


def _without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != CONNECTION_VARIABLE}


def fork_limit(cluster: Any, *, seconds: float) -> dict[str, float]:
    """Return what `cluster.start_engines` is to be given so that the supervisor is not waited for any longer."""
    is_ours = issubclass(cluster.engine_launcher_class, ForkedEngineSetLauncher)
    return {"answer_by": time.monotonic() + seconds} if is_ours else {}


def engine_launcher(name: str) -> Any:
    """Return the launcher of that name; local engines are forked where that is safe."""
    return ForkedEngineSetLauncher if CAN_FORK and name.lower() == "local" else name
