"""The memory of a whole notebook session: server, kernel, hub, engines and their helpers, but no browser."""

import shutil
import threading
from pathlib import Path

import nbformat
import psutil
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.engines]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MEGABYTE = 1e6
# Binder gives 1 GB at least. About 40 MB of files are counted in full where no other process has them open.
MOST_MEGABYTES = 950


class PeakMemory:
    """The largest sum of PSS (shared pages are divided by those who share them) of a server and all that it started.

    Args:
        home: the server's folder for IPython and the like; whoever has it in its environment belongs to the server.
    """

    def __init__(self, home: Path) -> None:
        self.num_bytes = 0
        self.parts: list[str] = []
        self._home = str(home)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory")

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.3):
            sizes = {}
            for process in psutil.process_iter():
                try:
                    if process.environ().get("IPYTHONDIR", "").startswith(self._home):
                        sizes[f"{process.pid} {' '.join(process.cmdline())[-60:]}"] = process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            if sum(sizes.values()) > self.num_bytes:
                self.num_bytes = sum(sizes.values())
                self.parts = [f"{size / MEGABYTE:.0f} MB {name}" for name, size in sizes.items()]


@pytest.mark.parametrize("name", ["quickstart", "elastic"])
def test_a_notebook_for_binder_stays_inside_a_gigabyte_with_its_server(name, lab, lab_server, notebook_folder):
    shutil.copy(NOTEBOOKS / f"{name}.ipynb", notebook_folder / f"{name}.ipynb")
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    lab.open(f"{name}.ipynb")
    with PeakMemory(lab_server.log.parent) as peak:
        lab.run_all()
        lab.wait_for(
            "return JSON.stringify(cells[argument].model.outputs?.toJSON() ?? []).includes('the pool is shut down');",
            len(cells) - 1,
        )
    assert len(peak.parts) >= 8  # server, kernel, controller, hub, two engines and their helpers
    assert peak.num_bytes < MOST_MEGABYTES * MEGABYTE, "\n".join(peak.parts)
