"""The command `dnb`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
RULES = PACKAGE / "nbval_sanitize.cfg"
ACCURACY_WANTED = 0.97


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; its exit code."""
    parser = argparse.ArgumentParser(prog="dnb", description="Distributed training from a notebook.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the quickstart notebook headless, on a local pool")
    demo.add_argument("--output", type=Path, default=Path("build"), help="folder for notebook and HTML")
    demo.set_defaults(run=lambda options: run_demo(options.output))
    doctor = commands.add_parser("doctor", help="tell all that decides if a pool can live here: for a bug report")
    doctor.add_argument("--profile", help="IPython profile whose pools are looked for")
    doctor.set_defaults(run=lambda options: run_doctor(options.profile))
    rules = commands.add_parser("nbval-sanitize", help="print the path of the rules that nbval needs for dnb's outputs")
    rules.set_defaults(run=lambda _: print_rules())
    options = parser.parse_args(arguments)
    return int(options.run(options))


def run_doctor(profile: str | None = None) -> int:
    """Print the doctor's report; 1 if it names a problem."""
    from dnb.pool.doctor import describe_findings, examine_host  # not for the other subcommands: torch takes seconds

    findings = examine_host(profile)
    print(describe_findings(findings))
    return int(any(each.problem for each in findings))


def print_rules() -> int:
    """Print where the sanitize rules lie: `pytest --nbval --nbval-sanitize-with "$(dnb nbval-sanitize)"`."""
    print(RULES)
    return 0


def run_demo(output: Path) -> int:
    """Execute the quickstart, and leave it with its outputs, and as HTML with the chart.

    Args:
        output: folder; made if it is not there.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
        from nbconvert import HTMLExporter
    except ImportError as error:
        print(f"dnb demo needs {error.name}: pip install 'dnb[demo]'", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(quickstart_path(), as_version=4)
    print("training on 2 engines: the quickstart notebook, headless", flush=True)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(output)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # TCP on loopback is fine here
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        nbformat.write(notebook, output / "quickstart.ipynb")
        html, _ = HTMLExporter().from_notebook_node(notebook)
        (output / "quickstart.html").write_text(html, encoding="utf-8")
    return _report(notebook, output)


def _report(notebook: Any, output: Path) -> int:
    found = re.search(r"validation accuracy (\d\.\d+)", _printed(notebook))
    if found is None:
        print("the notebook printed no validation accuracy", file=sys.stderr)
        return 1
    print(f"validation accuracy {found[1]}")
    print(f"see {output / 'quickstart.html'} for the chart, {output / 'quickstart.ipynb'} for the notebook")
    if float(found[1]) < ACCURACY_WANTED:
        print(f"that is below {ACCURACY_WANTED}: something is wrong", file=sys.stderr)
        return 1
    return 0


def _printed(notebook: Any) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "") for output in outputs)


def quickstart_path() -> Path:
    """Return the path of the quickstart notebook: beside the package in a checkout, inside it when installed."""
    beside = PACKAGE.parent / "notebooks" / "quickstart.ipynb"
    return beside if beside.exists() else PACKAGE / "quickstart.ipynb"


if __name__ == "__main__":
    sys.exit(main())
