"""The way of a fork of the hub's supervisor to an engine like one that was started by a command."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import random
import resource
import signal
import sys
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from ipyparallel.engine import app as engine_app
from ipyparallel.engine import nanny
from traitlets import default

from dnb.transport.system.processes import end_with_parent, name_process

FIRST_FREE_DESCRIPTOR = 3


class _ForkedEngine(engine_app.IPEngine):
    """`ipengine`, where it is now: its own default is where it was imported."""

    @default("work_dir")
    def _work_dir_default(self) -> str:
        return os.getcwd()


def run_engine(
    arguments: list[str],
    *,
    environment: Mapping[str, str],
    folder: str,
    output: int,
    supervisor: int,
    most_files: int = 0,
) -> int:
    """Turn this process, a fork with one thread, into an engine until it ends; its exit code.

    Args:
        arguments: of ipyparallel's engine command.
        environment: of the process.
        folder: to work in.
        output: descriptor of the file for all that it prints.
        supervisor: pid of the parent.
        most_files: that user code may open, as in the kernel; the supervisor may open more. 0 changes nothing.
    """
    _leave_parent(output, supervisor=supervisor)
    if most_files > 0:
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most_files, limit), limit))
    name_process("dnb-engine")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = os.getcwd()
    sys.argv = ["ipengine", *arguments]
    _seed_anew()
    # Now, while there is one thread: a process with several is not forked safely.
    engine_app.start_nanny = _NannyInWaiting().start
    code = _run(_ForkedEngine.launch_instance)
    atexit._run_exitfuncs()
    return code


def _leave_parent(output: int, *, supervisor: int) -> None:
    """Give the fork a session, descriptors, signal handlers and log of its own; it ends with its parent."""
    os.setsid()
    end_with_parent(signal.SIGTERM)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _close_all_but_standard()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != supervisor:  # it had died before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)


def _close_all_but_standard() -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= FIRST_FREE_DESCRIPTOR:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def _seed_anew() -> None:
    """Seed the global generators by chance: what the parent seeded at import would be the same in all engines."""
    random.seed()
    np.random.seed()


def _run(main: Any) -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


class _NannyInWaiting:
    """A fork that becomes ipyparallel's nanny of this engine as soon as it is told what to watch.

    ipyparallel would start a process that imports everything once more.
    """

    def __init__(self) -> None:
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours_in)
            os.close(ours_out)
            _be_nanny(theirs_in, theirs_out)
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin: IO[bytes] = os.fdopen(ours_in, "wb")
        self.stdout: IO[bytes] = os.fdopen(ours_out, "rb")

    def start(self, **facts: Any) -> tuple[str, _NannyInWaiting]:
        """Replace `ipyparallel.engine.nanny.start_nanny`: returns its address, and what must be kept while it runs."""
        with self.stdin as pipe:
            pipe.write(pickle.dumps(facts | {"pid": os.getpid()}))
        address = self.stdout.readline().decode().strip()
        if not address:
            raise RuntimeError("the engine's nanny ended at once")
        return address, self


def _be_nanny(commands: int, answers: int) -> None:
    code = 1
    try:
        os.setsid()  # signals for the engine are not for its nanny
        name_process("dnb-nanny")
        os.dup2(commands, 0)
        os.dup2(answers, 1)
        _close_all_but_standard()
        sys.stdin = os.fdopen(0)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        code = _run(nanny.main)
    finally:
        os._exit(code)
