"""Run notebooks and store their outputs, as they are committed: text and pictures, no widget state."""

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


def store(path: Path) -> None:
    """Run one notebook in a folder of its own, and write it back with what it put out."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        NotebookClient(
            notebook,
            timeout=600,
            resources={"metadata": {"path": folder}},
            store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=40"],
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran is of no interest, and differs each time
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    nbformat.write(notebook, path)


def merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join what was printed in pieces, without the lines of long work: they are as many as the machine was slow."""
    merged: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            output.text = re.sub(r"(?m)^\.\.\. .*\n+", "", output.text)
    return [output for output in merged if output.get("text") != ""]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        store(Path(argument))
