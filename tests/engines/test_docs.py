"""Every code block of README and docs, run as the cells of a notebook: a page from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from dnb.api import pools
from tests.documents import PAGES, CodeBlock, blocks_of, first_cells

pytestmark = [pytest.mark.engines, pytest.mark.float32]
WITH_CELLS = [path for path in PAGES if any(block.is_run for block in blocks_of(path))]


@pytest.fixture
def shell(pool) -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "dnb")
    yield shell
    left = pools._pool  # of a page that has ended the shared one, and begun another
    if left is not None and left is not pool and left.is_open:
        left.shutdown()
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def run(shell: InteractiveShell, block: CodeBlock) -> None:
    result = shell.run_cell(block.text, store_history=False)
    error = result.error_before_exec or result.error_in_exec
    found = type(error).__name__ if error is not None else ""
    assert found == block.raises, f"{block.place}: {error}"


@pytest.mark.parametrize("path", WITH_CELLS, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(shell: InteractiveShell, path: Path):
    blocks = blocks_of(path)
    known = [block for block in first_cells() if block not in blocks]
    for block in [*known, *(block for block in blocks if block.is_run)]:
        run(shell, block)
