"""A benchmark's surroundings: one thread per process, and folders of its own that leave with it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

ROOT = Path(__file__).resolve().parent.parent
# Whatever a benchmark starts inherits this variable: leftovers are told by it, never by name.
MARK = "BENCH_WORKSPACE"
PREFIX = "bench-"
END_SECONDS = 15.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def child_environment() -> dict[str, str]:
    """The environment of processes that import dnb and benchmarks from this checkout, whatever their folder is."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


@contextmanager
def workspace() -> Iterator[Path]:
    """Work in a temporary folder: pool files, run folders and shared memory lie there, and go at the end.

    Call it before torch is imported: OpenMP reads the number of threads once.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    roots = [Path(tempfile.gettempdir()), *filter(Path.is_dir, [Path("/dev/shm")])]
    _clear_stale(roots)
    # Not under names of dnb's own: its tests look for those that they left.
    folders = [Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root)) for root in roots]
    folder, memory = folders[0], folders[-1]
    before = Path.cwd()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    os.environ["PYTHONPATH"] = child_environment()["PYTHONPATH"]
    os.environ[MARK] = str(folder)
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    os.environ["DNB_SEGMENT_FOLDERS"] = os.pathsep.join(map(str, dict.fromkeys([memory, folder])))
    (folder / "ipython").mkdir()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        _end_leftovers(str(folder))
        for own in folders:
            shutil.rmtree(own, ignore_errors=True)


def segment_folders() -> list[Path]:
    """Where a benchmark's own shared memory may lie, the best first."""
    return [Path(folder) for folder in os.environ["DNB_SEGMENT_FOLDERS"].split(os.pathsep)]


def _clear_stale(roots: list[Path]) -> None:
    """Remove the folders of a benchmark that was killed."""
    for root in roots:
        for folder in root.glob(f"{PREFIX}*-*"):
            pid = folder.name.removeprefix(PREFIX).partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _end_leftovers(mark: str) -> None:
    """Give what is just ending its time; kill what remains, and say so: it is a fault."""
    _, remaining = psutil.wait_procs(_marked(mark), timeout=END_SECONDS)
    for process in remaining:
        print(f"killed what was left over: pid {process.pid}, {process.name()}", file=sys.stderr)
        process.kill()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            # multiprocessing's own helper ends with us
            if is_ours and not any("resource_tracker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended, or is another user's
            continue
    return found


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
