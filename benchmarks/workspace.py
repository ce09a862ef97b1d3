"""A benchmark's surroundings: one thread per process, and folders of its own that leave with it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
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
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    memory = _memory_folder(folder)
    before = Path.cwd()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    os.environ["PYTHONPATH"] = child_environment()["PYTHONPATH"]
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    os.environ["DNB_SEGMENT_FOLDERS"] = os.pathsep.join(map(str, dict.fromkeys([memory, folder])))
    (folder / "ipython").mkdir()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        for own in {folder, memory}:
            shutil.rmtree(own, ignore_errors=True)


def segment_folders() -> list[Path]:
    """Where a benchmark's own shared memory may lie, the best first."""
    return [Path(folder) for folder in os.environ["DNB_SEGMENT_FOLDERS"].split(os.pathsep)]


def _memory_folder(folder: Path) -> Path:
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="bench-", dir=shared)) if shared.is_dir() else folder


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
