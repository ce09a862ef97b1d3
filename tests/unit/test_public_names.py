from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import dnb

# As design.md, section 4, has it, less what later releases bring; and `batches`, by which the order can be checked.
PUBLIC = [
    "Engine",
    "Plan",
    "Pool",
    "Run",
    "RunError",
    "Sum",
    "attach",
    "batches",
    "fit",
    "plan",
    "resume",
    "show",
    "start",
]
# Those, and the functions still to come.
FUNCTIONS = {"attach", "batches", "fit", "plan", "resume", "show", "start"}


def test_the_public_names_are_those_of_the_design():
    assert dnb.__all__ == PUBLIC


def test_there_are_at_most_a_dozen_public_names_and_show():
    assert len(set(dnb.__all__) - {"show"}) <= 12


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_had(name: str):
    assert getattr(dnb, name).__name__ == name


def test_a_name_that_is_not_public_is_not_there():
    with pytest.raises(AttributeError, match="module 'dnb' has no attribute 'nothing'"):
        _ = dnb.nothing


def test_the_module_names_its_public_names_before_they_are_used_and_no_others():
    code = "import dnb; print(dir(dnb) == sorted(dnb.__all__))"
    assert run(code) == "True"


def test_no_module_bears_the_name_of_a_public_function():
    modules = {info.name.rpartition(".")[2] for info in pkgutil.walk_packages(dnb.__path__, "dnb.")}
    assert modules & FUNCTIONS == set()


@pytest.mark.parametrize(
    "module", ["dnb", "dnb.hub.process.controller", "dnb.hub.server.service", "dnb.notebook.arguments"]
)
def test_a_module_that_must_be_quick_does_not_import_torch(module: str):
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("module", ["dnb.engine.process.worker", "dnb.hub.server.service"])
def test_engines_and_hub_do_without_torchs_compiler_which_is_large(module: str):
    assert run(f"import sys, {module}; print('torch._dynamo' in sys.modules)") == "False"


LOAD = """
import sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
shell.run_line_magic("load_ext", "dnb")
print(sorted({"torch", "plotly", "ipywidgets", "ipyparallel", "numpy"} & set(sys.modules)))
"""


def test_the_extension_is_loaded_without_what_takes_seconds_to_import():
    assert run(LOAD) == "[]"


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()
