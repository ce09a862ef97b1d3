"""The writer of runs as pages of HTML; set from above, as only the notebook's floor draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Takes a run with a folder, and the file; returns the file when it is written.
PageWriter = Callable[[Any, str | Path], Path]

_writers: list[PageWriter] = []


def write_pages_by(writer: PageWriter) -> None:
    """Let `writer` write every page from now on."""
    _writers[:] = [writer]


def write_page(run: Any, path: str | Path) -> Path:
    """Write a run as a page, and return the file."""
    (writer,) = _writers
    return writer(run, path)
