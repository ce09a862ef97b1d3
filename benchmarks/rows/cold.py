"""From a fresh Python process to the first committed step, `import dnb` and the pool included; against torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.pairs import alternate, compare
from benchmarks.rows.warm import CASE, NUM_ENGINES, fresh_torchrun
from benchmarks.settings import Settings
from benchmarks.table import Row, compared_row
from benchmarks.workspace import child_environment

REACH = 1.3
START_SECONDS = 180.0
END_SECONDS = 30.0


def rows(settings: Settings) -> Iterator[Row]:
    """One row."""
    figures = alternate({"ours": _ours, "rival": fresh_torchrun}, rounds=settings.pairs)
    compared = compare(figures["ours"], figures["rival"])
    yield compared_row(f"first fit, {CASE.name} N={NUM_ENGINES}", compared, unit="s", reach=REACH)


def _ours() -> float:
    command = [sys.executable, "-m", "benchmarks.cold_start", CASE.name, str(NUM_ENGINES)]
    began = time.time()
    # A session of its own: an interrupt at the terminal comes through us, once.
    process = subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=START_SECONDS)
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its pool ends with it
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return float(said) - began
