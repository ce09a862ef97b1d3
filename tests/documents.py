"""Code blocks of Markdown pages, and what a test does with each.

A block in `python` or `ipython`, or without a language but with a line of `%`, is run as a cell; `bash` is parsed.
A comment before a block says what else is to be expected: `<!-- not run: needs four engines -->` or
`<!-- raises: ArgumentError -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n+)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
CELLS, SHELL = ("python", "ipython"), ("bash", "console")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeBlock:
    """A fenced block of a page."""

    place: str  # as an editor opens it
    language: str
    text: str
    mark: str  # "" if there is no comment before it

    @property
    def is_cell(self) -> bool:
        return self.language in CELLS or (not self.language and self._has_magics)

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL or (not self.language and not self._has_magics)

    @property
    def is_run(self) -> bool:
        return self.is_cell and not self.mark.startswith("not run: ")

    @property
    def raises(self) -> str:
        return self.mark.removeprefix("raises: ") if self.mark.startswith("raises: ") else ""

    @property
    def _has_magics(self) -> bool:
        return any(line.lstrip().startswith("%") for line in self.text.splitlines())


def blocks_of(path: Path) -> list[CodeBlock]:
    text = path.read_text(encoding="utf-8")
    return [
        CodeBlock(
            place=f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start('text')) + 1}",
            language=found["language"],
            text=found["text"],
            mark=found["mark"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


def first_cells() -> list[CodeBlock]:
    """The blocks on which the examples of all pages build: model and data, as the first steps make them."""
    return [block for block in blocks_of(ROOT / "docs" / "first_steps.md") if block.mark == "first"]
