"""Host and kernel, held against what a pool needs, before anything is started."""

from __future__ import annotations

import errno
import resource
import socket
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import zmq

from dnb.errors import ArgumentError, PoolError, nearest
from dnb.transport.system.own_files import FOLDER_MODE
from dnb.transport.system.private_files import close_to_others

LOOPBACK = "127.0.0.1"
LOOPBACK_SECONDS = 2.0
# Open files of one process. The controller has most: 125, and 6 for each engine; some are for who calls meanwhile.
FILES_OF_POOL = 160
FILES_OF_ENGINE = 8


def check_launcher(launcher: str) -> None:
    """Refuse an engine launcher that ipyparallel does not know."""
    known = {point.name.lower() for point in entry_points(group="ipyparallel.engine_launchers")}
    if launcher.lower() not in known:
        raise ArgumentError(f"ipyparallel has no engine launcher {launcher!r}: {nearest(launcher, known)}")


def check_encryption() -> None:
    """Refuse a libzmq that cannot encrypt."""
    if not zmq.has("curve"):
        raise PoolError(
            f"a pool encrypts its sockets with CurveZMQ, which this libzmq {zmq.zmq_version()} was built without: "
            "pip install --force-reinstall --only-binary :all: pyzmq installs one that has it"
        )


def check_loopback() -> None:
    """Refuse a host whose loopback interface is down."""
    try:
        with socket.create_server((LOOPBACK, 0)) as listener:
            socket.create_connection(listener.getsockname()[:2], timeout=LOOPBACK_SECONDS).close()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise _too_few_files(str(error.strerror)) from error
        raise PoolError(
            f"the processes of a pool talk over {LOOPBACK}, which does not work here ({error.strerror or error}): the "
            "loopback interface is down; `ip link set lo up`, as root, mends that"
        ) from error


def check_files(num_engines: int) -> None:
    """Let this kernel, and what it starts, open as many files as a pool needs.

    Raises:
        PoolError: the system allows fewer.
    """
    needed = FILES_OF_POOL + FILES_OF_ENGINE * num_engines
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    if most < needed:
        raise _too_few_files(
            f"a pool of {num_engines} engines opens about {needed} in one process, and {most} are allowed"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _too_few_files(reason: str) -> PoolError:
    return PoolError(
        f"this kernel may not open enough files ({reason}): `ulimit -n 4096` in the shell that starts it, or the "
        "nofile limit of its service or container, allows more"
    )


def check_writable(profile_dir: Path) -> None:
    """Refuse a profile in which connection files cannot be written."""
    for folder in (profile_dir, profile_dir / "security", profile_dir / "log"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder != profile_dir:  # the profile itself may be shared
                close_to_others(folder, FOLDER_MODE)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise PoolError(
                f"a pool keeps its connection files in {folder}, which cannot be written ({error.strerror}): "
                "mend its permissions, or name another profile with %dtrain start --profile NAME"
            ) from error
