"""The notebook's floor draws what floors below describe, and none of them names it."""

import ast
import subprocess
import sys
from pathlib import Path

import dnb

PACKAGE = Path(dnb.__file__).parent
# Above the notebook's floor.
ABOVE = {PACKAGE / "__init__.py", PACKAGE / "cli.py"}


def test_a_shell_draws_plans_and_timelines_once_a_public_name_was_used():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "import dnb\n"
        "dnb.Sum\n"
        "print(*sorted(shell.display_formatter.mimebundle_formatter.deferred_printers))\n"
        "shell.history_manager.end_session()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "('dnb.planning.search.plans', 'Plan') ('dnb.planning.step_timeline', 'Timeline')"


def test_no_file_below_the_notebook_names_it_as_a_string():
    files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py") if path not in ABOVE}
    below = [path for place, path in files.items() if place.parts[0] != "notebook"]
    assert len(below) > 150
    assert [str(path) for path in below if any("dnb.notebook" in text for text in strings(path))] == []


def strings(path: Path) -> list[str]:
    """Every string of a file but its docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told)
    return [node.value for node in constants if isinstance(node.value, str)]
