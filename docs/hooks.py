"""What mkdocs calls while it builds the site."""

from __future__ import annotations

from typing import Any

from generated_pages import ROOT, filled  # mkdocs looks beside this file
from mkdocs.structure.files import File

_PICTURES = ROOT / "notebooks" / "images"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pictures of the notebooks, so that they are kept once."""
    for path in sorted(_PICTURES.glob("*.png")):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what comes from the code."""
    return filled(markdown)
