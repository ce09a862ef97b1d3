"""Run all cells of notebooks, then all of them once more in the same kernel: what a cell leaves must not break it."""

import copy
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run_twice(path: Path) -> None:
    """Run one notebook so, in a folder of its own; its outputs are dropped."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    again = copy.deepcopy(code)
    for cell in again:
        cell.id = f"{cell.id}-again"[-64:]
    notebook.cells = [*code, *again]
    with tempfile.TemporaryDirectory(prefix="twice-") as folder:
        NotebookClient(
            notebook,
            timeout=600,
            resources={"metadata": {"path": folder}},
            store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=40"],
        ).execute()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument, flush=True)
        run_twice(Path(argument))
