"""Refuses notebooks that carry widget state: megabytes per figure that no reader can use."""

import json
import sys
from pathlib import Path


def find_problems(path: Path) -> list[str]:
    """Say why this notebook should not be committed as it is; empty if it may."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    problems = []
    if "widgets" in notebook["metadata"]:
        problems.append("metadata.widgets is set: clear the widget state and save again")
    failed = [
        number
        for number, cell in enumerate(notebook["cells"], start=1)
        for output in cell.get("outputs", [])
        if output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", ())
    ]
    if failed:
        problems.append(f"cells {failed} end with an error: run the notebook again")
    return problems


def main(arguments: list[str]) -> int:
    """Print one line per problem; exit code 1 if there is any."""
    lines = [f"{name}: {problem}" for name in arguments for problem in find_problems(Path(name))]
    print("\n".join(lines) or f"{len(arguments)} notebook(s) fit to commit")
    return min(len(lines), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
